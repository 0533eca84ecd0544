"""Which label a class folder, or a WordNet id in a shard, stands for."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["IMAGENET", "ClassFile", "class_names", "read_class_file"]

ClassFile: TypeAlias = "str | os.PathLike[str] | Sequence[str]"
IMAGENET = "imagenet"  # in place of a class file: the 1,000 WordNet ids of ILSVRC 2012 in order


def read_class_file(class_file: ClassFile) -> tuple[str, ...]:
    """Names in label order.

    Args:
        class_file (str, PathLike or Sequence[str]): text file with one name a line, or
            ``"imagenet"`` for the WordNet ids of ILSVRC 2012 (``n01440764`` is class 0), in which
            its models are trained; or the names themselves.

    Raises:
        DataError: the file can't be read, is empty, or names a class twice.
    """
    if not isinstance(class_file, str | os.PathLike):
        return tuple(class_file)
    path: Path = Path(class_file)
    try:
        if os.fspath(class_file) == IMAGENET and not path.exists():
            text = files("chanprune_ext.data").joinpath("imagenet_wnids.txt").read_text("utf-8")
        else:
            text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"class_file: can't read {path}: {error}") from error
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if len(set(names)) < len(names) or not names:
        twice = next((name for name in names if names.count(name) > 1), "nothing at all")
        raise DataError(
            f"class_file: expected one class folder name a line, each once; {path} holds {twice!r}"
            f"{'' if not names else ' twice'}"
        )
    return names


def class_names(
    source: str,
    folders: Iterable[str],
    class_file: ClassFile | None,
    empty: Sequence[str] = (),
) -> tuple[str, ...]:
    """The classes of an image set in label order.

    Args:
        source (str): the image set, for messages.
        folders (Iterable[str]): class folders, or ids, found in it.
        class_file (str, PathLike or Sequence[str], optional): as for :func:`read_class_file`.
            Default: the sorted folders, which is the order of ILSVRC too, where all its classes
            are there.
        empty (Sequence[str]): class folders without an image. Whether they count decides on the
            labels of all classes behind them.

    Raises:
        DataError: a folder is not in the class file, or there is none and a folder holds no image;
            the message names it.
    """
    found = sorted(set(folders))
    if class_file is None and empty:
        raise DataError(
            f"{source}: the class folder {empty[0]!r} (one of {len(empty)}) holds no image, so the "
            "labels of those behind it can't be told; put its images there, take it out if it is "
            "no class, or give a class file with all classes of the model"
        )
    if class_file is None:
        return tuple(found)
    names = read_class_file(class_file)
    known = set(names)
    unknown = [folder for folder in found if folder not in known]
    if unknown:
        raise DataError(
            f"{source}: the class folder {unknown[0]!r} (one of {len(unknown)}) is not among "
            f"the {len(names)} names {_in(class_file)}; take it out, or give the class file that "
            "the model was trained with"
        )
    return names


def _in(class_file: ClassFile) -> str:
    if isinstance(class_file, str | os.PathLike):
        return f"in {os.fspath(class_file)}"
    return "of the training images"

"""Tar shards in the layout of webdataset: which files, how many images in each, what is in them.

A shard is a tar file in which the members of one sample share a name and differ in suffix:
``n01440764_10026.jpg`` beside ``n01440764_10026.cls``, or a plain archive ``<class>/<image>``.
"""

from __future__ import annotations

import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .archive import IMAGE_SUFFIXES
from .layout import SPLIT_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "EncodedSample",
    "Shard",
    "class_of",
    "count_images",
    "find_shards",
    "is_shard_pattern",
    "read_shard",
]

_PREFIX = "shards:"
_SIZES = "sizes.json"
_LABEL = "cls"
_SUFFIXES = tuple(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)


@dataclass(frozen=True)
class EncodedSample:
    """One image of a shard: its key for messages, the file's bytes, and its label if it has one."""

    key: str
    data: bytes
    label: int | None


@dataclass(frozen=True)
class Shard:
    """One tar file.

    Attributes:
        path (Path): where it is.
        images (int): how many it holds.
        classes (frozenset[str]): classes by folder or id; empty where they were not looked for.
        labels (frozenset[int]): classes by ``.cls`` members, likewise.
        counted (bool): whether the tar file was looked through, and not only ``sizes.json``.
    """

    path: Path
    images: int
    classes: frozenset[str] = frozenset()
    labels: frozenset[int] = frozenset()
    counted: bool = False


def is_shard_pattern(spec: str) -> bool:
    """Whether a data set is given as shards: by prefix, by pattern, or as a folder of tar files."""
    if spec.startswith(_PREFIX):
        return True
    if spec.endswith(".tar") and any(mark in spec for mark in "{*?[") and not Path(spec).exists():
        return True
    path = Path(spec)
    return path.is_dir() and any(path.glob("*.tar"))


def find_shards(spec: str, split: str) -> list[Path]:
    """The tar files of one split.

    Args:
        spec (str): a folder of tar files, a pattern (``train-{0000..0127}.tar``, ``*.tar``), or a
            file, perhaps behind ``shards:``.
        split (str): ``"train"``, ``"val"`` or ``"test"``. Where the names say which split they
            belong to (``imagenet1k-train-0003.tar``), those of this one are taken; the last two
            stand in for each other.

    Raises:
        DataError: there are none, or a file of the pattern is missing.
    """
    name = spec.removeprefix(_PREFIX)
    if Path(name).is_dir():
        paths = sorted(Path(name).glob("*.tar"))
    else:
        paths = [path for part in _braces(name) for path in _matching(part)]
    if not paths:
        raise DataError(f"{name}: no tar file there; expected shards such as train-0000.tar")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{name}: {missing[0]} (one of {len(missing)} of {len(paths)} shards) is missing; "
            "correct the pattern, or copy the file"
        )
    return _of_split(name, paths, split)


def _braces(pattern: str) -> list[str]:
    try:
        from braceexpand import braceexpand  # webdataset's own
    except ImportError as error:
        raise _missing_webdataset() from error
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"{pattern}: not a pattern ({error})") from error


def _missing_webdataset() -> DataError:
    return DataError(
        "tar shards need the package webdataset: pip install 'chanprune_ext[webdataset]'"
    )


def _matching(name: str) -> list[Path]:
    path = Path(name)
    if path.exists() or not any(mark in name for mark in "*?["):
        return [path]
    return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def _of_split(name: str, paths: Sequence[Path], split: str) -> list[Path]:
    splits = [_split_in(path.name) for path in paths]
    if not any(splits):
        return list(paths)
    stand_in = {"val": "test", "test": "val"}.get(split, split)
    for wanted in (split, stand_in):
        chosen = [path for path, found in zip(paths, splits, strict=True) if found == wanted]
        if chosen:
            return chosen
    raise DataError(
        f"{name}: no shard of split {split!r}; the names say "
        f"{', '.join(sorted({found for found in splits if found}))}"
    )


def _split_in(name: str) -> str | None:
    words = "".join(c if c.isalpha() else " " for c in name.lower()).split()
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), None)


def count_images(paths: Sequence[Path]) -> list[Shard]:
    """How many images each shard holds.

    ``sizes.json`` beside the shards, as webdataset's tools write it (file name to number), saves
    looking through them, which takes about a minute for the million images of ImageNet.

    Raises:
        DataError: a shard is no complete tar file, or holds no image.
    """
    known = _known_sizes(paths)
    if known is not None:
        return known
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_counted, paths))


def _known_sizes(paths: Sequence[Path]) -> list[Shard] | None:
    shards = []
    read: dict[Path, Any] = {}
    for path in paths:
        sizes = path.with_name(_SIZES)
        if sizes not in read:
            try:
                read[sizes] = json.loads(sizes.read_text()) if sizes.is_file() else {}
            except (OSError, ValueError) as error:
                raise DataError(f"{sizes}: can't be read ({error}); remove it") from error
        images = read[sizes].get(path.name) if isinstance(read[sizes], dict) else None
        if not isinstance(images, int) or images < 1:
            return None
        shards.append(Shard(path, images))
    return shards


def _counted(path: Path) -> Shard:
    classes, labels, keys = set(), set(), set()
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                key, suffix = _taken_apart(member.name)
                if not member.isreg():
                    continue
                if suffix in _SUFFIXES:
                    keys.add(key)
                    classes.add(class_of(key))
                elif suffix == _LABEL:
                    file = archive.extractfile(member)
                    assert file is not None, "a regular member"
                    labels.add(_label(file.read(), f"{path}: {member.name}"))
                archive.members = []  # type: ignore[attr-defined]  # keeps every header otherwise
            with path.open("rb") as raw:
                # tarfile takes a header that is cut short for the end of the archive
                raw.seek(archive.offset)
                if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise EOFError("no end mark where the members end")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(
            f"{path}: not a complete tar archive ({error}); copy or download it again"
        ) from error
    if not keys:
        raise DataError(f"{path}: no image with one of the suffixes {', '.join(IMAGE_SUFFIXES)}")
    return Shard(path, len(keys), frozenset(classes), frozenset(labels), counted=True)


def _taken_apart(name: str) -> tuple[str, str]:
    """Key and suffix of a member, as webdataset sees them: the suffix begins at the first dot."""
    folder, slash, leaf = name.rpartition("/")
    stem, _, suffix = leaf.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def class_of(key: str) -> str:
    """The class in a sample's key: its folder, or what is before the underscore, as ImageNet has.

    ``train/n01440764/x`` and ``n01440764_10026`` are both of class ``n01440764``.
    """
    folder, _, leaf = key.rpartition("/")
    return folder.rpartition("/")[2] or leaf.partition("_")[0]


def _label(data: bytes, name: str) -> int:
    try:
        return int(data)
    except ValueError:
        raise DataError(f"{name}: expected a class number, got {data[:40]!r}") from None


def read_shard(shard: Shard) -> Iterator[EncodedSample]:
    """The images of a shard in their order, through webdataset.

    Raises:
        DataError: the shard is cut short, or holds another number of images than was counted.
    """
    try:
        from webdataset.tariterators import group_by_keys, tar_file_expander
    except ImportError as error:
        raise _missing_webdataset() from error
    wanted = (*_SUFFIXES, _LABEL)
    count = 0
    try:
        with shard.path.open("rb", buffering=1 << 20) as stream:
            files = tar_file_expander(
                [{"url": os.fspath(shard.path), "stream": stream}],
                select_files=lambda name: _taken_apart(name)[1] in wanted,
            )
            for sample in group_by_keys(files):
                data = next((sample[s] for s in _SUFFIXES if s in sample), None)
                if data is None:
                    continue
                count += 1
                label = sample.get(_LABEL)
                key = sample["__key__"]
                name = f"{shard.path}: {key}.{_LABEL}"
                yield EncodedSample(key, data, None if label is None else _label(label, name))
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{shard.path}: can't be read to its end ({error}); copy or download it again"
        ) from error
    if count != shard.images:
        raise DataError(
            f"{shard.path}: expected {shard.images} images, found {count}; copy the shard again, "
            f"or correct {_SIZES} beside it"
        )

"""Which folders of an image set are wrappers, which are splits, and which are classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["SPLIT_NAMES", "Layout", "is_hidden", "layout_of"]

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


class Layout(NamedTuple):
    """What the folders ``[wrapper/][split/]class/image`` of a set say.

    Attributes:
        kinds (list[tuple[str | None, str] | None]): split and class of every image; None for those
            of a split that is not sorted into classes.
        empty (list[str]): class folders without an image in any split, sorted.
        unsorted (list[str]): split folders that hold nothing but images.
    """

    kinds: list[tuple[str | None, str] | None]
    empty: list[str]
    unsorted: list[str]


def layout_of(source: str, names: Sequence[str], folders: Iterable[str]) -> Layout:
    """Tells wrapper, split and class folders apart.

    Args:
        source (str): the image set, for messages.
        names (Sequence[str]): paths of its images within it; not none.
        folders (Iterable[str]): paths of its folders likewise.

    Raises:
        DataError: an image lies where it could be of any class; the message names the first.
    """
    paths = [_parts(name) for name in names]
    depth = _depth_of_wrapper(paths)
    wrapper = paths[0][:depth]
    inner = [path[depth:] for path in paths]
    sorted_tops = {path[0] for path in inner if len(path) >= 3}
    splits = {top for top in sorted_tops if top.lower() in SPLIT_NAMES}
    unsorted = sorted({path[0] for path in inner if len(path) == 2} - sorted_tops) if splits else []
    unsorted = [top for top in unsorted if top.lower() in SPLIT_NAMES]
    if all(path[0].lower() in SPLIT_NAMES for path in inner) and not splits:
        raise DataError(
            f"{source}: {inner[0][0]}/ holds images in no class folder, {names[0]} for one; sort "
            "them into one folder a class"
        )
    kinds: list[tuple[str | None, str] | None] = []
    for name, path in zip(names, inner, strict=True):
        if len(path) == 2 and path[0] in unsorted:
            kinds.append(None)
        elif len(path) >= 2 and not splits:
            kinds.append((None, path[0]))
        elif len(path) >= 3 and path[0] in splits:
            kinds.append((SPLIT_NAMES[path[0].lower()], path[1]))
        else:
            among = f" of {', '.join(sorted(splits))}" if splits else ""
            raise DataError(
                f"{source}: {name} lies in no class folder{among}; expected [split/]class/image: "
                "take it out, or give a folder that holds the classes alone"
            )
    classes = {kind[1] for kind in kinds if kind is not None}
    level = depth + bool(splits)
    found = {
        parts[level]
        for parts in map(_parts, folders)
        if len(parts) > level
        and parts[:depth] == wrapper
        and (not splits or parts[depth].lower() in SPLIT_NAMES)
    }
    return Layout(kinds, sorted(found - classes), unsorted)


def is_hidden(name: str) -> bool:
    """Whether a file or folder, or one that it lies in, is one that listings leave out."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _parts(name: str) -> list[str]:
    return [part for part in name.split("/") if part not in ("", ".")]


def _depth_of_wrapper(paths: Sequence[list[str]]) -> int:
    """How many folders lie around everything, and are neither split nor class."""
    depth = 0
    while True:
        inner = [path[depth:] for path in paths]
        tops = {path[0] for path in inner}
        if len(tops) > 1 or tops.pop().lower() in SPLIT_NAMES:
            return depth
        around_splits = any(len(path) >= 4 and path[1].lower() in SPLIT_NAMES for path in inner)
        if not around_splits and any(len(path) < 3 for path in inner):
            return depth
        depth += 1

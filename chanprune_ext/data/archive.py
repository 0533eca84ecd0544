"""Class-per-folder image sets, read from a directory or straight out of a tar archive.

An archive is never unpacked into the user's folders. Its members are listed once; an image is then
one positioned read. A compressed archive is first inflated into an unnamed-to-the-user temporary
file that disappears with the object.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import tarfile
import tempfile
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np

from ..errors import DataError
from .decoding import decoded
from .layout import is_hidden, layout_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ImageArchive", "ImageEntries", "ImageEntry", "decode", "is_archive"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff")
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def is_archive(path: Path) -> bool:
    """Whether the file name is that of a tar archive this module reads."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


@dataclass(frozen=True)
class ImageEntry:
    """One image: its name for messages, its split (None without split folders) and its class."""

    name: str
    split: str | None
    class_name: str


class ImageEntries(Sequence[ImageEntry]):
    """The images of a set, kept as arrays.

    A list of a million objects would be copied into every data-loader worker, page by page, as
    its reference counts change; arrays stay shared.

    Attributes:
        kinds (list[tuple[str | None, str]]): every pair of split and class that occurs.
        kind_of (ndarray[N]): which of them an image is of.

    Args:
        names (Sequence[str]): of the images.
        kinds (Sequence[tuple[str | None, str]]): split and class of each.
    """

    def __init__(self, names: Sequence[str], kinds: Sequence[tuple[str | None, str]]) -> None:
        self.kinds = list(dict.fromkeys(kinds))
        number = {kind: k for k, kind in enumerate(self.kinds)}
        self.kind_of = np.array([number[kind] for kind in kinds], np.int64)
        self._names = np.array([os.fsencode(name) for name in names], np.bytes_)

    def __len__(self) -> int:
        return len(self.kind_of)

    def name(self, index: int) -> str:
        """Path of one image within the set."""
        return os.fsdecode(self._names[index].tobytes().rstrip(b"\0"))

    @overload
    def __getitem__(self, index: int) -> ImageEntry: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageEntry]: ...
    def __getitem__(self, index: int | slice) -> ImageEntry | list[ImageEntry]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return ImageEntry(self.name(index), *self.kinds[self.kind_of[index]])


class ImageArchive:
    """Index of an image set laid out as ``[wrapper/][split/]class/image``.

    Hidden files and folders, whose names begin with a dot, are left out.

    Attributes:
        entries (ImageEntries): the images.
        empty_classes (list[str]): class folders that hold no image in any split.
        unsorted (list[str]): split folders whose images are in no class folder; left out.

    Args:
        path (Path): directory or tar archive (plain, gzip, bzip2 or xz).

    Raises:
        DataError: the file is missing, truncated or no tar archive, holds no image in a class
            folder, or one whose class can't be told.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            names, folders = _found_below(path)
            self._blob: Path | None = None
            self._spans = np.empty((len(names), 0), np.int64)
        else:
            names, folders = self._index_tar()
        self._fd: tuple[int, int] | None = None
        if not any("/" in name.removeprefix("./") for name in names):
            raise DataError(
                f"{path}: no image found in a class folder; expected [split/]class/image with one "
                f"of the suffixes {', '.join(IMAGE_SUFFIXES)}"
            )
        kinds, self.empty_classes, self.unsorted = layout_of(str(path), names, folders)
        known = [(name, kind) for name, kind in zip(names, kinds, strict=True) if kind is not None]
        self._spans = self._spans[[kind is not None for kind in kinds]]
        self.entries = ImageEntries([name for name, _ in known], [kind for _, kind in known])

    def _index_tar(self) -> tuple[list[str], list[str]]:
        try:
            self._blob = self._inflated() if self.path.suffix.lower() != ".tar" else self.path
            with tarfile.open(self._blob, "r:") as archive:
                members = [member for member in archive if not is_hidden(member.name)]
                folders = [member.name for member in members if member.isdir()]
                found = sorted(
                    (member.name, member.offset_data, member.size)
                    for member in members
                    if member.isreg() and not member.issparse() and _is_image(member.name)
                )
                with self._blob.open("rb") as file:
                    # tarfile takes a header that is cut short for the end of the archive
                    file.seek(archive.offset)
                    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                        raise EOFError("no end mark where the members end")
        except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            raise DataError(
                f"{self.path}: not a complete tar archive ({error}); copy or download it again"
            ) from error
        spans = [(offset, size) for _, offset, size in found]
        self._spans = np.array(spans, np.int64).reshape(-1, 2)
        return [name for name, _, _ in found], folders

    def _inflated(self) -> Path:
        """Decompresses the archive into a temporary file that lives as long as this object."""
        handle, name = tempfile.mkstemp(prefix="chanprune-", suffix=".tar")
        weakref.finalize(self, _remove_file, name, os.getpid())
        with os.fdopen(handle, "wb") as target, _opened(self.path) as source:
            shutil.copyfileobj(source, target, 1 << 20)
        return Path(name)

    def read(self, index: int) -> bytes:
        """The encoded bytes of image ``index`` (position in :attr:`entries`).

        Raises:
            DataError: the image has vanished or can't be read.
        """
        name = self.entries.name(index)
        try:
            if self._blob is None:
                return (self.path / name).read_bytes()
            offset, size = self._spans[index].tolist()
            data = os.pread(self._descriptor(self._blob), size, offset)
        except OSError as error:
            raise DataError(f"{self.path}: can't read {name}: {error}") from error
        if len(data) != size:
            raise DataError(f"{self.path}: {name} is cut short; copy the file again")
        return data

    def _descriptor(self, blob: Path) -> int:
        # One descriptor a process: data-loader workers inherit or unpickle this object.
        if self._fd is None or self._fd[0] != os.getpid():
            descriptor = os.open(blob, os.O_RDONLY)
            weakref.finalize(self, _close_file, descriptor, os.getpid())
            self._fd = (os.getpid(), descriptor)
        return self._fd[1]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_fd": None}

    @property
    def splits(self) -> set[str]:
        """Names of the split folders, out of ``train``, ``val`` and ``test``; empty if none."""
        return {split for split, _ in self.entries.kinds if split is not None}


def _opened(path: Path) -> bz2.BZ2File | gzip.GzipFile | lzma.LZMAFile:
    suffix = path.suffix.lower()
    if suffix == ".bz2":
        return bz2.BZ2File(path)
    return lzma.LZMAFile(path) if suffix == ".xz" else gzip.GzipFile(path)


def _remove_file(name: str, owner: int) -> None:
    if os.getpid() == owner:
        Path(name).unlink(missing_ok=True)


def _close_file(descriptor: int, owner: int) -> None:
    if os.getpid() == owner:
        os.close(descriptor)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _found_below(top: Path) -> tuple[list[str], list[str]]:
    """Paths of all images, sorted, and of all folders, relative to ``top``; links are followed."""
    names, folders = [], []
    around: dict[str, frozenset[str]] = {str(top): frozenset()}
    for root, inner, files in os.walk(str(top), followlinks=True):
        place, outer = os.path.realpath(root), around.pop(root)
        if place in outer:  # a link back to where it is in
            inner.clear()
            continue
        inner[:] = [name for name in inner if not is_hidden(name)]
        around.update({f"{root.rstrip('/')}/{name}": outer | {place} for name in inner})
        below = os.path.relpath(root, top)
        folders.append(below)
        names += [f"{below}/{file}" for file in files if _is_image(file) and not is_hidden(file)]
    return sorted(name.removeprefix("./") for name in names), folders


def decode(archive: ImageArchive, position: int) -> Tensor:
    """The image at that position of :attr:`ImageArchive.entries`, uint8 RGB ``[3, H, W]``.

    Raises:
        DataError: the bytes are no complete image.
    """
    name = f"{archive.path}: {archive.entries.name(position)}"
    return decoded(archive.read(position), name)

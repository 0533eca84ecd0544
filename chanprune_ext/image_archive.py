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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DataError
from .image_decoding import decoded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["ImageArchive", "ImageEntry", "decode", "is_archive"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff")
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


def is_archive(path: Path) -> bool:
    """Whether the file name is that of a tar archive this module reads."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


@dataclass(frozen=True)
class ImageEntry:
    """One image: its name for messages, its split (None without split folders) and its class."""

    name: str
    split: str | None
    class_name: str


class ImageArchive:
    """Index of an image set laid out as ``[wrapper/][split/]class/image``.

    Args:
        path (Path): directory or tar archive (plain, gzip, bzip2 or xz).

    Raises:
        DataError: the file is missing, truncated or no tar archive, or holds no image in a class
            folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            names = sorted(
                str(file.relative_to(path))
                for file in path.rglob("*")
                if _is_image(file.name) and file.is_file()
            )
            self._blob: Path | None = None
            self._spans: list[tuple[int, int]] = []
        else:
            names = self._index_tar()
        self._fd: tuple[int, int] | None = None
        self._names = names
        self.entries: list[ImageEntry] = _entries(names)
        if not self.entries:
            raise DataError(
                f"{path}: no image found in a class folder; expected [split/]class/image with one "
                f"of the suffixes {', '.join(IMAGE_SUFFIXES)}"
            )

    def _index_tar(self) -> list[str]:
        try:
            self._blob = self._inflated() if self.path.suffix.lower() != ".tar" else self.path
            with tarfile.open(self._blob, "r:") as archive:
                found = sorted(
                    (member.name, member.offset_data, member.size)
                    for member in archive
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
        self._spans = [(offset, size) for _, offset, size in found]
        return [name for name, _, _ in found]

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
        try:
            if self._blob is None:
                return (self.path / self._names[index]).read_bytes()
            offset, size = self._spans[index]
            data = os.pread(self._descriptor(self._blob), size, offset)
        except OSError as error:
            raise DataError(f"{self.path}: can't read {self._names[index]}: {error}") from error
        if len(data) != size:
            raise DataError(f"{self.path}: {self._names[index]} is cut short; copy the file again")
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
        return {entry.split for entry in self.entries if entry.split is not None}


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
    leaf = name.rsplit("/", 1)[-1]
    return leaf.lower().endswith(IMAGE_SUFFIXES) and not leaf.startswith(".")


def _entries(names: Sequence[str]) -> list[ImageEntry]:
    """Tells wrapper, split and class folders apart; [] when an image lies in no class folder."""
    split_paths = [[part for part in name.split("/") if part != "."] for name in names]
    if not split_paths:
        return []
    depth = 0
    while (
        all(len(parts) - depth >= 3 for parts in split_paths)
        and len({parts[depth] for parts in split_paths}) == 1
        and split_paths[0][depth] not in SPLIT_NAMES
    ):
        depth += 1
    has_splits = all(
        parts[depth] in SPLIT_NAMES and len(parts) - depth >= 3 for parts in split_paths
    )
    entries = []
    for name, parts in zip(names, split_paths, strict=True):
        split = SPLIT_NAMES[parts[depth]] if has_splits else None
        rest = parts[depth + has_splits :]
        if len(rest) < 2:
            return []
        entries.append(ImageEntry(name, split, rest[0]))
    return entries


def decode(archive: ImageArchive, position: int) -> Tensor:
    """The image at that position of :attr:`ImageArchive.entries`, uint8 RGB ``[3, H, W]``.

    Raises:
        DataError: the bytes are no complete image.
    """
    name = f"{archive.path}: {archive.entries[position].name}"
    return decoded(archive.read(position), name)

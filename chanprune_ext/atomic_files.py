"""Files that are written whole or not at all, and folders for them."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from chanprune_ext.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "check_writable",
    "is_special",
    "make_folder",
    "write_atomically",
    "write_text",
    "written_to",
]


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """Makes a folder for results, with its parents, where there is none.

    Raises:
        OutputError: It cannot be made, is a file, or nothing can be written there.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be made a folder ({error.strerror}); give another place"
        ) from error
    trial = _beside(path / "trial")
    try:
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise OutputError(
            f"{path}: no file can be made there ({error.strerror}); give another place"
        ) from error
    return path


def check_writable(path: str | os.PathLike[str]) -> None:
    """Makes the folder of a result, and sees that it can be written, before the work begins.

    Raises:
        OutputError: It can't.
    """
    target = written_to(path)
    _refuse_folder(target)
    if not is_special(target):
        make_folder(target.parent)


def written_to(path: str | os.PathLike[str]) -> Path:
    """The file that a name stands for: links stay, and what they lead to is written.

    A pipe or a device, for which there may be no name but the link, is as it was given.
    """
    path = Path(path)
    return path if is_special(path) else Path(os.path.realpath(path))


def is_special(path: Path) -> bool:
    """Whether a pipe or a device is there, which is written to and can't be replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise OutputError(f"{path}: can't be written, it is a folder; give a file name")


def _beside(path: Path) -> Path:
    """A new name for a temporary file in the same folder."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Lets ``write`` fill a temporary file beside ``path``, then puts it in its place.

    Args:
        path (str or PathLike): where the file shall be. Of a link, what it leads to is replaced; a
            pipe or a device is written to directly.
        write (Callable): receives the name of an empty file and writes the content into it.

    Raises:
        OutputError: it can't be written, for example because the disk is full. The temporary file
            is gone and a file that was there before is as it was.
    """
    target = written_to(path)
    _refuse_folder(target)
    try:
        if is_special(target):
            write(target)
        else:
            _replace(target, write)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{path}: can't be written ({error}); check that the folder exists, may be written to "
            "and has room"
        ) from error


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    temporary = _beside(path)
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)  # the writer may have put a file of its own there, closed to others
        temporary.replace(path)
    finally:
        with suppress(OSError):  # nothing to remove where not even the folder exists
            temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all.

    Raises:
        OutputError: as for :func:`write_atomically`.
    """

    def write(file: Path) -> None:
        file.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def _flush_folder(folder: Path) -> None:
    """Makes the new name survive a power cut, where the system lets a folder be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

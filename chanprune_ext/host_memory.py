"""The C library's memory, held on to while large tensors come and go."""

from __future__ import annotations

import ctypes
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["freed_memory_kept"]

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_KEEP_ALL = 2**31 - 1
# What glibc's own adjustment ends at in a process that has used large blocks, and its default.
_USUAL = (
    (_MMAP_THRESHOLD, 32 << 20),
    (_TRIM_THRESHOLD, 64 << 20),
    (_MMAP_MAX, 65536),
    (_ARENA_MAX, 0),
)

_lock = threading.Lock()
_inside: list[int] = []  # one entry a block that is open, by thread


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Freed blocks stay with the process until the end of the block, to be used again.

    glibc gives a freed block of more than 32 MB back to the system at once, and gets pages anew for
    the next: each is faulted in and zeroed. A network run again and again on large batches can
    spend more time on that than on arithmetic (MobileNetV2's compensation: two thirds). What was
    kept is given back in the end. Nests. Does nothing where the C library is another one.

    Threads started inside share one heap; glibc may go on sharing it among threads started later.
    """
    library = _glibc()
    if library is None:
        yield
        return
    _enter(library)
    try:
        yield
    finally:
        _leave(library)


def _enter(library: Any) -> None:
    with _lock:
        _inside.append(threading.get_ident())
        if len(_inside) == 1:
            library.mallopt(_MMAP_MAX, 0)
            library.mallopt(_TRIM_THRESHOLD, _KEEP_ALL)
            # Threads' own heaps are given back as soon as they are empty, whatever the threshold.
            library.mallopt(_ARENA_MAX, 1)


def _leave(library: Any) -> None:
    with _lock:
        _inside.remove(threading.get_ident())
        if not _inside:
            for parameter, value in _USUAL:
                library.mallopt(parameter, value)
            library.malloc_trim(0)


def _glibc() -> Any:
    """The C library, if it is glibc."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    names = ("gnu_get_libc_version", "mallopt", "malloc_trim")
    return library if all(hasattr(library, name) for name in names) else None

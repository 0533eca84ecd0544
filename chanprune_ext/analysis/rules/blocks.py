"""Which dimensions of a reshape belong together, and which channels of a strided slice."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["blocks", "one_of_each_run"]


def blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Cut both shapes of a reshape into the smallest runs of dimensions with equal products."""
    i = j = 0
    while i < len(old) or j < len(new):
        first, start = i, j
        left = old[i] if i < len(old) else 1
        right = new[j] if j < len(new) else 1
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while left != right:
            if left < right:
                left *= old[i]
                i += 1
            else:
                right *= new[j]
                j += 1
        yield slice(first, i), slice(start, j)


def one_of_each_run(n: int, taken: slice) -> bool:
    """Whether a slice of ``n`` channels cuts them into runs of its step and takes one of each."""
    first, last, step = taken.indices(n)
    return 0 <= first < step and last == n and n % step == 0

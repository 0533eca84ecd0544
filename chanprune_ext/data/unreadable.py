"""Images that can't be read: left out, counted, named at the end of the pass, too many an error."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from ..errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["MOST_UNREADABLE", "UnreadableImages", "UnreadableImagesWarning", "watched"]

MOST_UNREADABLE = 0.01  # share of an epoch's images
_MOST_NAMED = 20


class UnreadableImagesWarning(UserWarning):
    """Some images of the pass that has just ended could not be read and were left out."""


class UnreadableImages:
    """The tally of one image set, kept in memory that data-loader workers share.

    Args:
        source (str): the image set, for messages.
        total (int): images in it.
        explain (Callable): index of a marked image -> its name, and what is wrong with it.
    """

    def __init__(self, source: str, total: int, explain: Callable[[int], str]) -> None:
        self.source = source
        self._explain = explain
        # One byte an image: unlike a counter, nothing is lost when two processes write at once.
        self._marks = torch.zeros(total, dtype=torch.uint8, device="cpu")
        self._marks.share_memory_()  # type: ignore[no-untyped-call]

    def mark(self, index: int) -> None:
        """Notes that the image at ``index`` can't be read; from any process."""
        self._marks[index] = 1

    def __len__(self) -> int:
        return int(torch.count_nonzero(self._marks))

    def check(self) -> None:
        """Stops a run that has lost more than :data:`MOST_UNREADABLE` of its images.

        Raises:
            DataError: with the number of images and the first names.
        """
        count, total = len(self), self._share_of_this_process()
        if count > MOST_UNREADABLE * total:
            told = self._told()
            self._marks.zero_()
            raise DataError(
                f"{told}\nThat is more than {MOST_UNREADABLE:.0%} of the {total:,} images of an "
                "epoch: the run stops. Copy or download the files again, or take them out"
            )

    def finish(self) -> None:
        """Ends a pass: warns of what was left out, by name, and starts to count anew.

        Raises:
            DataError: it was too much, see :meth:`check`.
        """
        if not len(self):
            return
        self.check()
        warnings.warn(self._told(), UnreadableImagesWarning, stacklevel=2)
        self._marks.zero_()

    def _share_of_this_process(self) -> int:
        return len(self._marks) // _processes()

    def _told(self) -> str:
        found = self._marks.nonzero().flatten().tolist()
        names = [f"  {self._explain(index)}" for index in found[:_MOST_NAMED]]
        if len(found) > _MOST_NAMED:
            names.append(f"  and {len(found) - _MOST_NAMED:,} more")
        left_out = "image that can't be read was" if len(found) == 1 else "unreadable images were"
        return "\n".join([f"{self.source}: {len(found):,} {left_out} left out:", *names])


def watched(batches: Iterator[Any], unreadable: UnreadableImages | None) -> Iterator[Any]:
    """The batches of one pass, with an eye on what could not be read.

    Args:
        batches (Iterator): pairs of images and labels.
        unreadable (UnreadableImages, optional): of their image set; None lets everything through.

    Yields:
        Every batch that has an image in it.

    Raises:
        DataError: too many images could not be read.
    """
    for batch in batches:
        if unreadable is not None:
            unreadable.check()
            if len(batch[1]) == 0:
                _require_one_process()
                continue
        yield batch
    if unreadable is not None:
        unreadable.finish()


def _processes() -> int:
    group = torch.distributed
    return group.get_world_size() if group.is_available() and group.is_initialized() else 1


def _require_one_process() -> None:
    if _processes() > 1:
        raise DataError(
            "no image of a batch can be read, and the other processes would wait for this one; "
            "copy the files again, or raise the batch size"
        )

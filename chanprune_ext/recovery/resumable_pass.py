"""One pass after the other over the training batches, each of which can be gone on with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..data.loader import EpochSampler, ImageLoader
from ..data.sets import ImageDataset
from ..data.shards import ShardLoader
from ..data.unreadable import watched
from .random_state import generators_of, random_state, set_random_state

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor

__all__ = ["ResumablePass"]

_END = object()


class ResumablePass:
    """Hands out batches and remembers the random states it takes to get the same ones again.

    A pass goes on in the middle by being repeated: from the random state at its start, its first
    batches are fetched and thrown away. A loader may fetch the next batch before it hands out this
    one, with draws that come between those of the updates; hence the state before the last fetch is
    kept too. Where images depend on seed, epoch and position alone nothing is repeated.

    Attributes:
        moments (dict[str, dict[str, Tensor]]): the random states at the start of the pass and
            before the last fetch; only if they are kept.

    Args:
        loader (Iterable): as it is iterated over, perhaps wrapped by accelerate.
        source (Iterable): the same as it came.
        device (torch.device): whose generator is watched besides the CPU's.
        watch (bool): whether random states are kept.
        processes (int): how many processes take their batches from the source. Default: 1.
    """

    def __init__(
        self, loader: Any, source: Any, device: torch.device, watch: bool, processes: int = 1
    ) -> None:
        self.moments: dict[str, dict[str, Tensor]] = {}
        self._loader = loader
        self._source = source
        self._device = device
        self._watch = watch
        self._processes = processes
        self._generators = generators_of(source)
        self._resumed: dict[str, Tensor] | None = None

    def random_now(self) -> dict[str, Tensor]:
        """The random state at this moment."""
        return random_state(self._device, self._generators)

    def put_back(self, moments: dict[str, dict[str, Tensor]]) -> None:
        """Lets the coming pass go on where these random states were taken."""
        self._resumed = moments.pop("now")
        self.moments = moments

    def choose(self, epoch: int) -> None:
        """Prepares the order and the augmentation of epoch ``epoch``, counted from 1."""
        # accelerate counts the passes too, from 0, and has the last word where it splits batches
        prepared = getattr(self._loader, "_is_accelerate_prepared", False)
        counts = prepared and hasattr(self._loader, "iteration")
        if counts:
            self._loader.iteration = epoch - 1
        for part in ("sampler", "dataset"):
            choose = getattr(getattr(self._source, part, None), "set_epoch", None)
            if choose is not None:
                choose(epoch - 1 if counts else epoch)

    def batches(self, done: int) -> Iterator[Any]:
        """The batches of the pass after the first ``done``, which a resumed run has seen."""
        resumed, self._resumed = self._resumed, None
        if not done:
            if resumed is not None:
                self._set(resumed)
            if self._watch:
                self.moments["start"] = self.random_now()
            yield from self._watched(iter(self._loader))
            return
        assert resumed is not None, "a pass begins at its start unless it is resumed"
        if self._seeks():
            # Shards are divided among the processes, a loader deals its batches out to them.
            divided = isinstance(self._source, ShardLoader)
            self._source.seek(done if divided else done * self._processes)
            iterator = iter(self._loader)
            batch = next(iterator, _END)  # the loader itself draws a seed here
            self._set(resumed)
            if batch is _END:
                return
            yield batch
        else:
            self._set(self.moments["start"])
            iterator = iter(self._loader)
            for _ in range(done - 1):
                next(iterator)
            self._set(self.moments["fetch"])
            next(iterator)
            self._set(resumed)
        yield from self._watched(iterator)

    def _watched(self, iterator: Iterator[Any]) -> Iterator[Any]:
        # accelerate makes a data loader of its own, which does not tell of unreadable images
        dataset = getattr(self._source, "dataset", None)
        iterator = watched(iterator, getattr(dataset, "unreadable", None))
        while True:
            if self._watch:
                self.moments["fetch"] = self.random_now()
            batch = next(iterator, _END)
            if batch is _END:
                return
            yield batch

    def _seeks(self) -> bool:
        """Whether the loader can begin in the middle: made here, of images of our own."""
        if isinstance(self._source, ShardLoader):
            return True
        if not isinstance(self._source, ImageLoader):
            return False
        dataset = getattr(self._source.dataset, "dataset", self._source.dataset)
        own = isinstance(dataset, ImageDataset)
        return own and isinstance(self._source.sampler, EpochSampler)

    def _set(self, state: dict[str, Tensor]) -> None:
        set_random_state(state, self._device, self._generators)

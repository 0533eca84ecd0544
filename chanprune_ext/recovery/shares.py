"""Which batches are whose, where several processes train one network."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from ..data.loader import ImageLoader
from ..data.shards import ShardLoader
from ..errors import DataError, InvalidArgumentError
from .evaluation import SpareBatch, validation_loader

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from accelerate import Accelerator

    from .processes import Processes

__all__ = ["OwnShare", "images_a_batch", "in_step", "training_share", "validation_share"]


class OwnShare:
    """Batches that each process brings itself, with a look at whether they are different ones.

    Args:
        batches (Iterable): what this process has.
        name (str): the argument they came in.
        processes (Processes): all of them.
    """

    def __init__(self, batches: Iterable[Any], name: str, processes: Processes) -> None:
        self._batches = batches
        self._name = name
        self._processes = processes
        self._checksum: int | None = None
        self._checked = False

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            if self._checksum is None:
                self._checksum = _checksum(batch)
            yield batch

    def check(self) -> None:
        """Raises DataError if all processes began with the same batch. Called by all of them."""
        if self._checked:
            return
        self._checked = True
        found = self._processes.gathered(self._checksum)
        if len(set(found)) == 1 and found[0] is not None:
            raise DataError(
                f"{self._name}: all {len(found)} processes got the same first batch; batches that "
                "come neither from a dataset nor from a DataLoader over one are not split here: "
                "let each process make its own (webdataset: nodesplitter=split_by_node)"
            )


def training_share(
    loader: Any, accelerator: Accelerator, processes: Processes
) -> tuple[Any, OwnShare | None]:
    """The batches that this process trains on; as many as every other one does.

    - A ``DataLoader`` over a dataset is split by accelerate: of ``n`` processes, process ``i``
      takes batches ``i, i + n, ...``. Images from the start of the pass fill the last ones up,
      unless the loader drops what is not full. What accelerate makes of it is a loader of its own;
      one that iterates in its own way is left alone in a single process, and refused in several.
    - One with a ``DistributedSampler`` is split already and left alone.
    - A list of batches is split likewise.
    - Anything else is taken as this process's own share; shards are divided by their own loader.

    Returns:
        tuple: the batches, and the same where they are the process's own share.

    Raises:
        InvalidArgumentError: a ``DistributedSampler`` of other processes, or not all processes have
            as many batches, or the loader can't be split.
    """
    if processes.number == 1:
        return loader if _iterates_itself(loader) else accelerator.prepare(loader), None
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        sampler = loader.sampler
        if not isinstance(sampler, DistributedSampler):
            _require_plain(loader, "train", "give it a DistributedSampler")
            return accelerator.prepare(loader), None
        if (sampler.num_replicas, sampler.rank) != (processes.number, processes.index):
            raise InvalidArgumentError(
                f"train: its DistributedSampler is that of process {sampler.rank} of "
                f"{sampler.num_replicas}, this is process {processes.index} of {processes.number}; "
                "leave the sampler out, recovery splits the batches itself"
            )
        return loader, None
    if isinstance(loader, list | tuple):
        each = -(-len(loader) // processes.number)
        places = (processes.index + processes.number * k for k in range(each))
        return [loader[place % len(loader)] for place in places], None
    lengths = processes.gathered(len(loader))
    if len(set(lengths)) > 1:
        raise InvalidArgumentError(
            f"train: expected as many batches in all processes, got {lengths}; they wait for each "
            "other after every batch"
        )
    own = OwnShare(loader, "train", processes)
    return own, own


def validation_share(val: Any, processes: Processes, workers: int) -> Any:
    """The validation batches that this process measures; no image is measured twice.

    Datasets, ``DataLoader`` over them and lists are split batch by batch, whatever order the first
    process finds in them. Anything else is taken as this process's own share.

    Raises:
        InvalidArgumentError: a ``DistributedSampler``, which repeats images, or a ``DataLoader``
            that iterates in its own way.
    """
    loads = isinstance(val, DataLoader)
    if isinstance(val, Dataset) and not loads:
        size = min(256, max(1, -(-len(val) // processes.number)))  # type: ignore[arg-type]
        val, loads = validation_loader(val, size, workers), True
    if processes.number == 1 or val is None:
        return val
    if isinstance(val, ShardLoader):  # divides its images itself
        val = copy.copy(val)
        val.divided = True
        return val
    if isinstance(val, list | tuple):
        return val[processes.index :: processes.number]
    if not loads or isinstance(val.dataset, IterableDataset) or val.batch_sampler is None:
        return OwnShare(val, "val", processes)
    if isinstance(val.sampler, DistributedSampler):
        raise InvalidArgumentError(
            "val: has a DistributedSampler, which repeats images to give all processes as many; "
            "leave it out, recovery splits the batches itself and measures every image once"
        )
    _require_plain(val, "val", "pass a list of its batches")
    order = processes.told(list(val.batch_sampler) if processes.first else [])
    return ImageLoader(
        val.dataset,
        batch_sampler=list(islice(order, processes.index, None, processes.number)),
        num_workers=val.num_workers,
        collate_fn=val.collate_fn,
        pin_memory=val.pin_memory,
        worker_init_fn=val.worker_init_fn,
    )


def _iterates_itself(loader: Any) -> bool:
    """Whether a ``DataLoader`` is more than its dataset, sampler and settings make of it."""
    # One that the caller has had prepared by accelerate is taken as it is there as well.
    if not isinstance(loader, DataLoader) or getattr(loader, "_is_accelerate_prepared", False):
        return False
    kind = type(loader)
    ours = (DataLoader.__iter__, ImageLoader.__iter__)
    return kind.__iter__ not in ours or kind.__len__ is not DataLoader.__len__


def _require_plain(loader: Any, name: str, instead: str) -> None:
    """Raises InvalidArgumentError where a loader made of this one's parts would do otherwise."""
    if _iterates_itself(loader):
        raise InvalidArgumentError(
            f"{name}: expected a DataLoader that iterates as torch's does, to split its batches "
            f"over the processes, got a {type(loader).__name__} with an __iter__ or __len__ of its "
            "own, which would not be called; do in the dataset or in collate_fn what it does, or "
            f"{instead}"
        )


def in_step(batches: Iterable[Any], processes: Processes) -> Iterator[Any]:
    """As many batches in every process: those that have fewer go on with spare ones.

    A network that is divided over the processes runs in all of them or in none.
    """
    left, spare = iter(batches), None
    while True:
        batch = next(left, None)
        having = processes.gathered(batch is not None)
        if not any(having):
            return
        if spare is None:
            spare = batch
            if not all(having):  # some have none at all, and take one of another process
                found = processes.gathered(batch)
                spare = next(other for other in found if other is not None)
        yield SpareBatch(spare) if batch is None else batch


def images_a_batch(loader: Any) -> int | None:
    """How many images a loader gives at once, where it says so."""
    size = getattr(loader, "batch_size", None)
    if size is None:
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def _checksum(batch: Any) -> int:
    """Of the first tensor in a batch."""
    while not isinstance(batch, Tensor):
        if isinstance(batch, Mapping):
            batch = list(batch.values())
        if not isinstance(batch, list | tuple) or not batch:
            return 0
        batch = batch[0]
    return zlib.crc32(str(batch.flatten()[:4096].tolist()).encode())

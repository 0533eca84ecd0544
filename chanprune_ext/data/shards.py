"""Images read one after the other from tar shards: for data that no disk can jump about in.

In every epoch the shards are put into a new order and laid end to end; that line is divided among
the processes of a distributed run, and each part among its data-loader workers. A shard on a border
is read by both sides, each taking its own images, so every image comes exactly once whatever the
number of shards. A reader shuffles within a buffer of encoded images.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from itertools import accumulate, groupby, islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..errors import DataError
from ..seeds import generator_of, mixed
from .class_names import ClassFile, class_names, read_class_file
from .decoding import decoded
from .files import EncodedImages, collated
from .shard_files import class_of, read_shard
from .unreadable import watched

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .shard_files import EncodedSample, Shard
    from .transforms import Augmentation, Preset

__all__ = ["SHUFFLE_BUFFER", "ShardLoader", "ShardedImages"]

SHUFFLE_BUFFER = 1000  # encoded images that each reader holds; about 110 MB of ImageNet


class ShardedImages(EncodedImages, IterableDataset[tuple[Tensor, int]]):
    """The images of several tar files, in their order.

    A plain ``DataLoader`` reads them too, but :func:`chanprune_ext.data.make_loader` shuffles,
    divides them among processes, and goes on in the middle.

    Args:
        shards (Sequence[Shard]): the tar files.
        class_file (str or PathLike, optional): as for :func:`chanprune_ext.data.open_dataset`.
        preset (Preset): size of the images handed out, and their normalisation.
        augment (bool or Augmentation): whether to augment, and how. Default: False.
        seed (int): seed of the augmentation. Default: 0.

    Raises:
        DataError: a class is not in the class file, or there is none and the classes are unknown.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        class_file: ClassFile | None,
        preset: Preset,
        augment: bool | Augmentation = False,
        seed: int = 0,
    ) -> None:
        self.shards = list(shards)
        self._ends = list(accumulate(shard.images for shard in shards))
        source = str(shards[0].path) if len(shards) == 1 else f"{len(shards)} shards in "
        source += "" if len(shards) == 1 else str(shards[0].path.parent)
        names = _names(source, shards, class_file)
        self._rank = {name: label for label, name in enumerate(names)}
        super().__init__(source, self._ends[-1], names, preset, augment, seed)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        first, last = (len(self) * k // workers for k in (worker, worker + 1))
        for position, sample in self.samples(range(len(self.shards)), first, last):
            pixels = self.pixels(position, sample)
            if pixels is not None:
                yield self.view(pixels, position), self.label(position, sample)

    def samples(
        self, order: Sequence[int], first: int, last: int
    ) -> Iterator[tuple[int, EncodedSample]]:
        """Images ``first`` to ``last`` (exclusive) of the line of all shards in this order.

        Yields:
            tuple: position in the set, whatever the order, and the encoded image.
        """
        begin = 0
        for number in order:
            shard = self.shards[number]
            end = begin + shard.images
            if begin < last and first < end:
                base = self._ends[number] - shard.images
                low, high = max(first - begin, 0), min(last - begin, shard.images)
                # to the very end where it is ours, to find out whether the shard is whole
                stop = None if high == shard.images else high
                for inside, sample in islice(enumerate(read_shard(shard)), low, stop):
                    yield base + inside, sample
            begin = end

    def pixels(self, position: int, sample: EncodedSample) -> Tensor | None:
        """One decoded image, or None where it can't be read, which is counted."""
        try:
            return decoded(sample.data, sample.key)
        except DataError:
            self.unreadable.mark(position)
            return None

    def explain(self, index: int) -> str:
        """Shard and key of an image that could not be read, and what is wrong with it."""
        number = bisect_right(self._ends, index)
        shard = self.shards[number]
        inside = index - (self._ends[number] - shard.images)
        sample = next(islice(read_shard(shard), inside, None))
        try:
            decoded(sample.data, sample.key)
        except DataError as error:
            return f"{shard.path.name}: {error}"
        return f"{shard.path.name}: {sample.key} could not be read then, and can now"

    def label(self, position: int, sample: EncodedSample) -> int:
        """The label of one image.

        Raises:
            DataError: it is none of the classes.
        """
        if sample.label is not None:
            label = sample.label
        else:
            label = self._rank.get(class_of(sample.key), -1)
        if 0 <= label < len(self.class_names):
            return label
        shard = self.shards[bisect_right(self._ends, position)]
        found = class_of(sample.key) if sample.label is None else f"number {label}"
        raise DataError(
            f"{shard.path}: the class {found} of {sample.key} is not among the "
            f"{len(self.class_names)} classes; give the class file that belongs to these shards"
        )


def _names(source: str, shards: Sequence[Shard], class_file: ClassFile | None) -> tuple[str, ...]:
    counted = all(shard.counted for shard in shards)
    if not counted:
        if class_file is None:
            raise DataError(
                f"{source}: sizes.json says how many images there are, but not of which classes; "
                "give a class file ('imagenet' for its thousand)"
            )
        return read_class_file(class_file)
    labels: frozenset[int] = frozenset().union(*(shard.labels for shard in shards))
    if not labels:
        folders = frozenset().union(*(shard.classes for shard in shards))
        return class_names(source, folders, class_file)
    if class_file is None:
        names = tuple(str(label) for label in range(max(labels) + 1))
    else:
        names = read_class_file(class_file)
    if min(labels) < 0 or max(labels) >= len(names):
        raise DataError(
            f"{source}: classes are numbered {min(labels)} to {max(labels)}, expected 0 to "
            f"{len(names) - 1}; give the class file that belongs to these shards"
        )
    return names


class ShardLoader:
    """Batches of :class:`ShardedImages`; what ``DataLoader`` is for images in files.

    Attributes:
        dataset (ShardedImages): whose ``set_epoch`` chooses the order of the coming pass.
        batch_size (int): images a batch; one that holds an unreadable image is smaller.

    Args:
        dataset (ShardedImages): the images.
        batch_size (int): images a batch, of this process.
        shuffle (bool): a new order in every epoch. Default: False.
        drop_last (bool): leave out a last batch that is not full; every process of a distributed
            run then makes the same number of batches. Default: False.
        seed (int): seed of the order. Default: 0.
        workers (int): processes that read and decode; 0 does it in this one. Default: 0.
        divided (bool, optional): whether each process of a distributed run reads its part only.
            Default: if shuffled, as for training.
        buffer (int): encoded images that each reader shuffles within. Default: 1000.
    """

    def __init__(
        self,
        dataset: ShardedImages,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        workers: int = 0,
        divided: bool | None = None,
        buffer: int = SHUFFLE_BUFFER,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.num_workers = workers
        self.divided = shuffle if divided is None else divided
        self.buffer = buffer
        self._start = 0

    def seek(self, batches: int) -> None:
        """Lets the coming pass begin after so many batches, those after it at their start.

        The images before are read but not decoded. With another number of workers or processes
        than before the batches are others.
        """
        self._start = batches

    def __len__(self) -> int:
        return len(self._sizes(*self._place()))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start, self._start = self._start, 0
        rank, world = self._place()
        sizes = [self._sizes(r, world) for r in range(world)]
        if not sizes[rank]:
            raise DataError(
                f"{self.dataset.unreadable.source}: {len(self.dataset):,} images make no batch of "
                f"{self.batch_size} for each of {world} processes; lower the batch size"
            )
        stream = _Batches(self, sizes, rank, start)
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
        return watched(iter(loader), self.dataset.unreadable)

    def _place(self) -> tuple[int, int]:
        """Number of this process and of all processes among which the images are divided."""
        group = torch.distributed
        if self.divided and group.is_available() and group.is_initialized():
            return group.get_rank(), group.get_world_size()
        return 0, 1

    def _sizes(self, rank: int, world: int) -> list[int]:
        """Images of every batch of one process."""
        total, size = len(self.dataset), self.batch_size
        if self.drop_last:
            return [size] * (total // world // size)
        own = total * (rank + 1) // world - total * rank // world
        return [min(size, own - begin) for begin in range(0, own, size)]


class _Batches(IterableDataset[tuple[Tensor, Tensor]]):
    """The part of one worker: every ``workers``-th batch, out of a stretch of its own."""

    def __init__(
        self, loader: ShardLoader, sizes: Sequence[Sequence[int]], rank: int, start: int
    ) -> None:
        self.loader = loader
        self.sizes = sizes
        self.rank = rank
        self.start = start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # The data loader asks worker 0 first, so that one makes the first batch still to come.
        lane = (worker + self.start) % workers
        done = len(range(lane, self.start, workers))
        data = self.loader.dataset
        repeats = data.repeats
        sizes = self.sizes[self.rank][lane::workers]
        first = sum(
            -(-sum(batches[k::workers]) // repeats)
            for r, batches in enumerate(self.sizes[: self.rank + 1])
            for k in range(workers if r < self.rank else lane)
        )
        needed = -(-sum(sizes) // repeats)
        samples = self._repeated(self._ordered(first, first + needed, lane), repeats)
        for number, size in enumerate(sizes):
            chosen = list(islice(samples, size))
            if number < done:
                continue
            yield self._batch(chosen)

    def _ordered(self, first: int, last: int, lane: int) -> Iterator[tuple[int, EncodedSample]]:
        """The encoded images of a stretch, from one shuffled shard after the other."""
        loader, data = self.loader, self.loader.dataset
        if not loader.shuffle:
            return data.samples(range(len(data.shards)), first, last)
        generator = generator_of(loader.seed, data.epoch, 0)
        order = torch.randperm(len(data.shards), generator=generator, device="cpu").tolist()
        # Rounding up for repeated images may lead past the end; the line goes round.
        samples = data.samples(order * 2, first, last)
        from webdataset.filters import shuffle

        drawn = random.Random(mixed(loader.seed, data.epoch, 5, self.rank, lane))
        return iter(shuffle(loader.buffer, initial=loader.buffer, rng=drawn)(samples))

    @staticmethod
    def _repeated(
        samples: Iterator[tuple[int, EncodedSample]], repeats: int
    ) -> Iterator[tuple[int, EncodedSample, int]]:
        for position, sample in samples:
            for repeat in range(repeats):
                yield position, sample, repeat

    def _batch(self, chosen: Sequence[tuple[int, EncodedSample, int]]) -> tuple[Tensor, Tensor]:
        data = self.loader.dataset
        found = []
        for (position, _), again in groupby(chosen, key=lambda one: one[:2]):
            samples = list(again)
            pixels = data.pixels(position, samples[0][1])
            if pixels is not None:
                label = data.label(position, samples[0][1])
                found += [(data.view(pixels, position, repeat), label) for *_, repeat in samples]
        return collated(found)

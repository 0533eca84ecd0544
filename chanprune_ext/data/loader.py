"""Batches of an image set, shuffled in every epoch; and calibration batches drawn from one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import DataError, InvalidArgumentError
from ..seeds import generator_of
from .files import EncodedImages, FileImages, collated
from .sets import ImageDataset, TensorImages, require_positive
from .shards import ShardedImages, ShardLoader
from .unreadable import watched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .sets import Index

__all__ = ["EpochSampler", "ImageLoader", "calibration_batches", "make_loader"]


class _WholeBatches(Dataset[Any]):
    """Lets a data loader ask a :class:`TensorImages` for all images of a batch in one call."""

    def __init__(self, dataset: TensorImages) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[Index]) -> tuple[Tensor, Tensor]:
        return self.dataset.batch(indices)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)


class EpochSampler(Sampler[Any]):
    """Every index once, in an order that depends on the seed and the epoch alone.

    With repeated augmentation an epoch is as long, but holds so many times fewer images, each of
    them so often in a row, as a pair of its index and the number of the repetition.

    Attributes:
        start (int): where in that order the next pass begins, to go on in the middle of one; the
            passes after it begin at 0.

    Args:
        length (int): number of images.
        seed (int): seed of the order.
        repeats (int): how often each image of an epoch comes. Default: 1.
    """

    def __init__(self, length: int, seed: int, repeats: int = 1) -> None:
        self.length = length
        self.seed = seed
        self.repeats = repeats
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the coming pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Index]:
        order = torch.randperm(
            self.length, generator=generator_of(self.seed, self.epoch, 0), device="cpu"
        )
        start, self.start = self.start, 0
        if self.repeats == 1:
            return iter(order.tolist()[start:])
        chosen = order[: -(-self.length // self.repeats)].tolist()
        pairs = [(index, repeat) for index in chosen for repeat in range(self.repeats)]
        return iter(pairs[start : self.length])


class ImageLoader(DataLoader[Any]):
    """A ``DataLoader`` that tells at the end of a pass which images could not be read."""

    def __iter__(self) -> Any:
        return watched(super().__iter__(), getattr(self.dataset, "unreadable", None))

    def seek(self, batches: int) -> None:
        """Lets the coming pass begin after so many batches, those after it at their start."""
        assert isinstance(self.sampler, EpochSampler), "only a shuffled loader is gone on with"
        assert self.batch_size is not None, "make_loader gives one"
        self.sampler.start = batches * self.batch_size


def make_loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    shuffle: bool = False,
    drop_last: bool = False,
    seed: int = 0,
    workers: int = 0,
) -> ImageLoader | ShardLoader:
    """A standard loader over ``dataset``.

    Args:
        dataset (Dataset): with ``__len__``; one of this package or any other of ``(image, label)``.
        batch_size (int): images a batch. One that holds an unreadable image is smaller.
        shuffle (bool): a new order in every epoch (``loader.sampler.set_epoch``, of shards
            ``loader.dataset.set_epoch``). Shuffled shards are divided among the processes of a
            distributed run. Default: False.
        drop_last (bool): leave out a last batch that is not full. Default: False.
        seed (int): seed of the order. Default: 0.
        workers (int): processes that decode; 0 decodes in this one. Default: 0.

    Returns:
        ImageLoader or ShardLoader: of ``(images [B, C, H, W], labels [B])``.

    Raises:
        DataError: the dataset is empty. While it is iterated over: too many images are unreadable.
    """
    require_positive(batch_size=batch_size)
    length = len(dataset)  # type: ignore[arg-type]
    if length == 0:
        raise DataError("dataset: expected at least one image, got an empty one")
    if isinstance(dataset, ShardedImages):
        return ShardLoader(
            dataset, batch_size, shuffle=shuffle, drop_last=drop_last, seed=seed, workers=workers
        )
    collate: Callable[[Any], Any] | None = None
    if isinstance(dataset, TensorImages):
        collate = _as_is
    elif isinstance(dataset, EncodedImages):
        collate = collated
    repeats = dataset.repeats if isinstance(dataset, ImageDataset) else 1
    return ImageLoader(
        _WholeBatches(dataset) if isinstance(dataset, TensorImages) else dataset,
        batch_size=batch_size,
        sampler=EpochSampler(length, seed, repeats) if shuffle else None,
        drop_last=drop_last,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
    )


def _as_is(batch: Any) -> Any:
    return batch


def calibration_batches(
    dataset: ImageDataset,
    n: int = 512,
    batch_size: int = 64,
    seed: int = 0,
    *,
    mixed: bool = False,
) -> list[Tensor]:
    """Images without labels and without augmentation, for compensation.

    Args:
        dataset (ImageDataset): where to draw from; must not be the test set.
        n (int): how many different images, drawn at random; of shards, from those that come first
            in a random order. Default: 512.
        batch_size (int): images a batch. Default: 64.
        seed (int): seed of the draw. Default: 0.
        mixed (bool): as many more images, each a blend of two of the others (weights between a
            quarter and three quarters). A network is surer of images it was trained on than of any
            others; blends make up for it. Default: False.

    Returns:
        list[Tensor[B, C, H, W]]: float32 batches, the last one possibly smaller; blends last.

    Raises:
        InvalidArgumentError: ``n`` or ``batch_size`` is not positive, or ``n`` exceeds the dataset.
        DataError: too many images are unreadable.
    """
    require_positive(n=n, batch_size=batch_size)
    if n > len(dataset):
        raise InvalidArgumentError(
            f"n: asked for {n} calibration images, but the dataset has {len(dataset)}; lower n"
        )
    whole = torch.cat(list(_drawn(dataset.without_augmentation(), n, batch_size, seed)))[:n]
    batches = list(torch.split(whole, batch_size))
    if mixed:
        generator = generator_of(seed, 0, 4)
        share = torch.rand(len(whole), *[1] * (whole.ndim - 1), generator=generator, device="cpu")
        share = 0.25 + 0.5 * share
        others = whole[torch.randperm(len(whole), generator=generator, device="cpu")]
        batches += list(torch.split(share * whole + (1 - share) * others, batch_size))
    return batches


def _drawn(plain: ImageDataset, n: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """At least ``n`` images, or all that can be read, a batch at a time."""
    found = 0
    if isinstance(plain, ShardedImages):
        loader = ShardLoader(plain, batch_size, shuffle=True, seed=seed, divided=False)
        for images, _ in loader:
            yield images
            found += len(images)
            if found >= n:
                return
        return
    order = torch.randperm(len(plain), generator=generator_of(seed, 0, 3), device="cpu").tolist()
    while found < n and order:
        chosen, order = order[: min(batch_size, n - found)], order[min(batch_size, n - found) :]
        if isinstance(plain, TensorImages):
            images = plain.batch(chosen)[0]
        elif isinstance(plain, FileImages):
            images = collated(plain.__getitems__(chosen))[0]
            plain.unreadable.check()
        else:
            images = torch.stack([plain[index][0] for index in chosen])
        if len(images):
            yield images
        found += len(images)
    if isinstance(plain, EncodedImages):
        plain.unreadable.finish()

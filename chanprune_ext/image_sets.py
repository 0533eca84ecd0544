"""Labelled images as PyTorch datasets, their loader, and calibration batches drawn from them.

Small images are kept as bytes in memory and augmented a whole batch at a time; larger ones are
decoded when asked for. Either way the random part of an image depends on nothing but the seed,
the epoch and the position of the image, so that a run can be repeated, split over workers, or
continued in the middle.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .errors import DataError, InvalidArgumentError
from .image_archive import decode, pixels_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .image_archive import ImageArchive

__all__ = [
    "EpochSampler",
    "FileImages",
    "ImageDataset",
    "TensorImages",
    "calibration_batches",
    "make_loader",
    "require_positive",
]


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Labelled images, normalised to ``(pixel / 255 - mean) / std`` as float32.

    Attributes:
        labels (Tensor[N]): int64 class of every image.
        class_names (tuple[str, ...]): names in label order.
        shape (tuple[int, int, int]): channels, height and width of one image.
        augment (bool): whether images are randomly changed, differently in each epoch.
    """

    def __init__(
        self,
        labels: Tensor,
        class_names: Sequence[str],
        shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        augment: bool,
        seed: int,
    ) -> None:
        if len(mean) != shape[0] or len(std) != shape[0]:
            raise InvalidArgumentError(
                f"mean, std: expected {shape[0]} values, one a channel, got {mean} and {std}"
            )
        if min(std) <= 0:
            raise InvalidArgumentError(f"std: expected positive values, got {tuple(std)}")
        self.labels = labels
        self.class_names = tuple(class_names)
        self.shape = shape
        self.augment = augment
        self.seed = seed
        self.epoch = 0
        self._scale = torch.tensor([1 / (255 * s) for s in std]).view(-1, 1, 1)
        self._shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(-1, 1, 1)

    @property
    def num_classes(self) -> int:
        """Number of classes, whether or not each of them has an image here."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the random changes of the coming pass over the data."""
        self.epoch = epoch

    def without_augmentation(self) -> ImageDataset:
        """The same images as they are (the pixels are shared, not copied)."""
        plain = copy.copy(self)
        plain.augment = False
        return plain

    def _normalised(self, pixels: Tensor) -> Tensor:
        return pixels.to(torch.float32).mul_(self._scale).add_(self._shift)


class TensorImages(ImageDataset):
    """Images that fit in memory; whole batches are fetched and augmented at once.

    Args:
        images (Tensor[N, C, H, W]): uint8 pixels.
        labels (Tensor[N]): int64 classes.
        class_names (Sequence[str]): names in label order.
        mean, std (Sequence[float]): one value a channel, on the scale 0 to 1.
        augment (bool): random shift by up to ``pad`` pixels (black comes in), and mirroring.
        seed (int): seed of these changes.
        pad (int): largest shift in pixels. Default: 4.
        flip (bool): mirror every second image left to right. Default: True.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        class_names: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        augment: bool = False,
        seed: int = 0,
        pad: int = 4,
        flip: bool = True,
    ) -> None:
        channels, height, width = images.shape[1:]
        super().__init__(labels, class_names, (channels, height, width), mean, std, augment, seed)
        self.images = images
        self.pad = pad
        self.flip = flip
        self._drawn: tuple[int, Tensor] | None = None

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch([index])
        return images[0], int(labels[0])

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images ``[B, C, H, W]`` and labels ``[B]`` at these positions, all at once."""
        chosen = torch.as_tensor(indices)
        pixels = self.images[chosen]
        if self.augment:
            pixels = self._augmented(pixels, chosen)
        return self._normalised(pixels), self.labels[chosen]

    def _augmented(self, pixels: Tensor, chosen: Tensor) -> Tensor:
        top, left, mirror = self._draws()[:, chosen]
        height, width = self.shape[1:]
        rows = top[:, None] + torch.arange(height)
        columns = torch.arange(width).expand(len(chosen), -1)
        columns = left[:, None] + torch.where(mirror[:, None].bool(), columns.flip(1), columns)
        padded = F.pad(pixels, (self.pad,) * 4)
        image = torch.arange(len(chosen))
        moved = padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return moved.permute(0, 3, 1, 2).contiguous()

    def _draws(self) -> Tensor:
        """Row offset, column offset and mirror bit of every image in this epoch, ``[3, N]``."""
        if self._drawn is None or self._drawn[0] != self.epoch:
            generator = _generator(self.seed, self.epoch, 1)
            offsets = torch.randint(0, 2 * self.pad + 1, (2, len(self)), generator=generator)
            mirror = torch.randint(0, 2, (1, len(self)), generator=generator) * self.flip
            self._drawn = (self.epoch, torch.cat([offsets, mirror]))
        return self._drawn[1]


class FileImages(ImageDataset):
    """Images decoded when asked for, from a folder or an archive.

    Without augmentation the shorter side is scaled to ``resize`` and the centre ``size`` x ``size``
    is cut out; with it, a random part of the image is scaled to that size and mirrored at random.

    Args:
        archive (ImageArchive): where the images are.
        positions (Sequence[int]): which of its entries belong to this set.
        labels (Tensor[N]): int64 classes of those entries.
        class_names (Sequence[str]): names in label order.
        size (int): edge of the square images handed out, in pixels.
        resize (int): length of the shorter side before the centre is cut out, in pixels.
        mean, std (Sequence[float]): one value a channel, on the scale 0 to 1.
        augment (bool): whether to augment.
        seed (int): seed of the augmentation.
    """

    def __init__(
        self,
        archive: ImageArchive,
        positions: Sequence[int],
        labels: Tensor,
        class_names: Sequence[str],
        size: int,
        resize: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        from torchvision.transforms import v2

        super().__init__(labels, class_names, (3, size, size), mean, std, augment, seed)
        self.archive = archive
        self.positions = list(positions)
        self._plain_view = v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(size)])
        self._random_view = v2.Compose(
            [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        )

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = decode(self.archive, self.positions[index])
        if self.augment:
            # The transforms draw from the global generator; lend it to this image alone.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(_mix(self.seed, self.epoch, 2, index))
                image = self._random_view(image)
        else:
            image = self._plain_view(image)
        return self._normalised(pixels_of(image)), int(self.labels[index])


class _WholeBatches(Dataset[Any]):
    """Lets a data loader ask a :class:`TensorImages` for all images of a batch in one call."""

    def __init__(self, dataset: TensorImages) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.dataset.batch(indices)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)


class EpochSampler(Sampler[int]):
    """Every index once, in an order that depends on the seed and the epoch alone.

    Attributes:
        start (int): where in that order the next pass begins, to go on in the middle of one; the
            passes after it begin at 0.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the coming pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.length, generator=_generator(self.seed, self.epoch, 0))
        start, self.start = self.start, 0
        return iter(order.tolist()[start:])


def make_loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    shuffle: bool = False,
    drop_last: bool = False,
    seed: int = 0,
    workers: int = 0,
) -> DataLoader[Any]:
    """A standard loader over ``dataset``.

    Args:
        dataset (Dataset): with ``__len__``; one of this module or any other of ``(image, label)``.
        batch_size (int): images a batch.
        shuffle (bool): a new order in every epoch (``loader.sampler.set_epoch``). Default: False.
        drop_last (bool): leave out a last batch that is not full. Default: False.
        seed (int): seed of the order. Default: 0.
        workers (int): processes that decode; 0 decodes in this one. Default: 0.

    Returns:
        DataLoader: of ``(images [B, C, H, W], labels [B])``.
    """
    require_positive(batch_size=batch_size)
    length = len(dataset)  # type: ignore[arg-type]
    if length == 0:
        raise DataError("dataset: expected at least one image, got an empty one")
    return DataLoader(
        _WholeBatches(dataset) if isinstance(dataset, TensorImages) else dataset,
        batch_size=batch_size,
        sampler=EpochSampler(length, seed) if shuffle else None,
        drop_last=drop_last,
        num_workers=workers,
        collate_fn=_as_is if isinstance(dataset, TensorImages) else None,
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
        n (int): how many different images, drawn at random. Default: 512.
        batch_size (int): images a batch. Default: 64.
        seed (int): seed of the draw. Default: 0.
        mixed (bool): as many more images, each a blend of two of the others (weights between a
            quarter and three quarters). A network is surer of images it was trained on than of any
            others; blends make up for it. Default: False.

    Returns:
        list[Tensor[B, C, H, W]]: float32 batches, the last one possibly smaller; blends last.

    Raises:
        InvalidArgumentError: ``n`` or ``batch_size`` is not positive, or ``n`` exceeds the dataset.
    """
    require_positive(n=n, batch_size=batch_size)
    if n > len(dataset):
        raise InvalidArgumentError(
            f"n: asked for {n} calibration images, but the dataset has {len(dataset)}; lower n"
        )
    plain = dataset.without_augmentation()
    order = torch.randperm(len(plain), generator=_generator(seed, 0, 3))[:n]
    batches = []
    for part in torch.split(order, batch_size):
        if isinstance(plain, TensorImages):
            batches.append(plain.batch(part.tolist())[0])
        else:
            batches.append(torch.stack([plain[int(i)][0] for i in part]))
    if mixed:
        whole, generator = torch.cat(batches), _generator(seed, 0, 4)
        share = 0.25 + 0.5 * torch.rand(n, *[1] * (whole.ndim - 1), generator=generator)
        others = whole[torch.randperm(n, generator=generator)]
        batches += list(torch.split(share * whole + (1 - share) * others, batch_size))
    return batches


def require_positive(**values: int) -> None:
    """Raises InvalidArgumentError for the first named value below 1."""
    for name, value in values.items():
        if value < 1:
            raise InvalidArgumentError(f"{name}: expected a positive number, got {value}")


def _mix(*numbers: int) -> int:
    """One 63-bit seed out of several small numbers, without the collisions of adding them."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(_mix(*numbers))

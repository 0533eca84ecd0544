"""Labelled images as PyTorch datasets: the part that all kinds share, and images in memory.

Whatever the kind, the random part of an image depends on nothing but the seed, the epoch, the
position of the image and which repetition of it this is, so that a run can be repeated, split over
workers, or continued in the middle.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InvalidArgumentError
from ..seeds import drawing_from, generator_of
from .transforms import Augmentation, training_transform

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ImageDataset", "Index", "TensorImages", "position_and_repeat", "require_positive"]

Index = int | tuple[int, int]  # a position, or with it which of an image's repetitions is meant


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Labelled images, normalised to ``(pixel / 255 - mean) / std`` as float32.

    Attributes:
        class_names (tuple[str, ...]): names in label order.
        shape (tuple[int, int, int]): channels, height and width of one image.
        augment (bool): whether images are randomly changed, differently in each epoch.
        augmentation (Augmentation): how, if they are.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        augment: bool | Augmentation,
        seed: int,
    ) -> None:
        if len(mean) != shape[0] or len(std) != shape[0]:
            raise InvalidArgumentError(
                f"mean, std: expected {shape[0]} values, one a channel, got {mean} and {std}"
            )
        if min(std) <= 0:
            raise InvalidArgumentError(f"std: expected positive values, got {tuple(std)}")
        self.class_names = tuple(class_names)
        self.shape = shape
        self.augment = bool(augment)
        self.augmentation = augment if isinstance(augment, Augmentation) else Augmentation()
        self.seed = seed
        self.epoch = 0
        self._scale = torch.tensor([1 / (255 * s) for s in std], device="cpu").view(-1, 1, 1)
        self._shift = torch.tensor(
            [-m / s for m, s in zip(mean, std, strict=True)], device="cpu"
        ).view(-1, 1, 1)

    @property
    def num_classes(self) -> int:
        """Number of classes, whether or not each of them has an image here."""
        return len(self.class_names)

    @property
    def repeats(self) -> int:
        """How often a training batch holds each of its images, changed differently."""
        return self.augmentation.repeats if self.augment else 1

    def __len__(self) -> int:
        raise NotImplementedError

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

    Attributes:
        labels (Tensor[N]): int64 class of every image.

    Args:
        images (Tensor[N, C, H, W]): uint8 pixels.
        labels (Tensor[N]): int64 classes.
        class_names (Sequence[str]): names in label order.
        mean, std (Sequence[float]): one value a channel, on the scale 0 to 1.
        augment (bool or Augmentation): random shift by up to ``pad`` pixels (black comes in),
            mirroring, and what the augmentation has besides cropping. Default: False.
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
        augment: bool | Augmentation = False,
        seed: int = 0,
        pad: int = 4,
        flip: bool = True,
    ) -> None:
        channels, height, width = images.shape[1:]
        super().__init__(class_names, (channels, height, width), mean, std, augment, seed)
        self.images = images
        self.labels = labels
        self.pad = pad
        self.flip = flip and self.augmentation.mirror
        self._drawn: tuple[int, Tensor] | None = None
        further = self.augmentation.auto is not None or self.augmentation.erasing > 0
        self._further = training_transform(None, self.augmentation, mean=mean) if further else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Index) -> tuple[Tensor, int]:
        images, labels = self.batch([index])
        return images[0], int(labels[0])

    def batch(self, indices: Sequence[Index]) -> tuple[Tensor, Tensor]:
        """Images ``[B, C, H, W]`` and labels ``[B]`` at these positions, all at once."""
        places = [position_and_repeat(index) for index in indices]
        chosen = torch.tensor([position for position, _ in places], dtype=torch.long, device="cpu")
        pixels = self.images[chosen]
        if self.augment:
            pixels = self._moved(
                pixels, chosen, torch.tensor([repeat for _, repeat in places], device="cpu")
            )
            if self._further is not None:
                for row, place in enumerate(places):
                    with drawing_from(self.seed, self.epoch, 2, *place):
                        pixels[row] = self._further(pixels[row])
        return self._normalised(pixels), self.labels[chosen]

    def _moved(self, pixels: Tensor, chosen: Tensor, repeats: Tensor) -> Tensor:
        top, left, mirror = self._draws()[repeats, :, chosen].unbind(1)
        height, width = self.shape[1:]
        rows = top[:, None] + torch.arange(height, device="cpu")
        columns = torch.arange(width, device="cpu").expand(len(chosen), -1)
        columns = left[:, None] + torch.where(mirror[:, None].bool(), columns.flip(1), columns)
        padded = F.pad(pixels, (self.pad,) * 4)
        image = torch.arange(len(chosen), device="cpu")
        moved = padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return moved.permute(0, 3, 1, 2).contiguous()

    def _draws(self) -> Tensor:
        """Row offset, column offset and mirror bit of every image in this epoch, ``[R, 3, N]``."""
        if self._drawn is None or self._drawn[0] != self.epoch:
            draws = []
            for repeat in range(self.repeats):
                again = (repeat,) if repeat else ()
                generator = generator_of(self.seed, self.epoch, 1, *again)
                offsets = torch.randint(0, 2 * self.pad + 1, (2, len(self)), generator=generator)
                mirror = torch.randint(0, 2, (1, len(self)), generator=generator) * self.flip
                draws.append(torch.cat([offsets, mirror]))
            self._drawn = (self.epoch, torch.stack(draws))
        return self._drawn[1]


def position_and_repeat(index: Index) -> tuple[int, int]:
    """Takes an index apart: where the image is, and which of its repetitions is meant."""
    return index if isinstance(index, tuple) else (int(index), 0)


def require_positive(**values: int) -> None:
    """Raises InvalidArgumentError for the first named value below 1."""
    for name, value in values.items():
        if value < 1:
            raise InvalidArgumentError(f"{name}: expected a positive number, got {value}")

"""Images decoded when asked for, from a folder or an archive."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from ..errors import DataError, InvalidArgumentError
from ..seeds import drawing_from
from .archive import decode
from .sets import ImageDataset, position_and_repeat
from .transforms import evaluation_transform, training_transform
from .unreadable import UnreadableImages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .archive import ImageArchive
    from .sets import Index
    from .transforms import Augmentation, Preset

__all__ = ["EncodedImages", "FileImages", "collated"]


class EncodedImages(ImageDataset):
    """What images that are decoded anew in every epoch have in common.

    Without augmentation an image is scaled to ``preset.resize`` and its centre is cut out; with it,
    a random part of the image is scaled to that size, and changed further as the augmentation says.
    An image that can't be read is left out of its batch, and counted.

    Attributes:
        unreadable (UnreadableImages): the count of those.

    Args:
        source (str): the image set, for messages.
        length (int): images in it.
        class_names (Sequence[str]): names in label order.
        preset (Preset): size of the images handed out, and their normalisation.
        augment (bool or Augmentation): whether to augment, and how.
        seed (int): seed of the augmentation.
    """

    def __init__(
        self,
        source: str,
        length: int,
        class_names: Sequence[str],
        preset: Preset,
        augment: bool | Augmentation,
        seed: int,
    ) -> None:
        size = preset.size
        super().__init__(class_names, (3, size, size), preset.mean, preset.std, augment, seed)
        resize = preset.resize or round(size * 256 / 224)
        if resize < size:
            raise InvalidArgumentError(f"resize: expected at least size = {size}, got {resize}")
        self._source = source
        self._length = length
        self._plain = evaluation_transform(
            size, resize, interpolation=preset.interpolation, crop_mode=preset.crop_mode
        )
        self._random = training_transform(
            size, self.augmentation, mean=preset.mean, interpolation=preset.interpolation
        )
        self.unreadable = UnreadableImages(source, length, self.explain)

    def __len__(self) -> int:
        return self._length

    def without_augmentation(self) -> ImageDataset:
        """The same images as they are; what can't be read is counted separately."""
        plain = cast("EncodedImages", super().without_augmentation())
        plain.unreadable = UnreadableImages(self._source, self._length, plain.explain)
        return plain

    def explain(self, index: int) -> str:
        """The name of an image that could not be read, and what is wrong with it."""
        raise NotImplementedError

    def view(self, pixels: Tensor, position: int, repeat: int = 0) -> Tensor:
        """What is handed out of a decoded image, which is at ``position`` of the set."""
        if self.augment:
            # The transforms draw from the global generator; lend it to this image alone.
            again = (repeat,) if repeat else ()
            with drawing_from(self.seed, self.epoch, 2, position, *again):
                pixels = self._random(pixels)
        else:
            pixels = self._plain(pixels)
        return self._normalised(pixels)


class FileImages(EncodedImages):
    """Images of a folder or an archive, in any order.

    Attributes:
        labels (Tensor[N]): int64 class of every image.

    Args:
        archive (ImageArchive): where the images are.
        positions (Sequence[int]): which of its entries belong to this set.
        labels (Tensor[N]): int64 classes of those entries.
        class_names (Sequence[str]): names in label order.
        preset (Preset): size of the images handed out, and their normalisation.
        augment (bool or Augmentation): whether to augment, and how. Default: False.
        seed (int): seed of the augmentation. Default: 0.
    """

    def __init__(
        self,
        archive: ImageArchive,
        positions: Sequence[int],
        labels: Tensor,
        class_names: Sequence[str],
        preset: Preset,
        augment: bool | Augmentation = False,
        seed: int = 0,
    ) -> None:
        super().__init__(str(archive.path), len(labels), class_names, preset, augment, seed)
        self.archive = archive
        self.positions = np.asarray(positions)  # shared with workers, as the entries are
        self.labels = labels

    def __getitem__(self, index: Index) -> tuple[Tensor, int]:
        position, repeat = position_and_repeat(index)
        pixels = decode(self.archive, self.positions[position])
        return self.view(pixels, position, repeat), int(self.labels[position])

    def __getitems__(self, indices: Sequence[Index]) -> list[tuple[Tensor, int]]:
        """Those of the images that can be read; the others are counted."""
        found = []
        latest: tuple[int, Tensor] | None = None
        for index in indices:
            position, repeat = position_and_repeat(index)
            if latest is None or latest[0] != position:  # repetitions come one after the other
                try:
                    latest = position, decode(self.archive, self.positions[position])
                except DataError:
                    self.unreadable.mark(position)
                    continue
            found.append((self.view(latest[1], position, repeat), int(self.labels[position])))
        return found

    def explain(self, index: int) -> str:
        """The name of an image that could not be read, and what is wrong with it."""
        name = self.archive.entries.name(self.positions[index])
        try:
            decode(self.archive, self.positions[index])
        except DataError as error:
            return str(error).removeprefix(f"{self.archive.path}: ")
        return f"{name} could not be read then, and can now"


def collated(found: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Images ``[B, C, H, W]`` and labels ``[B]``; B is 0 where no image could be read."""
    if not found:
        return torch.empty(0, device="cpu"), torch.empty(0, dtype=torch.long, device="cpu")
    images, labels = default_collate(list(found))
    return images, labels

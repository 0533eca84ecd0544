"""Other views of a batch of images: mixed with each other (mixup, CutMix), and mirrored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import DataError

if TYPE_CHECKING:
    from .recipe import Recipe

__all__ = ["InputMixer", "mirror_images"]


def mirror_images(inputs: Any) -> Tensor:
    """The images with left and right exchanged, in the memory format that they have.

    Args:
        inputs (Tensor[N, C, H, W]): images.

    Returns:
        Tensor[N, C, H, W]: the mirror images.

    Raises:
        DataError: the batch is not one tensor of images.
    """
    return _images("teacher_flip", inputs).flip(3)


class InputMixer:
    """Mixes each batch by mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019).

    The transforms are torchvision's v2. Where both are asked for, each batch gets one of them at
    random. Student and teacher see the same mixed images, so that no labels are needed: the teacher
    says itself what it makes of a mixture.

    Args:
        recipe (Recipe): ``mixup`` and ``cutmix``, the parameters of the Beta distributions; None
            leaves a transform out.
    """

    def __init__(self, recipe: Recipe) -> None:
        from torchvision.transforms import v2

        kinds = ((v2.MixUp, recipe.mixup), (v2.CutMix, recipe.cutmix))
        self._chosen = [(kind, alpha) for kind, alpha in kinds if alpha is not None]

    def __bool__(self) -> bool:
        return bool(self._chosen)

    def __call__(self, inputs: Any) -> tuple[Any, Tensor]:
        """Mixes one batch.

        Args:
            inputs (Tensor[N, C, H, W]): images.

        Returns:
            tuple[Tensor, Tensor]: the mixed images, and the mixing matrix ``[N, N]``: share of
            image j in the mixed image i.

        Raises:
            DataError: the batch is not one tensor of images.
        """
        inputs = _images("mixup, cutmix", inputs)
        n = len(inputs)
        pick = int(torch.randint(len(self._chosen), ())) if len(self._chosen) > 1 else 0
        kind, alpha = self._chosen[pick]
        # Each image is a class of its own: the soft labels are then the mixing matrix.
        mix = kind(alpha=alpha, num_classes=max(n, 2))
        images, shares = mix(inputs, torch.arange(n, device=inputs.device))
        return images, shares[:, :n]


def _images(setting: str, inputs: Any) -> Tensor:
    """The batch, if it is one tensor of images, which the setting needs."""
    if isinstance(inputs, Tensor) and inputs.ndim == 4:
        return inputs
    given = list(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
    raise DataError(f"{setting}: expected batches of images [N, C, H, W], got {given}")

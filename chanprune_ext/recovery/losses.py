"""The quantity a recovery run makes small."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F

from ..errors import InvalidArgumentError
from ..ops import kd_kl_div

if TYPE_CHECKING:
    from torch import Tensor

    from .recipe import Recipe

__all__ = ["recovery_loss"]


def recovery_loss(
    student: Tensor, labels: Tensor, teacher: Tensor | None, recipe: Recipe
) -> Tensor:
    """Mean loss of a batch.

    Without a teacher the cross-entropy of the labels, smoothed by ``label_smoothing``; with one

        ``distill_weight * T^2 * KL(softmax(teacher / T) || softmax(student / T))
        + hard_weight * cross_entropy(student, labels)``,

    with ``T = temperature`` (Hinton et al. 2015) and the same smoothing in the second term.

    Args:
        student (Tensor[N, K]): logits of the network being trained.
        labels (Tensor[N]): int64 classes.
        teacher (Tensor[N, K], optional): logits of the network to learn from, same images.
        recipe (Recipe): where the weights are taken from.

    Returns:
        Tensor: scalar.

    Raises:
        InvalidArgumentError: the two networks have different numbers of classes.
    """
    if teacher is None:
        return F.cross_entropy(student, labels, label_smoothing=recipe.label_smoothing)
    if teacher.shape != student.shape:
        raise InvalidArgumentError(
            f"teacher: expected logits {list(student.shape)} like the student's, got "
            f"{list(teacher.shape)}"
        )
    hard = recipe.hard_weight > 0
    return kd_kl_div(
        student,
        teacher.to(student.dtype),
        recipe.temperature,
        labels=labels if hard else None,
        soft_weight=recipe.distill_weight,
        hard_weight=recipe.hard_weight,
        label_smoothing=recipe.label_smoothing if hard else 0.0,
    )

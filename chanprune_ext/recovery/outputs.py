"""What a classifier returns and what its batches look like, checked before any kernel sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, InvalidArgumentError

__all__ = ["checked_labels", "logits_of", "split_batch"]


def logits_of(output: Any) -> Tensor:
    """The logits ``[N, K]`` in a model's output.

    Args:
        output (Any): a tensor, or an object or mapping with ``logits`` (Hugging Face, and
            torchvision's networks with auxiliary heads while training).

    Raises:
        InvalidArgumentError: the output holds no two-dimensional floating-point tensor there.
    """
    if isinstance(output, Mapping):
        output = output.get("logits", output)
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise InvalidArgumentError(
            f"model: expected it to return logits [N, classes], got {type(output).__name__}"
        )
    if output.ndim != 2 or not output.is_floating_point():
        raise InvalidArgumentError(
            f"model: expected floating-point logits [N, classes], got {output.dtype} "
            f"{list(output.shape)}"
        )
    return output


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """Takes an ``(images, labels)`` pair apart.

    Raises:
        DataError: the batch is no pair, is empty, or its labels are no integers ``[N]``.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise DataError(
            f"batch: expected a pair (images, labels), got {type(batch).__name__}"
            + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
        )
    images, labels = batch
    labels = torch.as_tensor(labels)
    if labels.ndim != 1 or labels.is_floating_point() or labels.numel() == 0:
        raise DataError(
            f"labels: expected integers [N] with N > 0, got {labels.dtype} {list(labels.shape)}"
        )
    return images, labels.long()


def checked_labels(labels: Tensor, classes: int) -> None:
    """Raises DataError unless every one of the integer ``labels [N]`` is in ``[0, classes)``."""
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high >= classes:
        raise DataError(
            f"labels: expected 0 to {classes - 1} for a model with {classes} outputs, got "
            f"{low if low < 0 else high}; use the model's own class order, or a class file"
        )

"""Errors that are minimised: relative at a block's output, a divergence at the network's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

__all__ = ["RelativeError", "divergence", "full_precision", "squares"]


def full_precision(tensor: Tensor) -> Tensor:
    """Half-precision values in float32, all others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def squares(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of squared differences, and of squared targets."""
    pairs = [(full_precision(o), full_precision(t)) for o, t in zip(outputs, targets, strict=True)]
    error = torch.stack([(o - t).square().sum() for o, t in pairs]).sum()
    energy = torch.stack([t.square().sum() for _, t in pairs]).sum()
    return error, energy


class RelativeError:
    """Squared error over the mean energy of the targets, so that losses of all blocks are alike.

    Args:
        targets: All targets; each a list of tensors.
    """

    def __init__(self, targets: Iterable[Sequence[Tensor]]) -> None:
        energy, elements = 0.0, 0
        for target in targets:
            energy += sum(float(full_precision(t).square().sum()) for t in target)
            elements += sum(t.numel() for t in target)
        self.energy = energy
        self._per_element = energy / elements if energy > 0 else 1.0

    def __call__(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """The loss of one batch."""
        error, _ = squares(outputs, targets)
        return error / (self._per_element * sum(t.numel() for t in targets))


def divergence(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Mean ``KL(softmax(target) || softmax(output))`` in nats."""
    ours, theirs = (F.log_softmax(full_precision(logits[0]), 1) for logits in (outputs, targets))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)

"""How far two networks' outputs are apart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..analysis.calls import run_model, tensors_in
from ..errors import InvalidArgumentError
from ..ops.accumulation import widened
from .report import Deviation

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["DeviationMeter", "are_logits", "forward", "forward_failed", "output_tensors"]


def forward_failed(inputs: Any, error: Exception) -> InvalidArgumentError:
    """The error to raise when a network does not accept calibration data."""
    shapes = [list(t.shape) for t in tensors_in(inputs)]
    return InvalidArgumentError(f"batches: the forward failed on inputs of shape {shapes}: {error}")


def forward(model: nn.Module, inputs: Any) -> Any:
    """Runs ``model`` on calibration data.

    Raises:
        InvalidArgumentError: the forward raised; the original error is the cause.
    """
    try:
        return run_model(model, inputs)
    except Exception as error:
        raise forward_failed(inputs, error) from error


def output_tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors in a model's output, copied: a forward may reuse its memory."""
    return [t.detach().clone() for t in tensors_in(output) if t.is_floating_point()]


def are_logits(outputs: Sequence[Tensor]) -> bool:
    """Whether a network's output may be one matrix of class scores."""
    return len(outputs) == 1 and outputs[0].ndim == 2 and outputs[0].shape[1] > 1


class DeviationMeter:
    """Adds up squared errors and divergences over batches.

    Args:
        logits: Whether an output that may be a matrix of logits is one.
    """

    def __init__(self, *, logits: bool = True) -> None:
        self._may_be_logits = logits
        self._error = self._energy = self._divergence = 0.0
        self._logits = 0

    def add(self, original: list[Tensor], pruned: list[Tensor]) -> None:
        """Adds one batch of outputs.

        Raises:
            InvalidArgumentError: the networks return tensors of different shapes.
        """
        shapes = [[tuple(t.shape) for t in outputs] for outputs in (original, pruned)]
        if shapes[0] != shapes[1] or not shapes[0]:
            raise InvalidArgumentError(
                "pruned: its outputs must have the shapes of the original's, which returns "
                f"{shapes[0]}; it returns {shapes[1]}"
            )
        for a, b in zip(original, pruned, strict=True):
            a, b = widened(a), widened(b)  # the square of 256 is no number of float16
            self._error += float((a - b).square().sum(dtype=torch.float64))
            self._energy += float(a.square().sum(dtype=torch.float64))
        a, b = original[0], pruned[0]
        if self._may_be_logits and are_logits(original):
            log_a, log_b = F.log_softmax(a.double(), 1), F.log_softmax(b.double(), 1)
            self._divergence += float((log_a.exp() * (log_a - log_b)).sum())
            self._logits += a.shape[0]

    def deviation(self) -> Deviation:
        """The deviation over everything added so far."""
        relative = math.inf
        if self._energy > 0:
            relative = (self._error / self._energy) ** 0.5
        elif self._error == 0:
            relative = 0.0
        if math.isnan(relative):
            relative = math.inf
        kl = max(0.0, self._divergence / self._logits) if self._logits else None
        if kl is not None and math.isnan(kl):
            kl = math.inf
        return Deviation(relative, kl)

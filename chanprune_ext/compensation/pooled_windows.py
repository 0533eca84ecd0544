"""More samples for a linear layer behind a global average: averages over parts of the positions.

Such a layer sees one vector an input, and a classifier of a thousand classes has as many columns
as there are calibration images. Averaging and the layer commute, so every average over a window is
a sample of the same linear map; what the network computes is their mean.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch.nn.functional as F

from .survey import Activation

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ..analysis.call_trace import Call
    from .survey import CallFacts

__all__ = ["averaging_call", "pooled_windows", "windows_help"]

_SHAPES = {"flatten", "reshape", "view", "squeeze", "contiguous"}
_DROPOUTS = {"dropout", "feature_dropout"}
_POOLS = {f"adaptive_avg_pool{axes}d": axes for axes in (1, 2, 3)}
_FEW = 4  # samples a column; with more of them, windows only move the fit away from what counts
_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def averaging_call(
    call: Call, makers: Mapping[int, int], calls: Sequence[Call], facts: Sequence[CallFacts]
) -> int | None:
    """The call that averages over all positions what a linear layer reads.

    Args:
        call: The layer's.
        makers: Value -> index of the call that makes it.
        calls: All calls.
        facts: What the survey noted of them.

    Returns:
        Its index; None where the input is anything else than such an average.
    """
    value = call.inputs[0]
    while True:
        maker = makers.get(value)
        if maker is None or len(calls[maker].inputs) != 1:
            return None
        name = facts[maker].name.rstrip("_")
        if name not in _SHAPES and (name not in _DROPOUTS or facts[maker].drops):
            break
        value = calls[maker].inputs[0]
    read, averages = facts[call.index].args[0], facts[maker]
    same = isinstance(read, Activation) and read.shape == (averages.output_shape or ())[:2]
    return maker if same and _averages_all(averages) else None


def _averages_all(facts: CallFacts) -> bool:
    """Whether a call turns ``[n, channels, *positions]`` into one value an image and channel."""
    x = facts.args[0] if facts.args else None
    if not isinstance(x, Activation) or facts.output_shape is None:
        return False
    axes = len(x.shape) - 2
    if facts.name == "mean":
        dims = facts.args[1] if len(facts.args) > 1 else facts.kwargs.get("dim")
        dims = [dims] if isinstance(dims, int) else dims or ()
        # Tokens may be as many as channels: shapes don't tell over which the average goes.
        if sorted(dim % len(x.shape) for dim in dims) != list(range(2, 2 + axes)):
            return False
    elif _POOLS.get(facts.name) != axes:
        return False
    return (
        1 <= axes <= 3
        and facts.output_shape[:2] == x.shape[:2]
        and math.prod(facts.output_shape) == x.shape[0] * x.shape[1]
        and math.prod(x.shape[2:]) > 1
    )


def windows_help(samples: float, columns: int) -> bool:
    """Whether there are so few samples that a fit gains by windows."""
    return samples < _FEW * columns


def pooled_windows(x: Tensor) -> Tensor:
    """Averages over windows of half the extent, about three along each axis.

    Args:
        x (Tensor[N, C, *positions]): what is averaged over all positions.

    Returns:
        Tensor[N, windows, C].
    """
    kernel = [max(1, extent // 2) for extent in x.shape[2:]]
    stride = [max(1, (e - k) // 2) for e, k in zip(x.shape[2:], kernel, strict=True)]
    windows = _AVERAGE[x.dim() - 2](x, kernel, stride)
    return windows.flatten(2).transpose(1, 2)

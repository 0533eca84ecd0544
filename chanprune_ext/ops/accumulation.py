"""The precision that sums over values are formed in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["accumulation_dtype", "widened"]


def accumulation_dtype(values: Tensor) -> torch.dtype:
    """float64 for values in float64, float32 for all others."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def widened(values: Tensor) -> Tensor:
    """Values in that precision: sums and losses are small work, their rounding would not be."""
    return values.to(accumulation_dtype(values))

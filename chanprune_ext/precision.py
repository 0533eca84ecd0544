"""The arithmetic that gradients are computed in: its names, their types, and its autocast."""

from __future__ import annotations

import torch

__all__ = ["AUTOCAST_DTYPES", "autocast", "precision_of"]

# float32 needs no autocast.
AUTOCAST_DTYPES: dict[str, torch.dtype | None] = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def autocast(device_type: str, dtype: torch.dtype | None) -> torch.autocast:
    """Context in which convolutions and products are computed in ``dtype``; None: as they are.

    It keeps no converted weights. torch would keep them until the outermost autocast ends, and
    where that is a caller's, every step would see the weights of the first.
    """
    return torch.autocast(device_type, dtype, enabled=dtype is not None, cache_enabled=False)


def precision_of(dtype: torch.dtype | None) -> str | None:
    """The half precision a network's weights are in; None for any other type."""
    if dtype is None:
        return None
    return next((name for name, half in AUTOCAST_DTYPES.items() if half is dtype), None)

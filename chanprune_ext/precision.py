"""The arithmetic that gradients are computed in: its names, their types, and its autocast."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["AUTOCAST_DTYPES", "autocast", "in_software", "precision_of"]

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


def in_software(device_type: str, *dtypes: torch.dtype | None) -> str | None:
    """A sentence where a processor has no instructions for one of the types; otherwise None.

    oneDNN then falls back to its reference code: a step of ResNet-56 takes ten times as long in
    bfloat16 as in float32 on a processor that has AVX2 but not AVX-512.

    Args:
        device_type: ``"cpu"``; of other devices nothing is known here.
        dtypes: Types of autocast; None for none.
    """
    if device_type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    slow = [dtype for dtype in dtypes if dtype is not None and not _has_instructions(dtype)]
    if not slow:
        return None
    name = str(slow[0]).removeprefix("torch.")
    return f"this processor computes {name} in software, many times slower than float32"


def _has_instructions(dtype: torch.dtype) -> bool:
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    supported: Callable[[], bool] = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")
    return supported()

"""Checks of tensors that all operators share; none reads a value."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from chanprune_ext.errors import InvalidArgumentError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_dense", "check_is_tensor"]


def check_is_tensor(name: str, value: object) -> None:
    """Raises for lists, arrays and whatever else is no tensor."""
    if not isinstance(value, torch.Tensor):
        raise InvalidArgumentError(
            f"{name} should be a tensor, got {type(value).__name__}; pass torch.as_tensor(...)"
        )


def check_dense(name: str, tensor: Tensor) -> None:
    """Raises for tensors whose elements do not lie by strides in one piece of memory."""
    if tensor.is_nested or tensor.is_quantized or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else f"{tensor.layout} {tensor.dtype}"
        raise InvalidArgumentError(
            f"{name} should be a dense tensor, got a {kind} one; pass a dense copy of it"
        )

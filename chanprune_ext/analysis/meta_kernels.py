"""Outputs of operations whose stand-in torch computes slowly.

On the meta device torch decomposes a batch norm into a dozen operations, which is half the time of
a forward of a convolutional network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chanprune_ext.analysis.calls import CallMode

__all__ = ["MetaCalls", "meta_batch_norm", "run_call", "run_operation"]


def meta_batch_norm(args: tuple[Any, ...]) -> Tensor | None:
    """The output of a batch norm of ``(input, weight, bias, running mean and variance, ...)``.

    None where torch should be asked: tensors with values, training, or shapes that do not fit.
    """
    if len(args) < 6 or args[5]:
        return None
    x, *vectors = args[:5]
    if not isinstance(x, Tensor) or not x.is_meta or x.dim() < 2:
        return None
    if any(isinstance(v, Tensor) and v.shape != x.shape[1:2] for v in vectors):
        return None
    return torch.empty_like(x)


def run_call(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a torch-level call on stand-ins."""
    if name == "batch_norm" and not kwargs:
        output = meta_batch_norm(args)
        if output is not None:
            return output
    return func(*args, **kwargs)


def run_operation(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an ATen operation on stand-ins."""
    if func is torch.ops.aten.native_batch_norm.default and not kwargs:
        output = meta_batch_norm(args)
        if output is not None:
            return output, output.new_empty(0), output.new_empty(0)
    return func(*args, **kwargs)


class MetaCalls(CallMode):
    """Runs a model on meta tensors with the kernels of this module."""

    def run(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the function of a call, or what stands in for it."""
        return run_call(name, func, args, kwargs)

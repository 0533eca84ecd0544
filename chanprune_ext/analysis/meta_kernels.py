"""Outputs of operations whose stand-in torch computes slowly.

On the meta device torch runs many common operations through Python reference code, up to a
millisecond each, which is most of the time of a forward without values. Where all an operation
needs is an empty tensor of a known shape, it is made here; in every other case torch is asked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chanprune_ext.analysis.calls import CallMode

__all__ = ["MetaCalls", "run_call", "run_operation"]

# One tensor in, one of the same shape, dtype and strides out. As operations and as calls.
_UNARY = frozenset(
    (
        *("gelu", "silu", "relu", "relu6", "sigmoid", "tanh", "hardswish", "hardsigmoid", "mish"),
        *("hardtanh", "leaky_relu", "elu", "softplus", "exp", "rsqrt", "sqrt", "neg"),
    )
)


def _is_plain(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_meta and x.is_floating_point() and x.dim() > 0


def _unary(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x = args[0] if args else None
    if not isinstance(x, Tensor) or not _is_plain(x):
        return None
    if any(isinstance(a, Tensor) for a in (*args[1:], *kwargs.values())):
        return None
    return x if name.endswith("_") or kwargs.get("inplace") else torch.empty_like(x)


def _batch_norm(args: tuple[Any, ...]) -> Tensor | None:
    """Of ``(input, weight, bias, running mean and variance, ...)``."""
    if len(args) < 6 or not _is_plain(args[0]) or args[0].dim() < 2:
        return None
    vectors = [v for v in args[1:5] if isinstance(v, Tensor)]
    if any(v.shape != args[0].shape[1:2] for v in vectors):
        return None
    return torch.empty_like(args[0])


def _layer_norm(args: tuple[Any, ...]) -> Tensor | None:
    """Of ``(input, normalized_shape, weight, bias, ...)``."""
    if len(args) < 4 or not _is_plain(args[0]):
        return None
    x, shape = args[0], tuple(args[1])
    vectors = [v for v in args[2:4] if isinstance(v, Tensor)]
    if tuple(x.shape[-len(shape) :]) != shape or any(tuple(v.shape) != shape for v in vectors):
        return None
    return x.new_empty(x.shape)  # contiguous, whatever the input is


def _linear(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Of ``(input, weight, bias)``."""
    if kwargs or len(args) < 2 or not _is_plain(args[0]) or not isinstance(args[1], Tensor):
        return None
    x, weight, bias = (*args, None)[:3]
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _addmm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Of ``(vector, (M, K), (K, N))``."""
    if kwargs or len(args) != 3 or not _is_plain(args[1]):
        return None
    added, left, right = args
    if left.shape[1] != right.shape[0] or added.shape != right.shape[1:]:
        return None
    return left.new_empty((left.shape[0], right.shape[1]))


def run_call(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a torch-level call on stand-ins."""
    output = None
    if name.rstrip("_") in _UNARY:
        output = _unary(name, args, kwargs)
    elif name == "linear":
        output = _linear(args, kwargs)
    elif name == "batch_norm" and not kwargs:
        output = _batch_norm(args)
    elif name == "layer_norm" and not kwargs:
        output = _layer_norm(args)
    return func(*args, **kwargs) if output is None else output


def run_operation(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an ATen operation on stand-ins."""
    name = func._schema.name.removeprefix("aten::")
    output: Any = None
    if name.rstrip("_") in _UNARY:
        output = _unary(name, args, kwargs)
    elif name == "addmm":
        output = _addmm(args, kwargs)
    elif name == "native_batch_norm" and not kwargs:
        normed = _batch_norm(args)
        if normed is not None:
            saved = normed.shape[1] if args[5] else 0
            output = normed, normed.new_empty(saved), normed.new_empty(saved)
    elif name == "native_layer_norm" and not kwargs:
        normed = _layer_norm(args)
        if normed is not None:
            shape = (*normed.shape[: -len(args[1])], *(1 for _ in args[1]))
            output = normed, normed.new_empty(shape), normed.new_empty(shape)
    return func(*args, **kwargs) if output is None else output


class MetaCalls(CallMode):
    """Runs a model on meta tensors with the kernels of this module."""

    def run(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the function of a call, or what stands in for it."""
        return run_call(name, func, args, kwargs)

"""Lp norm of every channel of many weights in one call: the raw material of magnitude criteria."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch._C import _AutoDispatchBelowAutograd

from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.ops._loader import (
    CPU_MODULE,
    differentiates,
    inside_transform,
    native_available,
)
from chanprune_ext.ops.accumulation import accumulation_dtype, widened
from chanprune_ext.ops.tensor_checks import check_dense

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["channel_norms", "channel_norms_reference"]

_OPS = torch.ops.chanprune
_MAX_DIMS = 64  # of torch's own reductions too; see csrc/channel_norms.cpp
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check(weights: Sequence[Tensor], dims: Sequence[int], p: float) -> None:
    if len(weights) != len(dims):
        raise InvalidArgumentError(
            f"dims should hold one dim per weight, got {len(dims)} for {len(weights)} weights"
        )
    if p not in (1, 2, math.inf):
        raise InvalidArgumentError(f"p should be 1, 2 or math.inf, got {p}")
    for i, (weight, dim) in enumerate(zip(weights, dims, strict=True)):
        check_dense(f"weights[{i}]", weight)
        if weight.dtype not in _FLOATS:
            raise InvalidArgumentError(
                f"weights[{i}] should be float16, bfloat16, float32 or float64, got {weight.dtype}"
            )
        if weight.dim() > _MAX_DIMS:
            raise InvalidArgumentError(
                f"weights[{i}] should have at most {_MAX_DIMS} dims, got {weight.dim()}; "
                f"flatten some of them"
            )
        if not -weight.dim() <= dim < weight.dim():
            raise InvalidArgumentError(
                f"dims[{i}] should be a dim of weights[{i}] of shape {tuple(weight.shape)}, "
                f"got {dim}"
            )
        if weight.device != weights[0].device:
            raise InvalidArgumentError(
                f"all weights should be on one device, got {weights[0].device} for weights[0] and "
                f"{weight.device} for weights[{i}]; move them or call once per device"
            )


def channel_norms(weights: Sequence[Tensor], dims: Sequence[int], p: float = 1.0) -> list[Tensor]:
    """Norm of each slice ``weights[i].select(dims[i], c)``, for all weights in one call.

    Semantics of ``torch.linalg.vector_norm(w, p, all dims but dims[i])``, except that half types
    are accumulated and returned in float32 (a bfloat16 result would tie most channels) and a
    channel without elements has norm 0. Differentiable any number of times. Inside the transforms
    of torch.func `channel_norms_reference` runs instead, which they understand.

    Args:
        weights (Sequence[Tensor[...]]): float16, bfloat16, float32 or float64, any strides, one
            device. Dtypes may differ.
        dims: for each weight the channel dim; negative counts from the end.
        p: 1, 2 or ``math.inf``.

    Returns:
        list[Tensor[channels_i]]: float64 for float64 weights, else float32.

    Raises:
        InvalidArgumentError: an argument is not as described.
    """
    weights = list(weights)
    if not weights and not dims:
        return []
    compiling = torch.compiler.is_compiling()
    native = len(weights) > 0 and native_available(weights[0])
    if native and not compiling:
        native = not inside_transform()
    if not native or compiling or weights[0].is_meta:
        _check(weights, dims, p)
        if not native:
            return channel_norms_reference(weights, dims, p)
        return list(_OPS.channel_norms(weights, list(dims), float(p)))
    try:
        norms: list[Tensor]
        if differentiates(weights):
            norms = _OPS.channel_norms.default(weights, list(dims), float(p))
        else:
            with _AutoDispatchBelowAutograd():  # past the registered gradient, which is Python
                norms = _OPS.channel_norms.default(weights, list(dims), float(p))
        return norms
    except RuntimeError:
        _check(weights, dims, p)  # the kernel checks the same; the culprit is named only here
        raise


def channel_norms_reference(
    weights: Sequence[Tensor], dims: Sequence[int], p: float = 1.0
) -> list[Tensor]:
    """`channel_norms` in plain torch: fallback, test oracle and benchmark baseline."""
    norms = []
    for weight, dim in zip(weights, dims, strict=True):
        channels = widened(weight).movedim(dim, 0).unsqueeze(-1)
        norms.append(_reduce(channels.flatten(1), p))
    return norms


def _reduce(rows: Tensor, p: float) -> Tensor:
    if rows.numel() == 0:
        return rows.new_zeros(rows.shape[0])
    if p == 1:
        return rows.abs().sum(1)
    if p == 2:
        return rows.square().sum(1).sqrt()
    return rows.abs().amax(1)


def _fake(weights: list[Tensor], dims: list[int], p: float) -> list[Tensor]:  # noqa: ARG001
    return [
        weight.new_empty(weight.shape[dim], dtype=accumulation_dtype(weight))
        for weight, dim in zip(weights, dims, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    weights, dims, p = inputs
    ctx.dims = dims
    ctx.p = p
    ctx.save_for_backward(*weights, *output)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[list[Tensor | None], None, None]:
    count = len(ctx.dims)
    weights, norms = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
    return (
        [
            _weight_grad(weight, norm, grad, dim, ctx.p)
            for weight, norm, grad, dim in zip(weights, norms, grads, ctx.dims, strict=True)
        ],
        None,
        None,
    )


def _weight_grad(weight: Tensor, norm: Tensor, grad: Tensor | None, dim: int, p: float) -> Tensor:
    """Derivative of one weight's norms; 0 at the kink of a zero norm, ties of the maximum share."""
    if grad is None:
        return torch.zeros_like(weight)
    shape = [1] * weight.dim()
    shape[dim] = -1
    norm, grad = norm.reshape(shape), grad.reshape(shape)
    values = weight.to(norm.dtype)
    if p == 1:
        result = values.sign() * grad
    elif p == 2:
        result = values * torch.where(norm > 0, grad / norm, torch.zeros_like(norm))
    else:
        winners = (values.abs() == norm).to(norm.dtype)
        others = [d for d in range(weight.dim()) if d != dim % weight.dim()]
        ties = winners.sum(others, keepdim=True) if others else winners
        result = values.sign() * winners * (grad / ties.clamp(min=1))
    return result.to(weight.dtype)


if CPU_MODULE.loaded:
    torch.library.register_fake("chanprune::channel_norms", _fake)
    torch.library.register_autograd(
        "chanprune::channel_norms", _backward, setup_context=_setup_context
    )

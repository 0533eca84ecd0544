"""Normalisation layers: vectors go with the channels; statistics over channels are flagged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from chanprune_ext.analysis.rules.registry import rule
from chanprune_ext.analysis.rules.reshape import split

if TYPE_CHECKING:
    from chanprune_ext.analysis.tracer import Tracer


@rule(
    "aten::native_batch_norm",
    "aten::_native_batch_norm_legit",
    "aten::_native_batch_norm_legit_no_training",
    "aten::_batch_norm_no_update",
    "aten::_batch_norm_with_update",
    "aten::cudnn_batch_norm",
    "aten::miopen_batch_norm",
)
def batch_norm(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """(N, C, ..): weight, bias, mean and variance of channel c go with channel c."""
    dims = tracer.dims(args[0])
    for vector in args[1:5]:
        if isinstance(vector, Tensor) and vector.dim() == 1:
            tracer.unify(dims[1], tracer.dims(vector)[0])
    # The batch's own statistics run over all other dims: no matter of channels for an activation,
    # but for a kernel that is standardised by them.
    training = next((a for a in args[5:6] if isinstance(a, bool)), False)
    if training or not isinstance(args[3], Tensor):
        for d, slots in enumerate(dims):
            if d != 1:
                tracer.flag_normalised(slots)
    # Of a kernel standardised by torch's own batch norm, the result stands for that kernel.
    computed = any(isinstance(v, Tensor) and tracer.origin(v) is None for v in args[1:5])
    tracer.set(output[0], dims, None if computed else tracer.origin(args[0]))


@rule("aten::_weight_norm_interface")
def weight_norm(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """v, g -> g * v / |v|, a norm for every index of one dim. Zeros add nothing to it: exact."""
    direction, size = args[:2]
    dims = tracer.dims(direction)
    for slots, along in zip(dims, tracer.dims(size), strict=True):
        if along.shape == slots.shape:
            tracer.unify(slots, along)
    tracer.set(output[0], dims, tracer.origin(direction))
    tracer.set(output[1], tracer.dims(size))


@rule("aten::native_layer_norm")
def layer_norm(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Statistics over the last dims: equal to the same layer over the kept channels."""
    x, shape, weight, bias = args[:4]
    dims = tracer.dims(x)
    last = dims[len(dims) - len(shape) :]
    for k, slots in enumerate(last):
        tracer.flag_normalised(slots)
        for vector in (weight, bias):
            if isinstance(vector, Tensor):
                tracer.unify(slots, tracer.dims(vector)[k])
    tracer.set(output[0], dims)


@rule("aten::native_group_norm")
def group_norm(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Whole groups go exactly; channels of every group shrink the statistic."""
    x, weight, bias = args[:3]
    groups = args[6]
    dims = tracer.dims(x)
    for vector in (weight, bias):
        if isinstance(vector, Tensor):
            tracer.unify(dims[1], tracer.dims(vector)[0])
    outer, inner = split(tracer, dims[1], (groups, dims[1].shape[1] // groups))
    tracer.flag_normalised(inner)
    tracer.equate(tracer.argument(1, "num_groups"), outer, f"num_groups={groups}")
    tracer.set(output[0], dims)


@rule("aten::_fused_rms_norm", "aten::rms_norm")
def rms_norm(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    x, shape = args[:2]
    weight = args[2] if len(args) > 2 else None
    dims = tracer.dims(x)
    for k, slots in enumerate(dims[len(dims) - len(shape) :]):
        tracer.flag_normalised(slots)
        if isinstance(weight, Tensor):
            tracer.unify(slots, tracer.dims(weight)[k])
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    tracer.set(outputs[0], dims)
    for extra in outputs[1:]:
        tracer.set(extra, [np.empty((0, n), dtype=np.int64) for n in extra.shape])

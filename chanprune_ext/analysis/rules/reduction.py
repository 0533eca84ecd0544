"""Statistics over dimensions, and operations in which every index of a dim sees the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from chanprune_ext.analysis.calls import schema_name, tensors_in
from chanprune_ext.analysis.rules.registry import rule
from chanprune_ext.analysis.rules.zeros import sum_is_exact

if TYPE_CHECKING:
    from chanprune_ext.analysis.tracer import Slots, Tracer


_POSITION = "an index into these channels is computed"
# With a dim, these return positions beside values.
_WITH_POSITION = frozenset({"aten::max", "aten::min", "aten::median", "aten::nanmedian"})


def _reduced_dims(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], rank: int) -> set[int]:
    """The dims a reduction runs over, from its ``dim`` argument (all of them when it has none)."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name in ("dim", "dims", "axis"):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if value is None or value == []:
                return set(range(rank))
            values = value if isinstance(value, (tuple, list)) else (value,)
            return {d % rank for d in values} if rank else set()
    return set(range(rank))


def _reduce(tracer: Tracer, x: Tensor, over: set[int], outputs: list[Tensor]) -> None:
    dims, origin = tracer.dims(x), tracer.origin(x)
    for out in outputs:
        stays = [d for d in range(x.dim()) if out.dim() == x.dim() or d not in over]
        kept: list[Slots] = [
            np.empty((0, 1), dtype=np.int64) if d in over else dims[d] for d in stays
        ]
        tracer.set(
            out,
            kept,
            origin and (origin[0], tuple(None if d in over else origin[1][d] for d in stays)),
        )


@rule("aten::sum", "aten::nansum", "aten::count_nonzero", "aten::any")
def total(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """A removed channel adds nothing, as one that is zero: exact, else like a statistic."""
    x = args[0]
    over = _reduced_dims(func, args, kwargs, x.dim())
    for d in over:
        if not sum_is_exact(tracer, (x, d)):
            tracer.flag_normalised(tracer.dims(x)[d])
    _reduce(tracer, x, over, tensors_in(output))


@rule(
    *(f"aten::{n}" for n in ("mean", "var", "std", "var_mean", "std_mean", "norm", "prod")),
    *(f"aten::{n}" for n in ("amax", "amin", "max", "min", "logsumexp", "linalg_vector_norm")),
    *("aten::all", "aten::median", "aten::nanmedian"),
)
def statistic(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Equal to the same statistic over the kept channels: flagged."""
    x = args[0]
    if len(args) > 1 and isinstance(args[1], Tensor):
        raise ValueError("an element-wise overload")
    over = _reduced_dims(func, args, kwargs, x.dim())
    outputs = tensors_in(output)
    indexed = schema_name(func) in _WITH_POSITION and len(outputs) > 1
    _reduce(tracer, x, over, outputs)
    for d in over:
        slots = tracer.dims(x)[d]
        if indexed:
            tracer.freeze_if_used(outputs[1], slots, _POSITION)
        tracer.flag_normalised(slots)


@rule("aten::argmax", "aten::argmin")
def position(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    x = args[0]
    over = _reduced_dims(func, args, kwargs, x.dim())
    for d in over:
        tracer.freeze(tracer.dims(x)[d], _POSITION)
    _reduce(tracer, x, over, tensors_in(output))


@rule(
    *(
        f"aten::{n}"
        for n in ("_softmax", "softmax", "_log_softmax", "log_softmax", "_safe_softmax")
    ),
    *(f"aten::{n}" for n in ("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")),
    *("aten::sort", "aten::argsort", "aten::flip_order"),
)
def along(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Every index of one dim depends on all others: that dim stays whole."""
    x = args[0]
    for d in _reduced_dims(func, args, kwargs, x.dim()):
        tracer.freeze(tracer.dims(x)[d], "every channel depends on all others")
    for out in tensors_in(output):
        tracer.set(out, tracer.dims(x))


@rule("aten::topk", "aten::kthvalue", "aten::mode")
def selection(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    x = args[0]
    dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
    dim %= x.dim()
    tracer.freeze(tracer.dims(x)[dim], "channels are sorted by value")
    for out in tensors_in(output):
        dims = list(tracer.dims(x))
        if out.dim() == x.dim():
            dims[dim] = np.empty((0, out.shape[dim]), dtype=np.int64)
        else:
            del dims[dim]
        tracer.set(out, dims)

"""Pooling, interpolation and image padding: channels pass, positions stay whole."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from chanprune_ext.analysis.calls import schema_name, tensors_in
from chanprune_ext.analysis.rules.registry import rule
from chanprune_ext.analysis.tracer import anonymous

if TYPE_CHECKING:
    from chanprune_ext.analysis.tracer import Tracer

_SLIDES = "a window slides over these positions"


@rule(
    *(f"aten::{n}" for n in ("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d")),
    *(f"aten::{n}" for n in ("max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices")),
    *(
        f"aten::{n}"
        for n in ("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d")
    ),
    *(f"aten::{n}" for n in ("adaptive_avg_pool2d", "adaptive_avg_pool3d")),
    *(f"aten::{n}" for n in ("adaptive_max_pool2d", "adaptive_max_pool3d")),
    *(f"aten::{n}" for n in ("fractional_max_pool2d", "fractional_max_pool3d")),
    *(f"aten::upsample_{n}" for n in ("nearest1d", "nearest2d", "nearest3d", "linear1d")),
    *(f"aten::upsample_{n}" for n in ("bilinear2d", "bicubic2d", "trilinear3d")),
    *(f"aten::_upsample_{n}" for n in ("nearest_exact1d", "nearest_exact2d", "nearest_exact3d")),
    *(f"aten::_upsample_{n}" for n in ("bilinear2d_aa", "bicubic2d_aa")),
    *(f"aten::{n}_pad{d}d" for n in ("reflection", "replication") for d in (1, 2, 3)),
)
def windows(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """The last one, two or three dims are positions; the name says how many."""
    x = args[0]
    match = re.search(r"(\d)d", schema_name(func))
    spatial = int(match.group(1)) if match else 0
    dims = list(tracer.dims(x))
    passes = [True] * (x.dim() - spatial)
    passes += [_is_a_point(func, args, d) for d in range(spatial)]
    for slots, whole in zip(dims, passes, strict=True):
        if not whole:
            tracer.freeze(slots, _SLIDES)
    result, *positions = tensors_in(output)
    sizes = zip(dims, passes, result.shape, strict=True)
    kept = [slots if whole else anonymous(n) for slots, whole, n in sizes]
    for out in (result, *positions):
        tracer.set(out, kept)
    slid = np.concatenate([slots.ravel() for slots in dims[x.dim() - spatial :]])
    for numbers in positions:
        # Positions of largest values are numbered over all dims that windows could have.
        tracer.freeze_if_used(numbers, slid[None], "a number counts these positions")


def _is_a_point(func: Any, args: tuple[Any, ...], d: int) -> bool:
    """Whether windows of a pooling have size 1 along spatial dim ``d``, and all positions one."""
    if not re.match(r"aten::(avg|max)_pool", schema_name(func)):
        return False
    kernel, stride, padding = args[1], *(args[i] if len(args) > i else () for i in (2, 3))
    # The stride is the kernel's if left out; lists may have one number for all dims.
    sizes = ((kernel, 1), (stride or kernel, 1), (padding or [0], 0))
    return all(size[d if len(size) > 1 else 0] == wanted for size, wanted in sizes)


@rule(*(f"aten::{n}{end}" for n in ("tril", "triu") for end in ("", "_")))
def triangle(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    dims = tracer.dims(args[0])
    for slots in dims[-2:]:
        tracer.freeze(slots, "a triangle of these positions is kept")
    tracer.set(output, dims)


@rule("aten::grid_sampler_2d", "aten::grid_sampler_3d")
def grid_sampler(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    x, grid = args[:2]
    tracer.freeze_tensor(grid, "sampling positions")
    batch, channels, *space = tracer.dims(x)
    for slots in space:
        tracer.freeze(slots, "sampled positions")
    rest = [anonymous(n) for n in output.shape[2:]]
    tracer.set(output, [batch, channels, *rest])

"""Pooling, interpolation and image padding: channels pass, positions stay whole."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from chanprune_ext.analysis.calls import schema_name, tensors_in
from chanprune_ext.analysis.rules.registry import rule

if TYPE_CHECKING:
    from chanprune_ext.analysis.tracer import Tracer


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
    for d in range(x.dim() - spatial, x.dim()):
        tracer.freeze(dims[d], "a window slides over these positions")
    for out in tensors_in(output):
        tracer.set(
            out,
            [
                dims[d] if d < x.dim() - spatial else np.empty((0, n), dtype=np.int64)
                for d, n in enumerate(out.shape)
            ],
        )


@rule("aten::grid_sampler_2d", "aten::grid_sampler_3d")
def grid_sampler(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    x, grid = args[:2]
    tracer.freeze_tensor(grid, "sampling positions")
    batch, channels, *space = tracer.dims(x)
    for slots in space:
        tracer.freeze(slots, "sampled positions")
    rest = [np.empty((0, n), dtype=np.int64) for n in output.shape[2:]]
    tracer.set(output, [batch, channels, *rest])

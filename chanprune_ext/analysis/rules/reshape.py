"""Reshapes, exact by construction: cut both shapes into groups of equal product, merge, split."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from chanprune_ext.analysis.rules.blocks import blocks
from chanprune_ext.analysis.rules.registry import rule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from chanprune_ext.analysis.tracer import Slots, Tracer


def merge(tracer: Tracer, dims: Sequence[Slots]) -> Slots:
    """The slots of several adjacent dimensions seen as one, in C order."""
    merged = dims[0]
    for slots in dims[1:]:
        merged = tracer.store.merge(merged, slots)
    return merged


def split(tracer: Tracer, slots: Slots, sizes: Sequence[int]) -> list[Slots]:
    """The slots of one dimension seen as several: factors of a grid of channels."""
    wide = [j for j, size in enumerate(sizes) if size > 1]
    if len(wide) == 1:
        # It passes whole, and keeps its own labels: those tell who made these channels.
        return [slots if j == wide[0] else slots[:0, :1] for j in range(len(sizes))]
    reason = tracer.reason("a reshape mixes these channels with a fixed size")
    first = tracer.store.size
    pieces = list(tracer.store.split(slots, list(sizes), reason))
    if tracer.store.size > first:
        tracer.note_factors(reason, first, slots, sizes, pieces)
    return pieces


def reshaped(tracer: Tracer, dims: Sequence[Slots], shape: Sequence[int]) -> list[Slots]:
    """The slots of ``shape`` after a reshape of a tensor with slots ``dims``."""
    result: list[Slots] = []
    for before, after in blocks([slots.shape[1] for slots in dims], shape):
        # A dim of size 1 may carry a label (cut from a wider one), so it is merged like any other.
        sources = dims[before]
        merged = merge(tracer, sources) if sources else np.empty((0, 1), dtype=np.int64)
        result.extend(split(tracer, merged, shape[after]))
    return result


@rule(
    "aten::view", "aten::_unsafe_view", "aten::reshape", "aten::_reshape_alias", "aten::view_copy"
)
def view(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    source = args[0]
    if source.dtype != output.dtype or 0 in output.shape:
        raise ValueError("a view of another dtype or of nothing")
    same = source.shape == output.shape
    dims, origin = tracer.dims(source), tracer.origin(source)
    if same or origin is None:
        tracer.set(output, dims if same else reshaped(tracer, dims, output.shape), origin)
        return
    # Dimensions that pass whole are still those of the parameter.
    before = {
        (size, math.prod(source.shape[:d])): whose
        for d, (size, whose) in enumerate(zip(source.shape, origin[1], strict=True))
    }
    whole = tuple(
        before.get((size, math.prod(output.shape[:d]))) if size > 1 else None
        for d, size in enumerate(output.shape)
    )
    tracer.set(output, reshaped(tracer, dims, output.shape), (origin[0], whole))


@rule("aten::pixel_shuffle")
def pixel_shuffle(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """(.., C*r*r, H, W) -> (.., C, H*r, W*r): whole groups of r*r channels may go."""
    *batch, channels, height, width = tracer.dims(args[0])
    r = args[1]
    kept, down, across = split(tracer, channels, (channels.shape[1] // (r * r), r, r))
    for slots in (down, across, height, width):
        tracer.freeze(slots, "pixel shuffle makes image positions of these channels")
    tracer.set(
        output, [*batch, kept, merge(tracer, (height, down)), merge(tracer, (width, across))]
    )


@rule("aten::pixel_unshuffle")
def pixel_unshuffle(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """(.., C, H*r, W*r) -> (.., C*r*r, H, W)."""
    *batch, channels, height, width = tracer.dims(args[0])
    r = args[1]
    for slots in (height, width):
        tracer.freeze(slots, "pixel unshuffle makes channels of these image positions")
    block = np.empty((0, r * r), dtype=np.int64)
    height, width = (np.empty((0, n), dtype=np.int64) for n in output.shape[-2:])
    tracer.set(output, [*batch, merge(tracer, (channels, block)), height, width])


@rule("aten::channel_shuffle", "aten::native_channel_shuffle")
def channel_shuffle(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """(N, C, ..) with C seen as (groups, C / groups) and transposed."""
    batch, channels, *rest = tracer.dims(args[0])
    groups = args[1]
    outer, inner = split(tracer, channels, (groups, channels.shape[1] // groups))
    tracer.equate(tracer.argument(1, "groups"), outer)
    tracer.set(output, [batch, merge(tracer, (inner, outer)), *rest])

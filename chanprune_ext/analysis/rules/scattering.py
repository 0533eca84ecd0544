"""Writing at computed positions: dims that are written along stay whole, the others go together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.analysis.rules.indexing import picks_whole_rows
from chanprune_ext.analysis.rules.registry import rule
from chanprune_ext.analysis.tracer import anonymous

if TYPE_CHECKING:
    from chanprune_ext.analysis.tracer import Tracer

_WRITTEN = "a fixed position of these channels is written"


@rule(
    *(f"aten::index_{kind}{end}" for kind in ("add", "copy", "fill") for end in ("", "_")),
    *(f"aten::index_reduce{end}" for end in ("", "_")),
)
def index_write(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """``x.index_add(dim, positions, source)``: the source is as wide as x in all other dims."""
    target, dim, positions, source = args[:4]
    if not target.dim():
        raise ValueError("a value is written to")
    dim %= target.dim()
    dims = tracer.dims(target)
    tracer.freeze(dims[dim], _WRITTEN)
    tracer.freeze_tensor(positions, _WRITTEN)
    if isinstance(source, Tensor) and source.dim() == target.dim():
        for d, own in enumerate(tracer.dims(source)):
            if d == dim:
                tracer.freeze(own, _WRITTEN)
            else:
                tracer.unify(dims[d], own)
    tracer.set(output, dims)


@rule(
    *(f"aten::scatter{kind}{end}" for kind in ("", "_add", "_reduce") for end in ("", "_")),
)
def scatter(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """``x.scatter(dim, positions, source)``: dims of equal size go together, others stay."""
    target, dim = args[:2]
    if not target.dim():
        raise ValueError("a value is written to")
    dim %= target.dim()
    dims = list(tracer.dims(target))
    tracer.freeze(dims[dim], _WRITTEN)
    for given in tensors_in((args[2:], kwargs)):
        for d, own in enumerate(tracer.dims(given) if given.dim() == target.dim() else ()):
            if d != dim and own.shape[1] == dims[d].shape[1]:
                tracer.unify(dims[d], own)
            else:
                tracer.freeze(own, _WRITTEN)
                tracer.freeze(dims[d], _WRITTEN)
    tracer.set(output, dims)


@rule("aten::masked_scatter", "aten::masked_scatter_")
def masked_scatter(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """``x.masked_scatter(mask, source)``: the source is read in order, row after row of ``x``."""
    given = args[:3]
    target, mask, source = given
    rows = (
        picks_whole_rows(mask)
        and target.shape == output.shape
        and source.shape[-1:] == output.shape[-1:]
    )
    for tensor in given:
        for slots in tracer.dims(tensor)[: -1 if rows else None]:
            tracer.freeze(slots, _WRITTEN)
    channels = tracer.dims(target)[-1]
    for tensor in (mask, source) if rows else ():
        if tensor.shape[-1] == target.shape[-1]:
            tracer.unify(channels, tracer.dims(tensor)[-1])
    whole = [anonymous(n) for n in output.shape]
    tracer.set(output, [*whole[:-1], channels] if rows else whole)

"""Writing along one dim at computed positions: that dim stays whole, the others go together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.analysis.rules.registry import rule

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

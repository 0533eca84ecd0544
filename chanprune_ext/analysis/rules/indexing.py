"""Reading and writing at given positions: the dims that are indexed stay whole, the others pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.analysis.rules.registry import rule
from chanprune_ext.analysis.rules.reshape import merge
from chanprune_ext.analysis.tracer import anonymous

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from chanprune_ext.analysis.tracer import Slots, Tracer

__all__ = ["picks_whole_rows"]

_POSITION = "a fixed position of these channels is read"


@rule("aten::select", "aten::unbind")
def select(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    source = args[0]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % source.dim()
    dims = list(tracer.dims(source))
    read = dims.pop(dim)
    origin = tracer.origin(source)
    if origin is not None:
        origin = origin[0], (*origin[1][:dim], *origin[1][dim + 1 :])
    for out in tensors_in(output):
        tracer.set(out, dims, origin)
        # Code that only asks for the shape of ``x[:, 0]`` reads no channel.
        tracer.freeze_if_used(out, read, _POSITION)


@rule("aten::index_select")
def index_select(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    source, dim, index = args
    dim %= source.dim()
    tracer.freeze(tracer.dims(source)[dim], _POSITION)
    tracer.freeze_tensor(index, _POSITION)
    _set_picked(tracer, output, source, [None if d == dim else d for d in range(source.dim())])


@rule("aten::index")
def index(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """``x[:, [0, 2]]``: dims without an index pass; indexed ones stay whole."""
    source, indices = args
    dims = tracer.dims(source)
    mask = indices[0] if len(indices) == 1 else None
    if mask is not None and _decides_everywhere(mask, source) and picks_whole_rows(mask):
        for tensor in (source, mask):
            for slots in tracer.dims(tensor)[:-1]:
                tracer.freeze(slots, _POSITION)
        tracer.unify(dims[-1], tracer.dims(mask)[-1])
        rows = anonymous(output.numel() // max(source.shape[-1], 1))
        tracer.set(output, [merge(tracer, (rows, dims[-1]))])
        return
    chosen, together = _indexed_dims(tracer, dims, indices)
    # The result of the indices stands where they were, or in front when something is between them.
    place = chosen[0] if together else 0
    rest = [d for d in range(len(dims)) if d not in chosen]
    picked = [None] * (output.dim() - len(rest))
    _set_picked(tracer, output, source, [*rest[:place], *picked, *rest[place:]])


def _set_picked(
    tracer: Tracer, output: Tensor, source: Tensor, whose: Sequence[int | None]
) -> None:
    """Slots of what was picked by index; ``whose`` are the source's dims, None where it was.

    Matrices picked from those packed in one parameter stand for it; rows of a table do not.
    """
    dims, origin = tracer.dims(source), tracer.origin(source)
    sizes = zip(whose, output.shape, strict=True)
    slots = [anonymous(n) if d is None else dims[d] for d, n in sizes]
    if origin is not None and source.dim() > 2:
        origin = origin[0], tuple(None if d is None else origin[1][d] for d in whose)
    else:
        origin = None
    tracer.set(output, slots, origin)
    tracer.note_rows(output, source)


def _indexed_dims(
    tracer: Tracer, dims: Sequence[Slots], indices: Sequence[Tensor | None]
) -> tuple[list[int], bool]:
    """Dims that are read by index, which stay whole, and whether no other dim is between them.

    A mask reads as many dims as it has itself.
    """
    chosen: list[int] = []
    runs = 0
    d = 0
    before: Tensor | None = None
    for given in indices:
        if given is None:
            d += 1
        else:
            width = given.dim() if given.dtype in (torch.bool, torch.uint8) else 1
            chosen += range(d, d + width)
            d += width
            tracer.freeze_tensor(given, _POSITION)
            runs += before is None
        before = given
    for d in chosen:
        tracer.freeze(dims[d], _POSITION)
    return chosen, runs == 1


def picks_whole_rows(mask: Tensor) -> bool:
    """Whether a mask is the same for all channels: one that is stretched over them."""
    return mask.dim() > 0 and (mask.shape[-1] == 1 or mask.stride(-1) == 0)


def _decides_everywhere(mask: Tensor, source: Tensor) -> bool:
    return mask.dtype in (torch.bool, torch.uint8) and mask.shape == source.shape


@rule("aten::index_put", "aten::index_put_", "aten::_unsafe_index_put")
def index_put(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """``x[mask] = value``: indexed dims stay whole, the others go with those of the value."""
    source, indices, value = args[:3]
    dims = tracer.dims(source)
    mask = indices[0] if len(indices) == 1 else None
    if not value.dim() and mask is not None and _decides_everywhere(mask, source):
        # ``x[x < 0] = 0.1``: every position decides for itself, as in masked_fill.
        for own, other in zip(dims, tracer.dims(mask), strict=True):
            tracer.unify(own, other)
        tracer.set(output, dims)
        return
    chosen, together = _indexed_dims(tracer, dims, indices)
    if not value.dim():  # one number for all of them, as some releases of torch pass it
        tracer.set(output, dims)
        return
    after = dims[chosen[-1] + 1 :] if together else ()
    given = tracer.dims(value)
    for slots, own in zip(reversed(after), reversed(given), strict=False):
        if slots.shape[1] == own.shape[1]:
            tracer.unify(slots, own)
        else:
            tracer.freeze(slots, "one value is written to many channels")
            tracer.freeze(own, "one value is written to many channels")
    for slots in given[: max(len(given) - len(after), 0)]:
        tracer.freeze(slots, _POSITION)
    if not together or len(dims) - len(after) != len(chosen):
        for d in set(range(len(dims) - len(after))) - set(chosen):
            tracer.freeze(dims[d], _POSITION)
    tracer.set(output, dims)


@rule("aten::gather")
def gather(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """Read along one dim, which stays whole; the others go with those of the index."""
    source, dim, positions = args[:3]
    if not source.dim():
        raise ValueError("a value is gathered from")
    dim %= source.dim()
    dims = list(tracer.dims(source))
    tracer.freeze(dims[dim], _POSITION)
    for d, own in enumerate(tracer.dims(positions)):
        if d == dim:
            dims[d] = own
        elif own.shape[1] == dims[d].shape[1]:
            tracer.unify(dims[d], own)
        else:
            tracer.freeze(dims[d], _POSITION)
            dims[d] = own
    tracer.set(output, dims)


@rule("aten::_embedding_bag", "aten::_embedding_bag_forward_only")
def embedding_bag(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Sums or means of rows: columns are channels."""
    rows, columns = tracer.dims(args[0])
    tracer.freeze(rows, "an embedding table is indexed by token id")
    for given in tensors_in((args[1:], kwargs)):
        tracer.freeze_tensor(given, "tokens, their weights and the starts of bags belong together")
    tracer.note_role(args[0], 1, "out")
    result, *extras = output
    for each in (result, *extras):
        # Of a maximum there are also the rows it came from.
        whole = [anonymous(n) for n in each.shape]
        tracer.set(each, [*whole[:1], columns] if each.shape == result.shape else whole)


@rule("aten::embedding")
def embedding(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """Rows are looked up by token id and stay; columns are channels."""
    weight, ids = args[:2]
    rows, columns = tracer.dims(weight)
    tracer.freeze(rows, "an embedding table is indexed by token id")
    tracer.note_role(weight, 1, "out")
    tracer.set(output, [*tracer.dims(ids), columns])

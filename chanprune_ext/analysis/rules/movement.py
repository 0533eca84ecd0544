"""Data movement that keeps indices whole: slots move exactly as the data does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chanprune_ext.analysis.rules.blocks import one_of_each_run
from chanprune_ext.analysis.rules.registry import rule
from chanprune_ext.analysis.rules.reshape import merge, reshaped
from chanprune_ext.analysis.tracer import anonymous

if TYPE_CHECKING:
    from torch import Tensor

    from chanprune_ext.analysis.tracer import Slots, Tracer


def _moved(tracer: Tracer, source: Tensor, output: Tensor, order: list[int | None]) -> None:
    """Output dim d is source dim ``order[d]``; None is a new dim of size 1."""
    dims, origin = tracer.recorded(source)
    parts = tracer.parts(source)
    tracer.set(
        output,
        [np.empty((0, 1), dtype=np.int64) if d is None else dims[d] for d in order],
        None
        if origin is None
        else (origin[0], tuple(None if d is None else origin[1][d] for d in order)),
    )
    if parts:
        moved = ((p, tuple(None if d is None else own[d] for d in order)) for p, own in parts)
        tracer.set_parts(output, tuple(moved))


@rule("aten::permute", "aten::permute_copy")
def permute(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    rank = args[0].dim()
    _moved(tracer, args[0], output, [d % rank for d in args[1]])


@rule("aten::transpose", "aten::transpose_", "aten::t", "aten::t_", "aten::swapaxes")
def transpose(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    rank = output.dim()
    order: list[int | None] = list(range(rank))
    if rank > 1:
        a, b = (args[1] % rank, args[2] % rank) if len(args) > 2 else (0, 1)
        order[a], order[b] = order[b], order[a]
    _moved(tracer, args[0], output, order)


@rule("aten::as_strided_")
def restride(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """Only as torch's own pooling uses it: the same shape, strides changed on dims of size 1."""
    dims, origin = tracer.recorded(output)
    strides = [st for n, st in zip(output.shape, output.stride(), strict=True) if n > 1]
    same = tuple(slots.shape[1] for slots in dims) == tuple(output.shape)
    if not same or strides != sorted(strides, reverse=True):
        raise ValueError("strides set by hand")
    tracer.set(output, dims, origin)


@rule("aten::unsqueeze", "aten::unsqueeze_")
def unsqueeze(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    rank = len(tracer.recorded(args[0])[0]) + 1
    order: list[int | None] = list(range(rank - 1))
    order.insert(args[1] % rank, None)
    _moved(tracer, args[0], output, order)


@rule("aten::squeeze", "aten::squeeze_")
def squeeze(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    sizes = [slots.shape[1] for slots in tracer.recorded(args[0])[0]]
    if len(args) > 1:
        chosen = args[1] if isinstance(args[1], (tuple, list)) else (args[1],)
        candidates = {d % len(sizes) for d in chosen}
    else:
        candidates = set(range(len(sizes)))
    order: list[int | None] = [d for d, n in enumerate(sizes) if not (d in candidates and n == 1)]
    _moved(tracer, args[0], output, order)


@rule("aten::expand", "aten::expand_copy", creates=True)
def expand(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """A dim stretched from 1 has the same content everywhere: fresh labels."""
    dims, origin = tracer.dims(args[0]), tracer.origin(args[0])
    offset = output.dim() - len(dims)
    result: list[Slots] = []
    whose: list[int | None] = []
    for d, n in enumerate(output.shape):
        if d >= offset and dims[d - offset].shape[1] == n:
            result.append(dims[d - offset])
            whose.append(None if origin is None else origin[1][d - offset])
            continue
        if d >= offset:
            tracer.freeze(dims[d - offset], "one channel is stretched to many")
        result.append(tracer.fresh(n))
        whose.append(None)
    tracer.set(output, result, None if origin is None else (origin[0], tuple(whose)))


@rule("aten::repeat", creates=True)
def repeat(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    dims = tracer.dims(args[0])
    counts = list(args[1])
    wanted = tracer.argument(1, "repeats")
    given = list(wanted) if isinstance(wanted, (tuple, list)) else list(tracer.call_args[1:])
    offset = len(counts) - len(dims)
    result: list[Slots] = []
    for d, count in enumerate(counts):
        slots = dims[d - offset] if d >= offset else np.empty((0, 1), dtype=np.int64)
        if count == 1:
            result.append(slots)
            continue
        copies = tracer.fresh(count)
        tracer.equate(given[d] if len(given) == len(counts) else count, copies)
        result.append(merge(tracer, (copies, slots)))
    tracer.set(output, result)


@rule("aten::cat", "aten::concat", "aten::concatenate")
def cat(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    # The legacy empty tensor of shape (0,) joins anything and adds nothing.
    tensors = [t for t in args[0] if not (t.dim() == 1 and t.numel() == 0)]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % output.dim()
    parts = [tracer.dims(t) for t in tensors]
    dims: list[Slots] = []
    for d in range(output.dim()):
        if d == dim:
            dims.append(_joined([p[d] for p in parts]))
            continue
        slots = next((p[d] for p in parts if len(p[d])), parts[0][d])
        for part in parts:
            tracer.unify(slots, part[d])
        dims.append(slots)
    tracer.set(output, dims)
    tracer.set_parts(output, tuple((t, tuple(range(t.dim()))) for t in tensors))


def _joined(parts: list[Slots]) -> Slots:
    height = max(len(p) for p in parts)
    return np.concatenate(
        [
            np.concatenate([p, np.zeros((height - len(p), p.shape[1]), dtype=np.int64)])
            for p in parts
        ],
        axis=1,
    )


@rule("aten::stack")
def stack(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % output.dim()
    dims = list(tracer.dims(args[0][0]))
    for tensor in args[0][1:]:
        for d, slots in enumerate(tracer.dims(tensor)):
            tracer.unify(dims[d], slots)
            if len(slots) and not len(dims[d]):
                dims[d] = slots
    dims.insert(dim, np.empty((0, len(args[0])), dtype=np.int64))
    tracer.set(output, dims)
    whose: list[int | None] = list(range(output.dim() - 1))
    whose.insert(dim, None)
    tracer.set_parts(output, tuple((t, tuple(whose)) for t in args[0]))


@rule("aten::_pack_padded_sequence")
def pack_padded_sequence(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """(T, B, ..) -> (N, ..) and how many of the N belong to each step."""
    steps, batch, *rest = tracer.dims(args[0])
    for slots in (steps, batch):
        tracer.freeze(slots, "steps of sequences are packed")
    packed, counts = output
    tracer.set(packed, [anonymous(packed.shape[0]), *rest])
    tracer.set(counts, [anonymous(counts.shape[0])])


@rule("aten::slice")
def slice_(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    source = args[0]
    dim = (args[1] if len(args) > 1 else 0) % source.dim()
    start = args[2] if len(args) > 2 else None
    stop = args[3] if len(args) > 3 else None
    step = args[4] if len(args) > 4 else 1
    dims = list(tracer.dims(source))
    taken = slice(start, stop, step)
    if step == 1:
        dims[dim] = dims[dim][:, taken]
    elif one_of_each_run(dims[dim].shape[1], taken):
        # As of pairs: a run stays or goes as a whole.
        runs, places = reshaped(tracer, [dims[dim]], (dims[dim].shape[1] // step, step))
        tracer.freeze(places, "every n-th of these channels is taken")
        dims[dim] = runs
    else:
        tracer.freeze(dims[dim], "every n-th of some of these channels is taken")
        dims[dim] = dims[dim][:, taken]
    tracer.set(output, dims, tracer.origin(source))


@rule("aten::narrow")
def narrow(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    source, dim, start, length = args
    dims = list(tracer.dims(source))
    dim %= source.dim()
    dims[dim] = dims[dim][:, start : start + length]
    tracer.set(output, dims, tracer.origin(source))


@rule(
    "aten::split",
    "aten::split_with_sizes",
    "aten::chunk",
    "aten::tensor_split",
    "aten::unsafe_split",
)
def split(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    source = args[0]
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % source.dim()
    dims = list(tracer.dims(source))
    whole, start = dims[dim], 0
    for out in output:
        size = out.shape[dim]
        dims[dim] = whole[:, start : start + size]
        start += size
        tracer.set(out, dims, tracer.origin(source))


@rule("aten::glu")
def glu(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """The first half times a gate from the second: index i goes in both."""
    source = args[0]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", -1)) % source.dim()
    dims = list(tracer.dims(source))
    half = output.shape[dim]
    value, gate = dims[dim][:, :half], dims[dim][:, half:]
    tracer.unify(value, gate)
    dims[dim] = value
    tracer.set(output, dims)


@rule("aten::flip")
def flip(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    dims = list(tracer.dims(args[0]))
    for d in args[1]:
        dims[d] = dims[d][:, ::-1]
    tracer.set(output, dims)


@rule("aten::roll")
def roll(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    over = args[2] if len(args) > 2 and args[2] else range(args[0].dim())
    for d in over:
        tracer.freeze(tracer.dims(args[0])[d], "a roll by a fixed distance")
    tracer.set(output, tracer.dims(args[0]))


@rule("aten::constant_pad_nd")
def constant_pad(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """Padding is the same at every index: it may shrink where the pad amount can follow."""
    source, pads = args[:2]
    dims = list(tracer.dims(source))
    wanted = tracer.argument(1, "pad")
    if not (isinstance(wanted, (tuple, list)) and len(wanted) == len(pads)):
        wanted = pads
    for k in range(len(pads) // 2):
        d = len(dims) - 1 - k
        if not len(dims[d]) or min(pads[2 * k : 2 * k + 2]) < 0:
            tracer.freeze(dims[d], "a negative pad cuts channels at a fixed place")
            dims[d] = np.empty((0, output.shape[d]), dtype=np.int64)
            continue
        parts = [dims[d]]
        for side, amount in enumerate(pads[2 * k : 2 * k + 2]):
            if amount:
                labels = tracer.store.fresh(amount)
                slots = np.arange(labels, labels + amount, dtype=np.int64)[None]
                tracer.equate(wanted[2 * k + side], slots, f"padding by {amount}")
                parts.insert(0, slots) if side == 0 else parts.append(slots)
        dims[d] = _joined(parts)
    tracer.set(output, dims)

"""Sums over channels: convolutions and matrix products; what is contracted goes on both sides."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from chanprune_ext.analysis.calls import schema_name
from chanprune_ext.analysis.rules.pointwise import broadcast_dims
from chanprune_ext.analysis.rules.registry import rule
from chanprune_ext.analysis.rules.reshape import merge, split
from chanprune_ext.analysis.rules.zeros import sum_is_exact
from chanprune_ext.analysis.tracer import HEAD_DIM, HEADS, anonymous

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from chanprune_ext.analysis.tracer import Slots, Tracer


@rule("aten::convolution", "aten::_convolution", "aten::convolution_overrideable")
def convolution(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """Plain, grouped, depthwise and transposed convolutions of 1, 2 or 3 spatial dims.

    A grouped one sees its channels as (groups, channels of a group) on both sides: either a whole
    group goes, or the same position of every group.
    """
    x, weight, bias, stride, padding, _, transposed, _output_padding, groups = args[:9]
    batch, channels, *space = tracer.dims(x)
    first, second, *kernel = tracer.dims(weight)
    for slots in kernel:
        tracer.freeze(slots, "kernel positions")
    if transposed:
        in_slots, out_slots = first, second
        tracer.note_role(weight, 0, "in")
        tracer.note_role(weight, 1, "out")
    else:
        out_slots, in_slots = first, second
        tracer.note_role(weight, 0, "out")
        tracer.note_role(weight, 1, "in")
    if groups == 1:
        tracer.unify(channels, in_slots)
        group_slots = None
    elif transposed:
        tracer.unify(channels, in_slots)
        group_slots, _ = split(tracer, channels, (groups, channels.shape[1] // groups))
        out_slots = merge(tracer, (group_slots, out_slots))
    else:
        group_slots, inside = split(tracer, channels, (groups, channels.shape[1] // groups))
        out_groups, _ = split(tracer, out_slots, (groups, out_slots.shape[1] // groups))
        tracer.unify(group_slots, out_groups)
        tracer.unify(inside, in_slots)
    if not sum_is_exact(tracer, (x, 1), (weight, 0 if transposed else 1)):
        tracer.flag_normalised(in_slots)
    if group_slots is not None:
        tracer.equate(tracer.argument(6, "groups"), group_slots, f"groups={groups}")
    if bias is not None:
        tracer.unify(out_slots, tracer.dims(bias)[0])

    dims: list[Slots] = [batch, out_slots]
    for axis, slots in enumerate(space):
        step, pad = (v[axis] if len(v) > 1 else v[0] for v in (stride, padding))
        pointwise = weight.shape[2 + axis] == 1 and step == 1 and pad == 0
        if pointwise and output.shape[2 + axis] == slots.shape[1]:
            dims.append(slots)
        else:
            tracer.freeze(slots, "a convolution slides over these positions")
            dims.append(slots[:0, :1].repeat(output.shape[2 + axis], axis=1))
    tracer.set(output, dims)

    # Each output position sums kernel x (input channels of a group); counted from the side whose
    # positions the kernel visits (the input of a transposed convolution).
    positions = x.shape[2:] if transposed else output.shape[2:]
    fixed = x.shape[0] * math.prod(positions) * math.prod(weight.shape[2:])
    if transposed:
        tracer.cost(fixed, channels, second)
    else:
        tracer.cost(fixed, first, second)


@rule("torchvision::deform_conv2d")
def deformable_convolution(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """A convolution that reads each kernel position where an offset says, of one group.

    It stays one group: the channels of input and weight, whose ratio that is, go together.
    """
    x, weight, offset, mask, bias = args[:5]
    groups, offset_groups = args[11:13]
    if groups != 1 or offset_groups != 1:
        raise ValueError("a deformable convolution of several groups")
    batch, _, *space = tracer.dims(x)
    out_slots, in_slots, *kernel = tracer.dims(weight)
    tracer.note_role(weight, 0, "out")
    tracer.note_role(weight, 1, "in")
    for slots in kernel:
        tracer.freeze(slots, "kernel positions")
    for slots in space:
        tracer.freeze(slots, "a convolution slides over these positions")
    for where in (offset, mask):
        tracer.freeze_tensor(where, "offsets and masks belong to kernel positions")
    contract(tracer, (x, 1), (weight, 1))
    tracer.unify(out_slots, tracer.dims(bias)[0])
    tracer.set(output, [batch, out_slots, *(anonymous(n) for n in output.shape[2:])])
    tracer.cost(math.prod((x.shape[0], *output.shape[2:], *weight.shape[2:])), out_slots, in_slots)


@rule("aten::mm")
def mm(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    _product(tracer, args[0], args[1], output)


@rule("aten::addmm")
def addmm(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    _product(tracer, args[1], args[2], output)
    _add_to_last(tracer, args[0], output)


@rule("aten::linear")
def linear(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """(.., I) x (O, I) -> (.., O)."""
    x, weight = args[:2]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    rest = tracer.dims(x)[:-1]
    out_slots, in_slots = tracer.dims(weight)
    tracer.note_role(weight, 0, "out")
    tracer.note_role(weight, 1, "in")
    if x.dim() == 2:
        tracer.note_role(x, 0, "out")
        tracer.note_role(x, 1, "in")
    contract(tracer, (x, x.dim() - 1), (weight, 1))
    tracer.set(output, [*rest, out_slots])
    if bias is not None:
        _add_to_last(tracer, bias, output)
    tracer.cost(1, *rest, in_slots, out_slots)


@rule("aten::bmm", "aten::baddbmm", "aten::baddbmm_")
def bmm(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """(B, M, K) x (B, K, N) -> (B, M, N), on top of a matrix for ``baddbmm``."""
    *added, left, right = args[:2] if schema_name(func) == "aten::bmm" else args[:3]
    batch, m, k = tracer.dims(left)
    n = tracer.dims(right)[2]
    tracer.unify(batch, tracer.dims(right)[0])
    batch = batch if len(batch) else tracer.dims(right)[0]
    contract(tracer, (left, 2), (right, 1))
    _note_roles(tracer, left, right)
    if tracer.origin(left) is None and tracer.origin(right) is None:
        # A product of activations is attention: of queries and keys, or of weights and values.
        tracer.flag(batch, HEADS)
        tracer.flag(k, HEAD_DIM)
        tracer.flag(n, HEAD_DIM)
    # Also where beta = 0 leaves nothing of it, the added matrix has to be of the result's shape.
    if added:
        for mine, theirs in zip(
            (batch, m, n), broadcast_dims(tracer, added, tuple(output.shape)), strict=True
        ):
            tracer.unify(mine, theirs)
    tracer.set(output, [batch, m, n])
    tracer.cost(1, batch, m, k, n)


@rule("aten::_grouped_mm")
def grouped_mm(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """(T, K) x (E, K, N) -> (T, N): every row meets the matrix of the expert it was sent to."""
    tokens, experts = args[:2]
    if tokens.dim() != 2 or experts.dim() != 3 or (len(args) > 3 and args[3] is not None):
        raise ValueError("a grouped product of other shapes")
    rows, k = tracer.dims(tokens)
    which, _, n = tracer.dims(experts)
    tracer.freeze(which, "experts are chosen by number")
    contract(tracer, (tokens, 1), (experts, 1))
    _note_roles(tracer, tokens, experts)
    tracer.set(output, [rows, n])
    tracer.cost(1, rows, k, n)


@rule("aten::_trilinear")
def bilinear(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """``F.bilinear``: (B, I) x (O, I, J) x (B, J) -> (B, O)."""
    left, weight, right = args[:3]
    if [list(dims) for dims in args[3:7]] != [[1, 3], [0], [1, 2], [2, 3]]:
        raise ValueError("a product of three factors along other dims")
    batch, _ = tracer.dims(left)
    tracer.unify(batch, tracer.dims(right)[0])
    out_slots, first, second = tracer.dims(weight)
    for dim, role in enumerate(("out", "in", "in")):
        tracer.note_role(weight, dim, role)
    contract(tracer, (left, 1), (weight, 1))
    contract(tracer, (right, 1), (weight, 2))
    tracer.set(output, [batch, out_slots])
    tracer.cost(1, batch, out_slots, first, second)


@rule("aten::_cdist_forward", "aten::_euclidean_dist")
def distances(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """(.., P, M) and (.., R, M) -> (.., P, R): removed on both sides, exact if both are zero."""
    rows, columns = args[:2]
    outer, (m, k), (n, other) = batched_matrices(tracer, rows, columns, output.shape[:-2])
    tracer.unify(k, other)
    if not (tracer.zeros(rows)[-1] and tracer.zeros(columns)[-1]):
        tracer.flag_normalised(k)
    tracer.set(output, [*outer, m, n])
    tracer.cost(1, *outer, m, n, k)


@rule("aten::mv")
def mv(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    m, k = tracer.dims(args[0])
    contract(tracer, (args[0], 1), (args[1], 0))
    tracer.note_role(args[0], 0, "out")
    tracer.note_role(args[0], 1, "in")
    tracer.set(output, [m])
    tracer.cost(1, m, k)


@rule("aten::dot", "aten::vdot")
def dot(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    contract(tracer, (args[0], 0), (args[1], 0))


def batched_matrices(
    tracer: Tracer, left: Tensor, right: Tensor, batch: Sequence[int]
) -> tuple[list[Slots], tuple[Slots, Slots], tuple[Slots, Slots]]:
    """The dims that two batches of matrices share once broadcast, and those of each matrix."""
    *first, a, b = broadcast_dims(tracer, [left], (*batch, *left.shape[-2:]))
    *second, c, d = broadcast_dims(tracer, [right], (*batch, *right.shape[-2:]))
    for mine, theirs in zip(first, second, strict=True):
        tracer.unify(mine, theirs)
    outer = [m if len(m) else t for m, t in zip(first, second, strict=True)]
    return outer, (a, b), (c, d)


def contract(tracer: Tracer, left: tuple[Tensor, int], right: tuple[Tensor, int]) -> None:
    """Sum over one dimension of a product: removed on both sides, exact if one of them is zero."""
    slots = tracer.dims(left[0])[left[1]]
    tracer.unify(slots, tracer.dims(right[0])[right[1]])
    if not sum_is_exact(tracer, left, right):
        tracer.flag_normalised(slots)


def _product(tracer: Tracer, left: Tensor, right: Tensor, output: Tensor) -> None:
    m, k = tracer.dims(left)
    n = tracer.dims(right)[1]
    contract(tracer, (left, 1), (right, 0))
    _note_roles(tracer, left, right)
    tracer.set(output, [m, n])
    tracer.cost(1, m, k, n)


def _note_roles(tracer: Tracer, left: Tensor, right: Tensor) -> None:
    """Of a product of matrices (.., M, K) x (.., K, N), what a parameter's dims do."""
    for weight, out_dim, in_dim in ((left, -2, -1), (right, -1, -2)):
        tracer.note_role(weight, out_dim, "out")
        tracer.note_role(weight, in_dim, "in")


def _add_to_last(tracer: Tracer, added: Tensor, output: Tensor) -> None:
    offset = output.dim() - added.dim()
    for k, slots in enumerate(tracer.dims(added)):
        if slots.shape[1] == output.shape[offset + k] and slots.shape[1] > 1:
            tracer.unify(tracer.dims(output)[offset + k], slots)

"""Where a removed channel is zero in the zeroed network, so that summing over it adds nothing.

Removing a channel equals zeroing it wherever the weights that read it are zeroed too. A sum over
the channels themselves has no such weights: there both agree only if the channel *is* zero, as
behind a convolution and a ReLU, but not behind a sigmoid. These rules follow that property from
operation to operation, one truth value for each dimension of each tensor. What they do not know is
not zero.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from torch import Tensor

from chanprune_ext.analysis.calls import schema_name, tensors_in
from chanprune_ext.analysis.handlers import entering
from chanprune_ext.analysis.rules.blocks import blocks

if TYPE_CHECKING:
    from chanprune_ext.analysis.tracer import Slots, Tracer

__all__ = ["follow_zeros", "remembered_zeros", "restore_zeros", "sum_is_exact"]

Remembered = list[tuple[Tensor, tuple["Slots", ...], tuple[bool, ...]]]

Follow = Callable[["Tracer", list[Tensor], tuple[Any, ...], dict[str, Any], Tensor], Sequence[bool]]
_FOLLOW: dict[str, Follow] = {}


def follow_zeros(
    tracer: Tracer,
    func: Any,
    inputs: list[Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    """Set the zeros of every output of an operation whose rule has set its slots."""
    name = schema_name(func).removeprefix("aten::")
    follow = _FOLLOW.get(name) or _FOLLOW.get(name.removesuffix("_"))
    for out in tensors_in(output):
        if not tracer.labelled(out):
            continue
        if follow is None or (_computes(inputs) and not _computes([out])):
            # Where a channel is zero, positions in it (of its largest value, say) are not.
            zeros: Sequence[bool] = [False] * out.dim()
        else:
            zeros = follow(tracer, inputs, args, kwargs, out)
        tracer.set_zeros(out, zeros, changed=any(out is t for t in inputs))


def remembered_zeros(tracer: Tracer, func: Any, inputs: list[Tensor]) -> Remembered:
    """Slots and zeros of the inputs of an in-place operation, whose rule writes over them."""
    if not schema_name(func).endswith("_"):
        return []
    return [
        (tensor, dims, tracer.zeros(tensor))
        for tensor in inputs
        # One that has changed its shape (``x.squeeze_()``) must not be asked for its slots.
        if (dims := tracer.recorded(tensor)[0])
        and tuple(slots.shape[1] for slots in dims) == tuple(tensor.shape)
    ]


def restore_zeros(tracer: Tracer, remembered: Remembered) -> None:
    """Give inputs that an in-place rule has left in place their zeros of before."""
    for tensor, dims, zeros in remembered:
        now = tracer.dims(tensor)
        if tracer.labelled(tensor) and all(a is b for a, b in zip(now, dims, strict=True)):
            tracer.set_zeros(tensor, zeros)


def _computes(tensors: list[Tensor]) -> bool:
    """Whether any of these tensors holds real or complex numbers, not positions or truth values."""
    return any(t.is_floating_point() or t.is_complex() for t in tensors)


def sum_is_exact(tracer: Tracer, *factors: tuple[Tensor, int]) -> bool:
    """Whether a sum over one dimension of a product loses nothing with a removed index."""
    return any(tracer.zeros(tensor)[dim] for tensor, dim in factors)


_on = entering(_FOLLOW)


@_on(
    # Nothing is computed.
    *("alias", "detach", "lift", "lift_fresh", "lift_fresh_copy", "_to_copy", "contiguous"),
    *("clone", "permute", "permute_copy", "transpose", "t", "swapaxes", "as_strided", "unsqueeze"),
    "squeeze",
    *("slice", "narrow", "select", "unbind", "split", "split_with_sizes", "chunk"),
    *("tensor_split", "unsafe_split", "flip", "roll", "tril", "triu"),
    *("index", "index_select", "embedding", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
    "native_channel_shuffle",
    # Functions with f(0) = 0.
    *("relu", "relu6", "neg", "abs", "tanh", "sin", "tan", "sinh", "asin", "atan", "asinh"),
    *("atanh", "sqrt", "square", "sgn", "sign", "floor", "ceil", "round", "trunc", "frac", "erf"),
    *("expm1", "log1p", "gelu", "silu", "hardswish", "hardshrink", "softshrink", "leaky_relu"),
    *("elu", "selu", "celu", "mish", "rrelu", "rrelu_with_noise", "native_dropout", "glu"),
    "_weight_norm_interface",
    # Statistics and windows over other dimensions.
    *("sum", "nansum", "mean", "var", "std", "var_mean", "std_mean", "norm", "prod", "amax"),
    *("amin", "max", "min", "median", "linalg_vector_norm", "cumsum", "cumprod", "sort"),
    *(f"{kind}_pool{d}d" for kind in ("avg", "max", "adaptive_avg") for d in (1, 2, 3)),
    *(f"max_pool{d}d_with_indices" for d in (2, 3)),
    *(f"{kind}_pool{d}d" for kind in ("_adaptive_avg", "adaptive_max") for d in (2, 3)),
    *(f"upsample_{n}" for n in ("nearest1d", "nearest2d", "nearest3d", "linear1d")),
    *(f"upsample_{n}" for n in ("bilinear2d", "bicubic2d", "trilinear3d")),
    *(f"{kind}_pad{d}d" for kind in ("reflection", "replication") for d in (1, 2, 3)),
)
def _kept(
    tracer: Tracer, inputs: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> list[bool]:
    """Zero where the input is: dimension by dimension where it passes whole, else all of them."""
    if len(inputs) == 1:
        before, after = tracer.dims(inputs[0]), tracer.dims(out)
        whole = len(before) == len(after) and all(map(operator.is_, before, after))
        if whole and len(set(map(id, before))) == len(before):
            return list(tracer.zeros(inputs[0]))
    everywhere = all(all(tracer.zeros(t)) for t in inputs)
    result = []
    for slots in tracer.dims(out):
        same = [
            tracer.zeros(t)[d] for t in inputs for d, s in enumerate(tracer.dims(t)) if s is slots
        ]
        result.append(all(same) if same else everywhere)
    return result


@_on("cat", "concat", "concatenate", "stack")
def _joined(
    tracer: Tracer, inputs: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> list[bool]:
    """Zero where every part is."""
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    result = [True] * out.dim()
    for part in inputs:
        zeros = list(tracer.zeros(part))
        if part.dim() < out.dim():
            # Stacked, along a dimension that it does not have; or empty, and adding nothing.
            zeros = [*zeros[:dim], True, *zeros[dim:]] if part.dim() else []
        result = [a and b for a, b in zip_longest(result, zeros, fillvalue=True)]
    return result


@_on("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy")
def _reshaped(
    tracer: Tracer, inputs: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> list[bool]:
    """Dimensions made of several are zero where all of those are, or lose nothing."""
    source = args[0]
    zeros = [
        zero or not len(tracer.store.resolve(slots))
        for slots, zero in zip(tracer.dims(source), tracer.zeros(source), strict=True)
    ]
    result: list[bool] = []
    for before, after in blocks(source.shape, out.shape):
        result += [all(zeros[before])] * len(out.shape[after])
    return result


@_on("nan_to_num")
def _without_nan(
    tracer: Tracer, inputs: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> list[bool]:
    """Zero where the input is, unless that is a quotient of zeros and becomes another number."""
    replacement = args[1] if len(args) > 1 else kwargs.get("nan")
    return [not replacement and zero for zero in tracer.zeros(args[0])]


@_on("prelu", "_prelu_kernel", "masked_fill", "clamp", "clamp_min", "clamp_max", "hardtanh", "pow")
def _of_first(
    tracer: Tracer, inputs: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> list[bool]:
    """Zero where the first input is, if its numbers leave zero alone."""
    name = tracer.op_name.removeprefix("aten::").removesuffix("_")
    numbers = [kwargs.get(k) for k in ("min", "max")] if kwargs else list(args[1:])
    bounds = [*numbers, None, None][:2]
    if name == "masked_fill":
        safe = args[2] == 0 if isinstance(args[2], (int, float)) else False
    elif name == "pow":
        safe = isinstance(args[1], (int, float)) and args[1] > 0
    elif name == "hardtanh":
        low, high = [*args[1:], -1, 1][:2] if len(args) != 2 else (args[1], 1)
        safe = low <= 0 <= high
    elif name == "clamp_max":
        safe = isinstance(args[1], (int, float)) and args[1] >= 0
    elif name in ("clamp", "clamp_min"):
        low, high = bounds
        safe = not any(isinstance(b, Tensor) for b in bounds) and (
            (low is None or low <= 0) and (high is None or high >= 0)
        )
    else:
        safe = True
    first = args[0]
    if not safe or not isinstance(first, Tensor) or first.shape != out.shape:
        return [False] * out.dim()
    return list(tracer.zeros(first))


def _aligned(tracer: Tracer, tensor: Tensor, out: Tensor) -> list[bool]:
    """Zeros of an input seen from the dims of a broadcast result."""
    missing = out.dim() - tensor.dim()
    zeros = tracer.zeros(tensor)
    return [
        d >= missing and tensor.shape[d - missing] == n and zeros[d - missing]
        for d, n in enumerate(out.shape)
    ]


@_on(
    *("add", "sub", "rsub", "maximum", "minimum", "where", "lerp", "copy", "hypot"),
    "masked_scatter",
)
def _sum(
    tracer: Tracer, inputs: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> list[bool]:
    """Zero where all inputs are."""
    name = tracer.op_name.removeprefix("aten::").removesuffix("_")
    if name in ("where", "copy"):
        inputs = inputs[1:]
    elif name == "masked_scatter":
        inputs = inputs[::2]
    if any(isinstance(a, (int, float)) and a != 0 for a in args[:2]):
        return [False] * out.dim()
    parts = [_aligned(tracer, t, out) for t in inputs]
    return [all(p[d] for p in parts) for d in range(out.dim())]


@_on("mul", "div", "addcmul")
def _product(
    tracer: Tracer, inputs: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> list[bool]:
    """Zero where any factor is; of a quotient, where the numerator is."""
    name = tracer.op_name.removeprefix("aten::").removesuffix("_")
    if name == "addcmul":
        start = _aligned(tracer, inputs[0], out)
        inputs = inputs[1:]
    else:
        start = [True] * out.dim()
    if name == "div":
        inputs = inputs[:1] if isinstance(args[0], Tensor) else []
    parts = [_aligned(tracer, t, out) for t in inputs]
    return [start[d] and any(p[d] for p in parts) for d in range(out.dim())]


@_on("expand", "expand_copy")
def _expanded(
    tracer: Tracer, inputs: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> list[bool]:
    return _aligned(tracer, inputs[0], out)


@_on("zeros", "new_zeros", "zeros_like", "zero")
def _nothing(
    tracer: Tracer, inputs: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> list[bool]:
    return [True] * out.dim()


@_on("constant_pad_nd")
def _padded(
    tracer: Tracer, inputs: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> list[bool]:
    value = args[2] if len(args) > 2 else kwargs.get("value", 0)
    return list(tracer.zeros(inputs[0])) if value == 0 else [False] * out.dim()


@_on(
    *("convolution", "_convolution", "convolution_overrideable", "linear", "mm", "bmm", "addmm"),
    "mv",
)
def _contracted(
    tracer: Tracer, inputs: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> list[bool]:
    """Rows of the left and columns of the right pass; an added bias must be zero there too."""
    left, right, *added = (args[1], args[2], args[0]) if tracer.op_name == "aten::addmm" else inputs
    bias = all(tracer.zeros(b)[-1] for b in added)
    result = []
    for slots in tracer.dims(out):
        from_left, from_right = (_zero_along(tracer, factor, slots) for factor in (left, right))
        if from_left is not None:
            result.append((from_left or bool(from_right)) and not added)
        else:
            # Grouped outputs have slots of their own: they belong to the weight.
            result.append((all(tracer.zeros(right)) if from_right is None else from_right) and bias)
    return result


@_on(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
def _attended(
    tracer: Tracer, inputs: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> list[bool]:
    """Averages of values: zero along batch, heads and width where the values are."""
    if out.dim() != args[2].dim():
        return [False] * out.dim()
    *outer, _, width = tracer.zeros(args[2])
    return [*outer, False, width]


@_on("linalg_solve_triangular")
def _solved(
    tracer: Tracer, inputs: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> list[bool]:
    """Where the right-hand side is: a triangular system with nothing to reach."""
    return _aligned(tracer, args[1], out)


def _zero_along(tracer: Tracer, tensor: Tensor, slots: Slots) -> bool | None:
    """Whether ``tensor`` is zero along the dimension with these slots; None if it has none such."""
    zeros = zip(tracer.dims(tensor), tracer.zeros(tensor), strict=True)
    return next((zero for own, zero in zeros if own is slots), None)


@_on(
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
    *("_batch_norm_no_update", "_batch_norm_with_update", "cudnn_batch_norm", "miopen_batch_norm"),
    *("native_layer_norm", "native_group_norm"),
)
def _normalised(
    tracer: Tracer, inputs: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> list[bool]:
    """Zero where scale and shift are."""
    scale, shift = args[2:4] if tracer.op_name == "aten::native_layer_norm" else args[1:3]
    affine = all(isinstance(v, Tensor) and all(tracer.zeros(v)) for v in (scale, shift))
    first = out.dim() - len(args[1]) if tracer.op_name == "aten::native_layer_norm" else 1
    last = out.dim() if tracer.op_name == "aten::native_layer_norm" else 2
    return [affine and first <= d < last for d in range(out.dim())]

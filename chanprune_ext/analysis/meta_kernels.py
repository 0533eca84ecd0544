"""Common operations on stand-ins without values, run without asking torch.

On the meta device torch runs many common operations through Python reference code, up to a
millisecond each, and on fake tensors all of them; a trace sends each of them through two more
layers of Python: together most of the time of a forward without values. Where a call is one of the
everyday kind, all it needs is an empty tensor of a known shape, made here; :func:`lowered` says at
the same time which ATen operation torch would have run, with which arguments. In every other case
torch is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from chanprune_ext.analysis.calls import schema_name
from chanprune_ext.analysis.handlers import entering

__all__ = [
    "UNARY",
    "Lowered",
    "empty",
    "has_no_values",
    "is_plain",
    "lowered",
    "run_operation",
    "unary",
]

_META = torch.device("meta")
_ATEN = torch.ops.aten

# One tensor in, one of the same shape, dtype and strides out. As operations and as calls.
UNARY = frozenset(
    (
        *("gelu", "silu", "relu", "relu6", "sigmoid", "tanh", "hardswish", "hardsigmoid", "mish"),
        *("hardtanh", "leaky_relu", "elu", "softplus", "exp", "rsqrt", "sqrt", "neg"),
    )
)


class Lowered(NamedTuple):
    """A torch-level call as the one ATen operation it comes down to.

    Attributes:
        op: The operation's overload.
        args: Its arguments.
        output: What it returns.
        result: What the call returns.
    """

    op: Any
    args: tuple[Any, ...]
    output: Any
    result: Tensor


Lowering = Callable[[tuple[Any, ...], dict[str, Any]], "Lowered | None"]
_LOWERINGS: dict[str, Lowering] = {}


_on = entering(_LOWERINGS)


def lowered(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lowered | None:
    """Run a torch-level call on stand-ins; None where torch has to be asked.

    Args:
        name: The call's low-level name.
        args: Its positional arguments, all sizes plain.
        kwargs: Its keyword arguments.
    """
    lowering = _LOWERINGS.get(name)
    return None if lowering is None else lowering(args, kwargs)


def has_no_values(x: Any) -> bool:
    """Whether ``x`` is a meta or fake tensor."""
    # Asked whether it is meta, a fake one would ask torch.
    return isinstance(x, Tensor) and (type(x) is FakeTensor or x.is_meta)


def is_plain(x: Any) -> bool:
    """Whether ``x`` is a stand-in of real numbers with at least one dim."""
    return has_no_values(x) and x.is_floating_point() and x.dim() > 0


def _is_dense(x: Any) -> bool:
    """Whether what is computed of ``x`` element by element is laid out row by row."""
    return is_plain(x) and x.is_contiguous()


def _made(like: Tensor, make: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """A tensor without values that is no step of the forward, fake where another one is."""
    with torch._C._DisableTorchDispatch():  # noqa: SLF001
        made = make(*args, **kwargs)
    if type(like) is not FakeTensor:
        return made
    mode = like.fake_mode
    return mode.fake_tensor_converter.from_meta_and_device(mode, made, like.fake_device)


def empty(shape: Any, like: Tensor) -> Tensor:
    """A stand-in of that shape, row by row, of the dtype of another."""
    return _made(like, torch.empty, shape, dtype=like.dtype, device=_META)


def empty_like(x: Tensor) -> Tensor:
    return empty(x.shape, x) if x.is_contiguous() else _made(x, torch.empty_like, x, device=_META)


def unary(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What a function of :data:`UNARY` returns; None where torch has to be asked."""
    x = args[0] if args else None
    if not isinstance(x, Tensor) or not is_plain(x):
        return None
    if len(args) > 1 and any(isinstance(a, Tensor) for a in args[1:]):
        return None
    if kwargs and any(isinstance(a, Tensor) for a in kwargs.values()):
        return None
    return x if name.endswith("_") or kwargs.get("inplace") else empty_like(x)


def _register_unary(name: str, *, numbers: bool = False) -> None:
    """Lower calls of a function of one tensor (and numbers, by position), in place or not."""
    for ending in ("", "_"):
        packet = getattr(_ATEN, name + ending, None)
        if packet is None or "default" not in packet.overloads():
            continue

        def lowering(
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            op: Any = packet.default,
            name: str = name + ending,
        ) -> Lowered | None:
            if kwargs or (len(args) != 1 and not numbers):
                return None
            output = unary(name, args, kwargs)
            return None if output is None else Lowered(op, args, output, output)

        _LOWERINGS[name + ending] = lowering


for _name in ("gelu", "silu", "relu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "mish"):
    _register_unary(_name)
_register_unary("hardtanh", numbers=True)


def _register_sum(name: str, *, in_place: bool) -> None:
    """Lower a call of two tensors of which one is broadcast, if any, to the shape of the other."""
    op = getattr(_ATEN, name).Tensor

    def lowering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lowered | None:
        if kwargs or len(args) != 2 or not (_is_dense(args[0]) and _is_dense(args[1])):
            return None
        a, b = args
        if a.dtype != b.dtype:
            return None
        shape = a.shape
        if shape != b.shape:
            shape = _broadcast(shape, b.shape)
            if shape is None or (in_place and shape != a.shape):
                return None
        output = a if in_place else empty(shape, a)
        return Lowered(op, args, output, output)

    _LOWERINGS[name] = lowering


def _broadcast(a: torch.Size, b: torch.Size) -> torch.Size | None:
    """Of two shapes the one that the other can be broadcast to; None where neither is."""
    if len(a) != len(b):
        return None
    for big, small in ((a, b), (b, a)):
        if all(m in (n, 1) for n, m in zip(big, small, strict=True)):
            return big
    return None


for _name in ("add", "sub", "mul", "div"):
    _register_sum(_name, in_place=False)
    _register_sum(f"{_name}_", in_place=True)


def _numbers(value: Any, rank: int) -> list[int] | None:
    """A window's size along each of ``rank`` dims."""
    if type(value) is int:
        return [value] * rank
    if type(value) in (tuple, list) and len(value) == rank and all(type(v) is int for v in value):
        return list(value)
    return None


@_on("conv1d", "conv2d", "conv3d")
def _convolution(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lowered | None:
    """Of ``(input, weight, bias, stride, padding, dilation, groups)``."""
    if kwargs or len(args) != 7 or not (_is_dense(args[0]) and _is_dense(args[1])):
        return None
    x, weight, bias, *windows, groups = args
    shape, kernel, rank = x.shape, weight.shape, weight.dim() - 2
    if rank < 1 or len(shape) != rank + 2 or x.dtype != weight.dtype or type(groups) is not int:
        return None
    if groups < 1 or shape[1] != kernel[1] * groups or not kernel[1] or kernel[0] % groups:
        return None
    if bias is not None and (bias.shape != kernel[:1] or bias.dtype != x.dtype):
        return None
    stride, padding, dilation = (_numbers(w, rank) for w in windows)
    if stride is None or padding is None or dilation is None:
        return None
    space = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1 if s > 0 else 0
        for n, k, s, p, d in zip(shape[2:], kernel[2:], stride, padding, dilation, strict=True)
    ]
    if min(space) < 1 or min(padding) < 0 or min(dilation) < 1 or not shape[0] or not kernel[0]:
        return None
    output = empty((shape[0], kernel[0], *space), x)
    given = (x, weight, bias, stride, padding, dilation, False, [0] * rank, groups)
    return Lowered(_ATEN.convolution.default, given, output, output)


def _batch_norm(args: tuple[Any, ...]) -> Tensor | None:
    """Of ``(input, weight, bias, running mean and variance, ...)``."""
    if len(args) < 6 or not is_plain(args[0]) or args[0].dim() < 2:
        return None
    channels = args[0].shape[1:2]
    if any(isinstance(v, Tensor) and v.shape != channels for v in args[1:5]):
        return None
    return empty_like(args[0])


@_on("batch_norm")
def _lowered_batch_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lowered | None:
    """Of ``(input, weight, bias, running mean and variance, training, momentum, eps, cudnn)``."""
    if kwargs or len(args) != 9:
        return None
    output = _batch_norm(args)
    if output is None:
        return None
    return Lowered(_ATEN.native_batch_norm.default, args[:8], (output,), output)


def _layer_norm(args: tuple[Any, ...]) -> Tensor | None:
    """Of ``(input, normalized_shape, weight, bias, ...)``."""
    if len(args) < 4 or not is_plain(args[0]):
        return None
    x, shape = args[0], tuple(args[1])
    if any(isinstance(v, Tensor) and tuple(v.shape) != shape for v in args[2:4]):
        return None
    if tuple(x.shape[-len(shape) :]) != shape:
        return None
    return empty(x.shape, x)  # contiguous, whatever the input is


@_on("layer_norm")
def _lowered_layer_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lowered | None:
    """Of ``(input, normalized_shape, weight, bias, eps, cudnn)``."""
    if kwargs or len(args) != 6:
        return None
    output = _layer_norm(args)
    if output is None:
        return None
    given = (args[0], list(args[1]), *args[2:5])
    return Lowered(_ATEN.native_layer_norm.default, given, (output,), output)


@_on("linear")
def _linear(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lowered | None:
    """Of ``(input, weight, bias)``. Torch takes it to pieces; it is one operation all the same."""
    if kwargs or len(args) < 2 or not is_plain(args[0]) or not isinstance(args[1], Tensor):
        return None
    x, weight, bias = (*args, None)[:3]
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    output = empty((*x.shape[:-1], weight.shape[0]), x)
    return Lowered(_ATEN.linear.default, (x, weight, bias), output, output)


@_on("adaptive_avg_pool2d")
def _global_average(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lowered | None:
    """Of ``(input, 1)``: what torch makes a mean of."""
    if kwargs or len(args) != 2 or not _is_dense(args[0]) or _numbers(args[1], 2) != [1, 1]:
        return None
    x = args[0]
    if x.dim() != 4 or not x.numel():
        return None
    output = empty((*x.shape[:2], 1, 1), x)
    return Lowered(_ATEN.mean.dim, (x, [-1, -2], True), output, output)


@_on("cat", "concat")
def _cat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lowered | None:
    """Of ``(tensors, dim)``."""
    if not args or len(args) > 2 or (kwargs and (len(args) > 1 or list(kwargs) != ["dim"])):
        return None
    tensors = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if type(dim) is not int or type(tensors) not in (tuple, list) or not tensors:
        return None
    if not all(_is_dense(t) for t in tensors):
        return None
    first = tensors[0]
    rank = first.dim()
    if not -rank <= dim < rank:
        return None
    at = dim % rank
    shape = list(first.shape)
    for tensor in tensors[1:]:
        other = list(tensor.shape)
        if len(other) != rank or tensor.dtype != first.dtype:
            return None
        if other[:at] != shape[:at] or other[at + 1 :] != shape[at + 1 :]:
            return None
        shape[at] += other[at]
    output = empty(shape, first)
    return Lowered(_ATEN.cat.default, (list(tensors), dim), output, output)


def _moves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this is a stand-in and whole numbers alone."""
    return (
        not kwargs
        and len(args) > 1
        and has_no_values(args[0])
        and all(type(n) is int for n in args[1:])
    )


def _listed(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """``(x, 2, 3)`` for ``(x, (2, 3))``."""
    if len(args) == 2 and type(args[1]) in (tuple, list, torch.Size):
        return args[0], *args[1]
    return args


def _register_listed(name: str) -> None:
    """Lower a view given by sizes or dims, one after the other or in a list."""
    op, view = getattr(_ATEN, name).default, getattr(Tensor, name)

    @_on(name)
    def lowering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lowered | None:
        args = _listed(args)
        if not _moves(args, kwargs):
            return None
        x, *numbers = args
        output = _made(x, view, x, numbers)
        return Lowered(op, (x, numbers), output, output)


for _name in ("view", "permute"):
    _register_listed(_name)


@_on("transpose")
def _transpose(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lowered | None:
    """Of ``(x, dim, dim)``."""
    if len(args) != 3 or not _moves(args, kwargs):
        return None
    output = _made(args[0], Tensor.transpose, *args)
    return Lowered(_ATEN.transpose.int, args, output, output)


def _addmm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Of ``(vector, (M, K), (K, N))``."""
    if kwargs or len(args) != 3 or not is_plain(args[1]):
        return None
    added, left, right = args
    if left.shape[1] != right.shape[0] or added.shape != right.shape[1:]:
        return None
    return empty((left.shape[0], right.shape[1]), left)


def run_operation(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an ATen operation on stand-ins."""
    name = schema_name(func).removeprefix("aten::")
    output: Any = None
    if name.rstrip("_") in UNARY:
        output = unary(name, args, kwargs)
    elif name == "addmm":
        output = _addmm(args, kwargs)
    elif name == "native_batch_norm" and not kwargs:
        normed = _batch_norm(args)
        if normed is not None:
            saved = normed.shape[1] if args[5] else 0
            output = normed, normed.new_empty(saved), normed.new_empty(saved)
    elif name == "native_layer_norm" and not kwargs:
        normed = _layer_norm(args)
        if normed is not None:
            shape = (*normed.shape[: -len(args[1])], *(1 for _ in args[1]))
            output = normed, normed.new_empty(shape), normed.new_empty(shape)
    return func(*args, **kwargs) if output is None else output

"""Size arguments of Python-level calls, turned into equations on surviving channels.

Rules see plain numbers. Here the caller's own arguments are read: a size that came from a shape or
an attribute becomes an equation, a bare number freezes what a plan would change under it.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.analysis.handlers import entering
from chanprune_ext.analysis.provenance import Dim, TracedInt
from chanprune_ext.analysis.rules.blocks import one_of_each_run
from chanprune_ext.analysis.rules.reshape import reshaped

if TYPE_CHECKING:
    from chanprune_ext.analysis.tracer import Tracer

__all__ = ["TAKES_SIZES", "literals_in", "numbers_in", "record_equations"]

Handler = Callable[["Tracer", tuple[Any, ...], dict[str, Any], Any], None]
_HANDLERS: dict[str, Handler] = {}

# Calls that compute with a number they are given, by name without underscores at the ends.
ARITHMETIC = frozenset(
    (
        *("add", "sub", "rsub", "mul", "div", "true_divide", "divide", "floor_divide"),
        *("remainder", "fmod", "pow", "float_power", "lerp", "addcmul", "addcdiv"),
        *("clamp", "clamp_min", "clamp_max", "eq", "ne", "lt", "le", "gt", "ge"),
        *("full", "full_like", "new_full", "fill", "masked_fill"),
        *("tensor", "new_tensor", "as_tensor", "asarray", "scalar_tensor"),
    )
)
# Calls whose numbers the rules of their operations turn into equations themselves.
_READ_BY_RULES = frozenset(
    (
        *(f"conv{d}d" for d in (1, 2, 3)),
        *(f"conv_transpose{d}d" for d in (1, 2, 3)),
        *("convolution", "group_norm", "channel_shuffle", "native_channel_shuffle", "repeat"),
        *("repeat_interleave", "tile", "pad", "constant_pad_nd", "deform_conv2d"),
    )
)
# Calls in which a size may also be a plain number that code has made of one.
TAKES_SIZES = frozenset(
    (
        *("view", "reshape", "expand", "broadcast_to", "_unsafe_view", "unflatten"),
        *("__getitem__", "narrow"),
        *("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"),
        *("zeros", "ones", "empty", "rand", "randn", "new_zeros", "new_ones", "new_empty"),
        *("layer_norm", "rms_norm", "group_norm"),
    )
)
_MAKES_CONSTANTS = frozenset(("tensor", "new_tensor", "as_tensor", "asarray", "scalar_tensor"))
_WORDS = frozenset((bool, str))
_LITERALS = _WORDS | {int}
_NO_NUMBERS = frozenset((Tensor, bool, str, slice, type(None)))


@functools.lru_cache(maxsize=4096)
def computes(name: str) -> bool:
    """Whether a call of this name computes with a number it is given."""
    return name.strip("_") in ARITHMETIC


def record_equations(
    tracer: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Record the equations of one finished call, if its kind takes sizes."""
    handler = _HANDLERS.get(name)
    if handler is not None:
        handler(tracer, args, kwargs, output)
    elif name not in _READ_BY_RULES:
        _keep_values(tracer, [*args, *kwargs.values()])
    if computes(name):
        values = args[{"full": 1, "new_full": 2}.get(name, 0) :]
        _keep_values(tracer, [*values, *(v for k, v in kwargs.items() if k != "size")])


def numbers_in(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[float | complex, ...]:
    """Numbers that a call computes with, as opposed to sizes."""
    if name == "scaled_dot_product_attention":
        return (_attention_scale(args, kwargs),)
    found: list[float | complex] = []
    _collect_numbers((*args, *kwargs.values()) if kwargs else args, name, found, computes(name))
    return tuple(found)


def _collect_numbers(
    values: Iterable[Any], name: str, found: list[float | complex], with_ints: bool
) -> None:
    for value in values:
        kind = type(value)
        if kind is float:
            found.append(value)
        elif kind in _NO_NUMBERS:
            continue
        elif isinstance(value, (int, np.integer)):
            if with_ints:
                found.append(float(value))
        elif isinstance(value, (tuple, list)):
            # In a list, whole numbers are sizes, but for those that a tensor is made of.
            _collect_numbers(value, name, found, name in _MAKES_CONSTANTS)
        elif isinstance(value, dict):
            _collect_numbers(value.values(), name, found, with_ints)
        elif isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.number):
            found += value.ravel().tolist()
        elif isinstance(value, numbers.Complex):
            found.append(float(value) if isinstance(value, numbers.Real) else complex(value))


def literals_in(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Whole numbers, flags and words among a call's arguments, None for traced numbers.

    Code may choose them by a width (``min(8, c // 4)``, or an ``if``), which no equation shows.
    Those that :func:`numbers_in` has are left out.
    """
    if name.startswith("_assert"):  # with a message that tells sizes
        return ()
    found: list[Any] = []
    kinds = _WORDS if computes(name) else _LITERALS
    _collect_literals((*args, *kwargs.values()) if kwargs else args, kinds, found)
    return tuple(found)


def _collect_literals(values: Iterable[Any], kinds: frozenset[type], found: list[Any]) -> None:
    for value in values:
        kind = type(value)
        if kind is Tensor:
            continue
        if kind in kinds:
            found.append(value)
        elif issubclass(kind, TracedInt):
            if int in kinds:
                found.append(None)
        elif issubclass(kind, np.integer):
            if int in kinds:
                found.append(int(value))
        elif isinstance(value, (tuple, list)):
            _collect_literals(value, kinds, found)
        elif kind is slice:
            _collect_literals((value.start, value.stop, value.step), kinds, found)


def _attention_scale(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The scale of the logits: as given, or the default that follows the head width."""
    scale = args[6] if len(args) > 6 else kwargs.get("scale")
    if scale is None:
        query = args[0] if args else kwargs["query"]
        scale = max(query.shape[-1], 1) ** -0.5
    return float(scale)


_on = entering(_HANDLERS)


def _sizes(args: Sequence[Any], kwargs: dict[str, Any], *keys: str) -> list[Any]:
    """Sizes given one by one, as one sequence, or by keyword; some may be tensors of one number."""
    for key in keys:
        if key in kwargs:
            args = (kwargs[key],)
            break
    if len(args) == 1 and isinstance(args[0], (tuple, list)):
        args = args[0]
    return [a for a in args if isinstance(a, (int, Tensor)) and not isinstance(a, bool)]


def _equate_shape(tracer: Tracer, sizes: list[Any], output: Any) -> None:
    for out in tensors_in(output)[:1]:
        if len(sizes) != out.dim():
            return
        for size, slots in zip(sizes, tracer.dims(out), strict=True):
            # A count of tokens, say: what a tensor holds is no width.
            if not isinstance(size, Tensor) and int(size) != -1:
                tracer.equate(size, slots)


@_on("view", "reshape", "expand", "broadcast_to", "_unsafe_view")
def _shape_of_view(
    tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    _equate_shape(tracer, _sizes(args[1:], kwargs, "size", "shape"), output)


@_on("view_as", "reshape_as", "expand_as")
def _shape_of_other(
    tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    given, wanted = args[0], tracer.dims(tracer.argument(1, "other"))
    _equate_shape(tracer, [TracedInt(slots.shape[1], Dim(slots)) for slots in wanted], output)
    if tracer.call_name == "expand_as":
        before = (*[1] * (output.dim() - given.dim()), *given.shape)
        for n, slots, other in zip(before, tracer.dims(output), wanted, strict=True):
            if n != slots.shape[1]:  # stretched for these channels, with nothing of its own
                tracer.unify(slots, other)


def _register_shape(sizes: slice, *names: str) -> None:
    """The shape of a new tensor is the sizes among these positional arguments, or by keyword."""

    @_on(*names)
    def shape_of_new(
        tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        _equate_shape(tracer, _sizes(args[sizes], kwargs, "size"), output)


_register_shape(slice(None), "zeros", "ones", "empty", "rand", "randn")
_register_shape(slice(0, 1), "full")
_register_shape(slice(1, None), "new_zeros", "new_ones", "new_empty")
_register_shape(slice(1, 2), "new_full")


@_on("unflatten")
def _unflatten(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    sizes = _sizes(args[2:3], kwargs, "sizes")
    dims = tracer.dims(output)
    first = int(dim) % args[0].dim()
    for size, slots in zip(sizes, dims[first : first + len(sizes)], strict=False):
        if int(size) != -1:
            tracer.equate(size, slots)


@_on("arange", "linspace", "eye", "tril_indices", "triu_indices", "randperm", "one_hot")
def _positions(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Numbered positions: the count they are made for must stay."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, TracedInt):
            tracer.keep_value(value, "positions are numbered along these channels")


def _keep_values(tracer: Tracer, args: Sequence[Any]) -> None:
    """A size that is computed with changes what the network computes: it must stay."""
    for value in args:
        if isinstance(value, (tuple, list)):
            _keep_values(tracer, value)
        elif isinstance(value, TracedInt):
            tracer.keep_value(value, "their number is used in a computation")


@_on("__getitem__", "__setitem__")
def _getitem(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """``x[:, a:b]``: a and b count the channels that survive before them."""
    x, index = args[0], args[1]
    items = index if isinstance(index, tuple) else (index,)
    dims = tracer.dims(x)
    taken = sum(1 for i in items if i is not None and i is not Ellipsis)
    d = 0
    for item in items:
        if item is None:
            continue
        if item is Ellipsis:
            d += max(x.dim() - taken, 0)
            continue
        if isinstance(item, slice) and d < len(dims):
            _equate_slice(tracer, item, dims[d])
        d += item.dim() if isinstance(item, Tensor) and item.dtype == _bool() else 1


def _bool() -> Any:
    import torch

    return torch.bool


def _equate_slice(tracer: Tracer, item: slice, slots: Any) -> None:
    n = slots.shape[1]
    if isinstance(item.step, TracedInt):
        tracer.keep_value(item.step, "every n-th channel is taken, n being this size")
    start = item.start
    if item.step not in (None, 1) and one_of_each_run(n, slice(start, item.stop, item.step)):
        # A place within each run, and no channels before it that have to stay.
        if isinstance(start, TracedInt):
            tracer.keep_value(start, "a place within every n channels")
        start = None
    for bound in (start, item.stop):
        if bound is None or not isinstance(bound, int) or abs(int(bound)) >= n or int(bound) == 0:
            continue
        if int(bound) < 0:
            tracer.equate(-bound, slots[:, int(bound) :], f"slice at {int(bound)}")
        else:
            tracer.equate(bound, slots[:, : int(bound)], f"slice at {int(bound)}")


@_on("scaled_dot_product_attention")
def _shared_keys(
    tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """``enable_gqa``: how many query heads share a key head is nowhere said, and follows.

    Code that repeats keys itself where this operation can't (behind a mask, say) does so by a
    number it keeps: the one it has asked for. Where there is none, there might be one all the same.
    """
    query, key = tracer.argument(0, "query"), tracer.argument(1, "key")
    if not kwargs.get("enable_gqa") or query.shape[-3] == key.shape[-3]:
        return
    keys, share = key.shape[-3], query.shape[-3] // key.shape[-3]
    _, sharing = reshaped(tracer, [tracer.dims(query)[-3]], (keys, share))
    known = tracer.asked_of(share)
    if known is None:
        tracer.freeze(sharing, "as many queries share a key, which code may know as a number")
    else:
        tracer.equate(known, sharing)


@_on("narrow")
def _narrow(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    names = ("input", "dim", "start", "length")
    x, dim, start, length = (*args, *(kwargs[name] for name in names[len(args) :]))
    slots = tracer.dims(x)[int(dim) % x.dim()]
    if isinstance(start, int) and start > 0:
        tracer.equate(start, slots[:, : int(start)])
    tracer.equate(length, slots[:, int(start) : int(start) + int(length)])


@_on("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def _split(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    size = kwargs.get("split_size_or_sections", kwargs.get("split_size"))
    size = kwargs.get("split_sizes", size) if size is None else size
    if size is None:
        size = args[1]
    dim = int(kwargs.get("dim", args[2] if len(args) > 2 else 0)) % args[0].dim()
    for k, piece in enumerate(output):
        slots = tracer.dims(piece)[dim]
        if isinstance(size, (tuple, list)):
            tracer.equate(size[k], slots, "a split into fixed sizes")
        elif piece.shape[dim] == int(size):
            tracer.equate(size, slots, "a split into pieces of fixed size")


@_on("chunk", "tensor_split", "hsplit", "vsplit", "dsplit")
def _chunk(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Pieces of equal size stay equal; cuts at given places stay as they are."""
    x = args[0]
    dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
    if tracer.call_name in ("hsplit", "vsplit", "dsplit"):
        dim = {"hsplit": min(x.dim() - 1, 1), "vsplit": 0, "dsplit": 2}[tracer.call_name]
    dim = int(dim) % x.dim()
    pieces = [tracer.dims(piece)[dim] for piece in output]
    if not any(len(p) for p in pieces):
        return
    count = next(iter(args[1:2]), next(iter(kwargs.values()), None))
    if not isinstance(count, int):
        for piece in pieces:
            tracer.freeze(piece, "pieces cut at fixed places")
        return
    # All are of one size but a smaller last one, which a replay looks at.
    first = pieces[0]
    for piece in pieces[1:]:
        if piece.shape[1] != first.shape[1]:
            continue
        if len(piece):
            size = TracedInt(first.shape[1], Dim(first))
            tracer.equate(size, piece, "chunks of equal size")
        else:
            tracer.freeze(first, "chunks of equal size")


@_on("layer_norm", "rms_norm")
def _normalised_shape(
    tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    dims = tracer.dims(output)
    for size, slots in zip(shape, dims[len(dims) - len(shape) :], strict=True):
        tracer.equate(size, slots)

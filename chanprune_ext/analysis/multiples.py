"""Tensors that hold a count times a size, and are compared with a size.

``mask.sum() * x.shape[-1] == features.numel()``: code that puts the features of an image in the
place of tokens asks first whether there are as many of both. What is counted is in the tensor; the
answer stays the same whatever it is, as long as both sizes shrink alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from chanprune_ext.analysis.provenance import Const, Op, TracedInt, expression

if TYPE_CHECKING:
    from chanprune_ext.analysis.tracer import Tracer

__all__ = ["follow_multiples"]

_MULTIPLICATIONS = frozenset(("mul", "multiply", "__mul__", "__rmul__"))
_COMPARISONS = frozenset(("eq", "ne", "lt", "le", "gt", "ge"))


def follow_multiples(
    tracer: Tracer, name: str, args: tuple[Any, ...], given: list[Tensor], output: Any
) -> bool:
    """Follow what one finished call does with multiples of sizes.

    Args:
        tracer: What knows them.
        name: The call's name.
        args: Its positional arguments.
        given: Tensors among all of its arguments.
        output: What it returned.

    Returns:
        Whether an equation says what becomes of the numbers that the call was given.
    """
    if name in _MULTIPLICATIONS:
        count, size = _count_and_size(args)
        if size is not None and _only_counts(tracer, count):
            tracer.set_multiple(output, size)
            return True
    if not tracer.any_multiple(given):
        return False
    if name.strip("_") in _COMPARISONS:
        tensor, size = _count_and_size(args)
        multiple = None if tensor is None else tracer.multiple_of(tensor)
        if size is not None and multiple is not None and int(multiple) > 0:
            times, rest = divmod(int(size), int(multiple))
            if not rest:
                left = Op("*", expression(multiple), Const(times))
                tracer.keep_equal(left, expression(size), "two sizes are compared")
                return True
    tracer.keep_multiples(given)
    return False


def _count_and_size(args: tuple[Any, ...]) -> tuple[Tensor | None, TracedInt | None]:
    """The two arguments of a call with a tensor and a size, in either order; else None."""
    for tensor, size in (args, args[::-1]) if len(args) == 2 else ():
        if isinstance(tensor, Tensor) and isinstance(size, TracedInt):
            return tensor, size
    return None, None


def _only_counts(tracer: Tracer, tensor: Tensor | None) -> bool:
    """Whether a tensor holds whole numbers that no channel stands behind."""
    return (
        tensor is not None
        and not tensor.is_floating_point()
        and not tensor.is_complex()
        and not tracer.labelled(tensor)
        and tracer.multiple_of(tensor) is None
    )

"""Integers that remember where they came from, and the equations written with them.

While a model is traced, every size read off a tensor and every int stored on a module is a
:class:`TracedInt`. Arithmetic builds an expression, so that ``x.view(b, g, c // g, h, w)`` turns
into equations between kept channel counts and module attributes, instead of numbers that happen to
match.
"""

from __future__ import annotations

import contextlib
import math
import operator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeAlias

from chanprune_ext.analysis import recollection
from chanprune_ext.analysis.settings import contents_of, derived_of, settings_of
from chanprune_ext.module_tree import modules_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import numpy as np
    from torch import nn

__all__ = [
    "Attribute",
    "Const",
    "Dim",
    "Equation",
    "Expr",
    "GuessedInt",
    "Op",
    "TracedInt",
    "TracedRatio",
    "expression",
    "leaves",
    "may_hold_traced",
    "traced_attributes",
]

# Ints that describe windows, never channel counts.
_WINDOW_NAMES = frozenset(
    {"kernel_size", "stride", "padding", "dilation", "output_padding", "start_dim", "end_dim"}
)

_TRACEABLE = frozenset({int, tuple, list})
_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
}
_FINEST = 4096


@dataclass(frozen=True)
class Const:
    """A plain number."""

    value: int


@dataclass(frozen=True, eq=False)
class Dim:
    """The size of a tensor dimension: as many as survive of its slot columns (int64, (k, n))."""

    slots: np.ndarray


@dataclass(frozen=True)
class Attribute:
    """An int stored on a module: ``module.name``, or ``module.name[position]``.

    The name has a dot for one of the settings that the module holds: ``config.num_heads``, of a
    dict too.
    """

    module: str
    name: str
    position: int | None
    value: int

    def __str__(self) -> str:
        where = "" if self.position is None else f"[{self.position}]"
        return f"{self.module}.{self.name}{where}".lstrip(".")


@dataclass(frozen=True, eq=False)
class Op:
    """``left <symbol> right`` with symbol one of ``+ - * // %``."""

    symbol: str
    left: Expr
    right: Expr


Expr: TypeAlias = "Const | Dim | Attribute | Op"


@dataclass(frozen=True, eq=False)
class Equation:
    """``expr`` equals the surviving size of the columns ``slots``, required by event ``reason``."""

    expr: Expr
    slots: np.ndarray
    reason: int


# Called with both sides when code compares two sizes, and whether they are equal: what follows was
# written for that case.
_NOTICES: list[Callable[[Expr, Expr, bool], None]] = []
# Called with a size that code asks to be larger than another.
_ASKED: list[Callable[[Expr], None]] = []


class TracedInt(int):
    """An int with the expression it was computed by."""

    expr: Expr

    def __new__(cls, value: int, expr: Expr) -> TracedInt:  # noqa: D102 - documented by the class
        self = super().__new__(cls, value)
        self.expr = expr
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return int(self)

    def __copy__(self) -> int:
        return int(self)

    def __pos__(self) -> int:
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, int):
            return NotImplemented  # a tensor compares itself, and is seen to
        equal = int(self) == int(other)
        for notice in _NOTICES:
            notice(self.expr, expression(other), equal)
        return equal

    def __ne__(self, other: object) -> bool:
        return not self == other if isinstance(other, int) else NotImplemented

    def __gt__(self, other: int) -> bool:
        for ask in _ASKED:
            ask(self.expr)
        return super().__gt__(other)

    __hash__ = int.__hash__

    def __int__(self) -> int:
        number = self.__index__()
        recollection.note(number, self.expr, _same)
        return number

    def __neg__(self) -> int:
        return TracedInt(-int(self), Op("*", self.expr, Const(-1)))

    def __truediv__(self, other: Any) -> Any:
        if type(other) is float:
            return _divided(float(self) / other, self.expr, Const(1), other)
        value = super().__truediv__(other)
        if value is NotImplemented or not isinstance(other, int):
            return value
        return TracedRatio(value, self.expr, expression(other))

    def __rtruediv__(self, other: Any) -> Any:
        value = super().__rtruediv__(other)
        return value if value is NotImplemented else TracedRatio(value, Const(other), self.expr)

    def __rshift__(self, other: int) -> int:
        return self // 2 ** int(other)

    def __lshift__(self, other: int) -> int:
        return self * 2 ** int(other)

    def __divmod__(self, other: int) -> tuple[int, int]:
        return self // other, self % other


class GuessedInt(TracedInt):
    """A plain int that equals one made of a traced int by the same code: likely that one."""


class TracedRatio(float):
    """A quotient of two ints; rounded, it is an int again, with the expression it came from."""

    over: Expr
    under: Expr

    def __new__(cls, value: float, over: Expr, under: Expr) -> TracedRatio:  # noqa: D102
        self = super().__new__(cls, value)
        self.over, self.under = over, under
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return float, (float(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> float:
        return float(self)

    def __mul__(self, other: Any) -> Any:
        value = super().__mul__(other)
        if type(other) is float:
            return _multiplied(value, self.over, self.under, other)
        if value is NotImplemented or not isinstance(other, int):
            return value
        return TracedRatio(value, _folded("*", self.over, expression(other)), self.under)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        value = super().__truediv__(other)
        if type(other) is float:
            return _divided(value, self.over, self.under, other)
        if value is NotImplemented or not isinstance(other, int):
            return value
        return TracedRatio(value, self.over, _folded("*", self.under, expression(other)))

    def __int__(self) -> int:
        number = super().__int__()
        if self >= 0:
            recollection.note(number, self._rounded_down, _same)
        return number

    def __floor__(self) -> int:
        return TracedInt(super().__floor__(), self._rounded_down)

    def __trunc__(self) -> int:
        return self.__floor__() if self >= 0 else super().__trunc__()

    def __ceil__(self) -> int:
        if self < 0:
            return super().__ceil__()
        raised = _folded("+", self.over, _folded("-", self.under, Const(1)))
        return TracedInt(super().__ceil__(), _folded("//", raised, self.under))

    def __round__(self, digits: Any = None) -> Any:
        value = super().__round__(digits)
        if digits is not None or value != self:
            return value  # halves go to the even side, which no expression says
        return TracedInt(value, self._rounded_down)

    @property
    def _rounded_down(self) -> Expr:
        return _folded("//", self.over, self.under)


def expression(value: int) -> Expr:
    """The expression of a number: its own if it is traced, else a constant."""
    return value.expr if isinstance(value, TracedInt) else Const(int(value))


def _folded(symbol: str, left: Expr, right: Expr) -> Expr:
    """An operation, or its result where both sides are plain numbers."""
    if isinstance(left, Const) and isinstance(right, Const):
        return Const(_OPERATIONS[symbol](left.value, right.value))
    return Op(symbol, left, right)


def _same(a: Expr, b: Expr) -> bool:
    """Whether two expressions are made of the same sizes in the same way."""
    if isinstance(a, Dim) and isinstance(b, Dim):
        return a.slots.shape == b.slots.shape and bool((a.slots == b.slots).all())
    if isinstance(a, Op) and isinstance(b, Op):
        return a.symbol == b.symbol and _same(a.left, b.left) and _same(a.right, b.right)
    return a == b


def leaves(expr: Expr) -> list[Expr]:
    """The numbers, sizes and attributes an expression is made of."""
    if isinstance(expr, Op):
        return leaves(expr.left) + leaves(expr.right)
    return [expr]


def _multiplied(value: float, over: Expr, under: Expr, factor: float | Fraction) -> float:
    """``value``, a ratio times a factor, as a ratio where that is a half, a quarter and so on."""
    if not math.isfinite(factor) or (share := Fraction(factor)).denominator > _FINEST:
        return value
    numerator = _folded("*", over, Const(share.numerator))
    return TracedRatio(value, numerator, _folded("*", under, Const(share.denominator)))


def _divided(value: float, over: Expr, under: Expr, divisor: float) -> float:
    """As :func:`_multiplied`; there is a value, so the divisor is not zero."""
    factor = 1 / Fraction(divisor) if math.isfinite(divisor) else math.nan
    return _multiplied(value, over, under, factor)


def _arithmetic(symbol: str, method: str) -> None:
    plain = getattr(int, f"__{method}__")

    def forward(self: TracedInt, other: Any) -> Any:
        result = plain(self, other)
        if symbol == "*" and type(other) is float:
            return _multiplied(float(self) * other, self.expr, Const(1), other)
        if result is NotImplemented or not isinstance(other, int):
            return result
        return TracedInt(result, Op(symbol, self.expr, expression(other)))

    def reflected(self: TracedInt, other: Any) -> Any:
        result = plain(other, self) if isinstance(other, int) else NotImplemented
        if result is NotImplemented:
            return result
        return TracedInt(result, Op(symbol, expression(other), self.expr))

    setattr(TracedInt, f"__{method}__", forward)
    setattr(TracedInt, f"__r{method}__", reflected)


for _symbol, _method in (
    ("+", "add"),
    ("-", "sub"),
    ("*", "mul"),
    ("//", "floordiv"),
    ("%", "mod"),
):
    _arithmetic(_symbol, _method)


def _may_be_a_width(name: object) -> bool:
    """Whether a number of this name may be one; keys of dicts can be anything."""
    return (
        isinstance(name, str)
        and name.isidentifier()
        and not name.startswith("__")
        and name not in _WINDOW_NAMES
    )


def _traced(value: Any, module: str, name: str) -> Any:
    """``value`` with its ints traced, or ``value`` itself where there are none."""
    if type(value) is int:
        return TracedInt(value, Attribute(module, name, None, value))
    if type(value) in (tuple, list) and value and all(type(v) is int for v in value):
        return type(value)(TracedInt(v, Attribute(module, name, i, v)) for i, v in enumerate(value))
    return value


@contextlib.contextmanager
def traced_attributes(
    model: nn.Module,
    compared: Callable[[Expr, Expr, bool], None],
    asked: Callable[[Expr], None],
) -> Iterator[None]:
    """Replace the ints stored on all modules by traced ones, and put them back on exit.

    So are those of settings that modules hold.

    Args:
        model: The model about to run.
        compared: Called with the two expressions, and the result, whenever a traced int is compared
            by ``==`` or ``!=``.
        asked: Called with the expression of a traced int that is compared by ``>``.
    """
    replaced: list[tuple[dict[str, Any], str, Any, Any]] = []
    _NOTICES.append(compared)
    _ASKED.append(asked)
    try:
        for path, prefix, owner in [
            *((path, "", module) for path, module in modules_of(model)),
            *((path, f"{name}.", settings) for path, name, settings in settings_of(model)),
        ]:
            held = contents_of(owner)
            for name, value in list(held.items()):
                if type(value) not in _TRACEABLE or not _may_be_a_width(name):
                    continue
                # Torch's own modules call an axis so, others a width.
                if name == "dim" and type(owner).__module__.startswith("torch."):
                    continue
                traced = _traced(value, path, prefix + name)
                if traced is not value:
                    held[name] = traced
                    replaced.append((held, name, value, traced))
        for _, module in modules_of(model):
            for name, derived in derived_of(module).items():
                held = module.__dict__
                replaced.append((held, name, held.get(name), derived))
                held[name] = derived
        yield
    finally:
        _NOTICES.remove(compared)
        _ASKED.remove(asked)
        for held, name, value, traced in reversed(replaced):
            now = held.get(name)
            if now is traced:
                held[name] = value
            elif isinstance(now, TracedInt):
                # The forward computed a new value from the traced one: keep the value only.
                held[name] = int(now)


_TRACED = frozenset((TracedInt, GuessedInt, TracedRatio))


def plain(value: Any) -> Any:
    """``value`` with every traced int inside tuples, lists, dicts and slices made plain."""
    kind = type(value)
    if kind is TracedInt or kind is GuessedInt:
        return value.__index__()
    if kind is TracedRatio:
        return float(value)
    if kind is slice:
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    if kind in (tuple, list):
        return kind(plain(v) for v in value) if may_hold_traced(value) else value
    if kind is dict:
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, tuple) and may_hold_traced(value):
        return tuple(plain(v) for v in value)
    return value


def may_hold_traced(values: Iterable[Any]) -> bool:
    """Whether a traced int is among values and what tuples and lists hold, or may be in a dict."""
    for value in values:
        kind = type(value)
        if kind in _TRACED or kind is slice or kind is dict:
            return True
        if isinstance(value, (tuple, list)) and may_hold_traced(value):
            return True
    return False

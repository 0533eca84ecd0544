"""Surviving sizes as linear functions of what is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chanprune_ext.analysis.equations import attribute_key, attributes_in
from chanprune_ext.analysis.provenance import Attribute, Const, Dim, Equation, Expr, Op

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanprune_ext.analysis import Analysis, CouplingGroup
    from chanprune_ext.analysis.equations import AttributeKey
    from chanprune_ext.analysis.tracer import Slots

__all__ = ["NOTHING", "Coefficients", "LinearSizes"]

_SMALL = 1e-9  # what a coefficient of 0 may be by round-off


@dataclass(frozen=True, eq=False)
class Coefficients:
    """Of a linear function of many unknowns, of which it has few.

    Attributes:
        unknowns: Which these are, rising.
        values: Their coefficients.
    """

    unknowns: np.ndarray
    values: np.ndarray

    def __add__(self, other: Coefficients) -> Coefficients:
        if other is NOTHING or self is NOTHING:
            return self if other is NOTHING else other
        unknowns = np.concatenate([self.unknowns, other.unknowns])
        unknowns, place = np.unique(unknowns, return_inverse=True)
        values = np.bincount(place.ravel(), np.concatenate([self.values, other.values]))
        return Coefficients(unknowns, values)

    def __sub__(self, other: Coefficients) -> Coefficients:
        return self + other * -1.0

    def __mul__(self, factor: float) -> Coefficients:
        return self if self is NOTHING else Coefficients(self.unknowns, self.values * factor)

    def of(self, unknowns: np.ndarray) -> np.ndarray:
        """The coefficients of these unknowns, 0 for those it does not depend on."""
        found = np.zeros(len(unknowns))
        if len(self.unknowns):
            place = np.minimum(np.searchsorted(self.unknowns, unknowns), len(self.unknowns) - 1)
            known = self.unknowns[place] == unknowns
            found[known] = self.values[place[known]]
        return found

    def without_round_off(self) -> Coefficients:
        """The same without coefficients that are 0 but for round-off."""
        used = np.abs(self.values) > _SMALL
        if used.all():
            return self
        return Coefficients(self.unknowns[used], self.values[used]) if used.any() else NOTHING

    @property
    def vanish(self) -> bool:
        """Whether the function depends on no unknown."""
        return not self.values.any()


NOTHING = Coefficients(np.empty(0, dtype=np.int64), np.empty(0))


class LinearSizes:
    """Surviving sizes as linear functions of the unknowns.

    The unknowns are "unit u is kept", over the units of active groups, and the attributes that are
    not the size of something that stays. A function is its coefficients and a constant. (There may
    be millions of units, and thousands of sizes that depend on none or a few of them.)

    Attributes:
        analysis: The model's groups and equations.
        units: How many units there are; the unknowns from there on are attributes.
        start: Index of an active group -> its first unit.
        values: What the unknowns are as long as nothing is removed.
    """

    def __init__(self, analysis: Analysis, active: Sequence[CouplingGroup]) -> None:
        self.analysis = analysis
        starts = np.cumsum([0, *(g.units for g in active)])
        self.units = int(starts[-1])
        self.start = {g.index: int(s) for g, s in zip(active, starts, strict=False)}
        self.unit_of_label = np.full(analysis.trace.store.size, -1, dtype=np.int64)
        for group in active:
            first = self.start[group.index]
            self.unit_of_label[group.roots] = np.arange(first, first + group.units)
        equations = analysis.trace.equations
        found = {attribute_key(a): a.value for e in equations for a in attributes_in(e.expr)}
        self.bound = {attribute_key(e.expr) for e in equations if isinstance(e.expr, Attribute)}
        self.fixed: set[AttributeKey] = set()
        self.attributes = {key: self.units + i for i, key in enumerate(found)}
        self.values = np.r_[np.ones(self.units), np.array(list(found.values()), dtype=float)]
        self.counted: dict[int, tuple[np.ndarray, np.ndarray, float] | None] = {}
        self.none = np.empty(0, dtype=np.int64)
        for equation in equations:
            size = self.size(equation.slots) if isinstance(equation.expr, Attribute) else None
            if size is not None and size[0].vanish:
                self.fixed.add(attribute_key(equation.expr))  # type: ignore[arg-type]

    def size(self, slots: Slots) -> tuple[Coefficients, float] | None:
        """Coefficients and constant; None where two active groups multiply."""
        counted = self._counted(slots)
        if counted is None:
            return None
        units, times, constant = counted
        return Coefficients(units, times.astype(float)) if len(units) else NOTHING, constant

    def units_of(self, slots: Slots) -> np.ndarray:
        """The units that a dimension is made of, rising; none if some of it stays for certain."""
        counted = self._counted(slots)
        return self.none if counted is None or counted[2] else counted[0]

    def _counted(self, slots: Slots) -> tuple[np.ndarray, np.ndarray, float] | None:
        """Units of a dimension, how many indices each has, and how many have none."""
        # Slot arrays live as long as the trace: their identity is a safe key.
        if id(slots) not in self.counted:
            self.counted[id(slots)] = self._count(slots)
        return self.counted[id(slots)]

    def _count(self, slots: Slots) -> tuple[np.ndarray, np.ndarray, float] | None:
        resolved = self.analysis.trace.store.resolve(slots)
        if not len(resolved):
            return self.none, self.none, float(slots.shape[1])
        owners = np.where(resolved > 0, self.unit_of_label[resolved], -1)
        top = owners.max(axis=0)
        if len(owners) > 1 and ((owners >= 0) & (owners != top)).any():
            return None
        used = top[top >= 0]
        units, times = np.unique(used, return_counts=True)
        return units, times, float(len(top) - len(used))

    def of(self, expr: Expr) -> tuple[Coefficients, float] | None:
        """An expression as a linear function; None where it is not one."""
        if isinstance(expr, Dim):
            return self.size(expr.slots)
        if isinstance(expr, Const):
            return NOTHING, float(expr.value)
        if isinstance(expr, Attribute):
            if attribute_key(expr) in self.fixed:
                return NOTHING, float(expr.value)
            return Coefficients(np.array([self.attributes[attribute_key(expr)]]), np.ones(1)), 0.0
        quotient = expr.left if isinstance(expr.left, Op) and expr.left.symbol == "//" else None
        if expr.symbol == "*" and quotient is not None and _same(quotient.right, expr.right):
            return self.of(quotient.left)  # (a // b) * b: code that checks for a remainder
        left, right = self.of(expr.left), self.of(expr.right)
        if left is None or right is None:
            return None
        part = expr.right if isinstance(expr.right, Attribute) else None
        if part is not None and attribute_key(part) not in self.bound and not left[0].vanish:
            # Of two unknowns that multiply, a number of parts keeps its value unless told.
            right = (NOTHING, float(part.value)) if expr.symbol in ("*", "//") else right
        if expr.symbol in "+-":
            sign = 1.0 if expr.symbol == "+" else -1.0
            total = left[1] + sign * right[1]
            return left[0] + right[0] * sign, total
        if left[0].vanish and right[0].vanish and right[1] and expr.symbol in ("//", "%"):
            # Of plain numbers: there is nothing to be linear in, and the rest counts.
            times, rest = divmod(left[1], right[1])
            return NOTHING, times if expr.symbol == "//" else rest
        if right[0].vanish and right[1]:
            if expr.symbol == "*":
                return left[0] * right[1], left[1] * right[1]
            if expr.symbol == "//":
                return left[0] * (1 / right[1]), left[1] / right[1]
        if left[0].vanish and expr.symbol == "*":
            return right[0] * left[1], right[1] * left[1]
        return None

    def rows(self) -> list[Coefficients]:
        """Functions that keep their value: every linear link between sizes."""
        rows: dict[bytes, Coefficients] = {}
        for equation in self.analysis.trace.equations:
            found = self.row(equation)
            if found is not None and not found.vanish:
                rounded = np.round(found.values, 6)
                used = np.flatnonzero(rounded)
                key = found.unknowns[used].tobytes() + rounded[used].tobytes()
                rows.setdefault(key, found)
        return self._binding(list(rows.values()))

    def _binding(self, rows: list[Coefficients]) -> list[Coefficients]:
        """Rows without those that only say what an attribute will be."""
        while True:
            if not rows:
                return rows
            attributes = [row.unknowns[row.unknowns >= self.units] for row in rows]
            once, times = np.unique(np.concatenate(attributes), return_counts=True)
            alone = once[times == 1]
            binding = [
                row
                for row, named in zip(rows, attributes, strict=True)
                if not any(_whole_multiples(row, each) for each in np.intersect1d(named, alone))
            ]
            if len(binding) == len(rows):
                return rows
            rows = binding

    def row(self, equation: Equation) -> Coefficients | None:
        """The link that an equation makes between sizes; None where it is not a linear one."""
        target = self.size(equation.slots)
        if target is None:
            return None
        expr = equation.expr
        whole = self.of(expr)
        if whole is not None:
            return (whole[0] - target[0]).without_round_off()
        if isinstance(expr, Op) and expr.symbol == "//" and target[0].vanish:
            # a // b stays what it is: a follows b.
            left, right = self.of(expr.left), self.of(expr.right)
            if left is not None and right is not None:
                return (left[0] - right[0] * target[1]).without_round_off()
        return None


def _whole_multiples(row: Coefficients, unknown: int) -> bool:
    """Whether a row gives an unknown as a whole multiple of each other one."""
    ratios = row.values / row.of(np.array([unknown]))
    return bool(np.allclose(ratios, np.round(ratios)))


def _same(a: Expr, b: Expr) -> bool:
    if isinstance(a, Dim) and isinstance(b, Dim):
        return a.slots is b.slots
    return not isinstance(a, Op) and a == b

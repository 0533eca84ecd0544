"""Whole counts for groups whose sizes are linked, solved as one small integer program."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chanprune_ext.analysis.equations import attribute_key, attributes_in
from chanprune_ext.analysis.provenance import Attribute, Const, Dim, Equation, Expr, Op

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from chanprune_ext.analysis import Analysis, CouplingGroup
    from chanprune_ext.analysis.equations import AttributeKey
    from chanprune_ext.analysis.tracer import Slots

__all__ = ["pinned_groups", "rounded_count", "rounded_whole", "solve_linked_counts"]

Buckets = dict[int, list[tuple[np.ndarray, int]]]


class _Linear:
    """Surviving sizes as linear functions of the unknowns.

    The unknowns are "unit u is kept", over the units of active groups, and the attributes that are
    not the size of something that stays. A function is its coefficients and a constant.
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
        # Coefficients of all constants: not to be changed. Networks have thousands of units, and
        # most of their sizes depend on none of them.
        self.nothing = np.zeros(len(self.values))
        self.nothing.flags.writeable = False
        self.counted: dict[int, tuple[np.ndarray, np.ndarray, float] | None] = {}
        self.none = np.empty(0, dtype=np.int64)
        for equation in equations:
            size = self.size(equation.slots) if isinstance(equation.expr, Attribute) else None
            if size is not None and self.stays(size[0]):
                self.fixed.add(attribute_key(equation.expr))  # type: ignore[arg-type]

    def size(self, slots: Slots) -> tuple[np.ndarray, float] | None:
        """Coefficients, not to be changed, and constant; None where two active groups multiply."""
        counted = self._counted(slots)
        if counted is None:
            return None
        units, times, constant = counted
        if not len(units):
            return self.nothing, constant
        coefficients = np.zeros(len(self.values))
        coefficients[units] = times
        return coefficients, constant

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

    def of(self, expr: Expr) -> tuple[np.ndarray, float] | None:
        """An expression as a linear function; None where it is not one."""
        if isinstance(expr, Dim):
            return self.size(expr.slots)
        if isinstance(expr, Const):
            return self.nothing, float(expr.value)
        if isinstance(expr, Attribute):
            if attribute_key(expr) in self.fixed:
                return self.nothing, float(expr.value)
            coefficients = np.zeros(len(self.values))
            coefficients[self.attributes[attribute_key(expr)]] = 1.0
            return coefficients, 0.0
        quotient = expr.left if isinstance(expr.left, Op) and expr.left.symbol == "//" else None
        if expr.symbol == "*" and quotient is not None and _same(quotient.right, expr.right):
            return self.of(quotient.left)  # (a // b) * b: code that checks for a remainder
        left, right = self.of(expr.left), self.of(expr.right)
        if left is None or right is None:
            return None
        part = expr.right if isinstance(expr.right, Attribute) else None
        if part is not None and attribute_key(part) not in self.bound and not self.stays(left[0]):
            # Of two unknowns that multiply, a number of parts keeps its value unless told.
            right = (self.nothing, float(part.value)) if expr.symbol in ("*", "//") else right
        if expr.symbol in "+-":
            sign = 1.0 if expr.symbol == "+" else -1.0
            total = left[1] + sign * right[1]
            return (left[0] if self.stays(right[0]) else left[0] + sign * right[0]), total
        if self.stays(right[0]) and right[1]:
            if expr.symbol == "*":
                return self._times(left[0], right[1]), left[1] * right[1]
            if expr.symbol == "//":
                share = left[0] if left[0] is self.nothing else left[0] / right[1]
                return share, left[1] / right[1]
        if self.stays(left[0]) and expr.symbol == "*":
            return self._times(right[0], left[1]), right[1] * left[1]
        return None

    def stays(self, coefficients: np.ndarray) -> bool:
        """Whether a function depends on no unknown."""
        return coefficients is self.nothing or not coefficients.any()

    def _times(self, coefficients: np.ndarray, factor: float) -> np.ndarray:
        return coefficients if coefficients is self.nothing else coefficients * factor

    def rows(self) -> list[np.ndarray]:
        """Rows r that keep their product with the unknowns: every linear link between sizes."""
        rows: dict[bytes, np.ndarray] = {}
        for equation in self.analysis.trace.equations:
            found = self.row(equation)
            if found is None or found is self.nothing:
                continue
            if np.abs(found).max(initial=0.0) > 1e-9:
                rounded = np.round(found, 6)
                used = np.flatnonzero(rounded)
                rows.setdefault(used.tobytes() + rounded[used].tobytes(), found)
        return self._binding(list(rows.values()))

    def _binding(self, rows: list[np.ndarray]) -> list[np.ndarray]:
        """Rows without those that only say what an attribute will be."""
        while True:
            used = np.count_nonzero([row[self.units :] for row in rows], axis=0) if rows else None
            loose = [
                row
                for row in rows
                if any(
                    used is not None
                    and used[i] == 1
                    and np.allclose(row / row[self.units + i], np.round(row / row[self.units + i]))
                    for i in np.flatnonzero(row[self.units :])
                )
            ]
            if not loose:
                return rows
            rows = [row for row in rows if not any(row is other for other in loose)]

    def row(self, equation: Equation) -> np.ndarray | None:
        """The link that an equation makes between sizes; None where it is not a linear one."""
        target = self.size(equation.slots)
        if target is None:
            return None
        expr = equation.expr
        whole = self.of(expr)
        if whole is not None:
            return whole[0] if target[0] is self.nothing else whole[0] - target[0]
        if isinstance(expr, Op) and expr.symbol == "//" and self.stays(target[0]):
            # a // b stays what it is: a follows b.
            left, right = self.of(expr.left), self.of(expr.right)
            if left is not None and right is not None:
                return left[0] - target[1] * right[0]
        return None


def _same(a: Expr, b: Expr) -> bool:
    if isinstance(a, Dim) and isinstance(b, Dim):
        return a.slots is b.slots
    return not isinstance(a, Op) and a == b


def solve_linked_counts(
    analysis: Analysis,
    active: Sequence[CouplingGroup],
    wanted: Mapping[int, float],
    least: Mapping[int, float],
    round_to: int,
) -> Buckets:
    """Whole numbers of units to keep, near ``wanted``, that satisfy every linear size link.

    Args:
        analysis: The model's groups and equations.
        active: Groups that may shrink.
        wanted: Group index -> units to keep, a real number.
        least: Group index -> the fewest units that may be kept, for groups where that is limited.
        round_to: Kept channels of a group are a multiple of this where the group is wide enough.

    Returns:
        Group index -> [(units, how many of them to keep), ...]: the units of one entry are alike in
        every link, so any of them will do. A group that cannot shrink keeps all its units; a linked
        one may lose all of them where the layers it belongs to keep others.
    """
    linear = _Linear(analysis, active)
    result: Buckets = {}
    for groups, own_rows in _components(linear, active, linear.rows()):
        if own_rows:
            result.update(_solve(linear, own_rows, groups, wanted, least, round_to))
        else:
            (group,) = groups
            fewest = least.get(group.index, 1.0)
            count = rounded_count(group, wanted[group.index], round_to, fewest)
            result[group.index] = [(np.arange(group.units), count)]
    return result


def pinned_groups(analysis: Analysis, active: Sequence[CouplingGroup]) -> dict[int, Equation]:
    """Active groups that size links keep whole, whatever is asked of them.

    A sum of units that must not change keeps each of them, since units can only go; and so do
    links in which all else is kept already.

    Returns:
        Group index -> the link that keeps it.
    """
    linear = _Linear(analysis, active)
    rows = [(equation, linear.row(equation)) for equation in analysis.trace.equations]
    links = [(e, row) for e, row in rows if row is not None and row is not linear.nothing]
    free = np.ones(len(linear.values), dtype=bool)
    found: dict[int, Equation] = {}
    progress = True
    while progress:
        progress = False
        for equation, row in links:
            kept = free & (np.abs(row) > 1e-9)
            part = row[kept]
            if not len(part):
                continue
            one_way = not kept[linear.units :].any() and (part.min() > 0 or part.max() < 0)
            if not one_way and len(part) > 1:
                continue
            free[kept] = False
            progress = True
            for group in active:
                own = slice(linear.start[group.index], linear.start[group.index] + group.units)
                if not free[own].any():
                    found.setdefault(group.index, equation)
    return found


def rounded_whole(
    analysis: Analysis,
    active: Sequence[CouplingGroup],
    least: Mapping[int, float],
    round_to: int,
) -> set[int]:
    """Active groups without a smaller count that may be kept: they stay whole.

    Linked groups are none of them: their counts are multiples only where that can be.

    Args:
        analysis: The model's groups and equations.
        active: Groups that may shrink.
        least: As for :func:`solve_linked_counts`.
        round_to: Likewise.
    """
    narrow = {
        g.index
        for g in active
        if rounded_count(g, 0.0, round_to, least.get(g.index, 1.0)) == g.units > 1
    }
    if not narrow:
        return narrow
    linear = _Linear(analysis, active)
    components = _components(linear, active, linear.rows())
    return narrow - {g.index for groups, own_rows in components if own_rows for g in groups}


def _components(
    linear: _Linear, active: Sequence[CouplingGroup], rows: Sequence[np.ndarray]
) -> Iterator[tuple[list[CouplingGroup], list[np.ndarray]]]:
    """Groups that links join, with their links; a group without links comes alone."""
    attributes = np.arange(len(active), len(active) + len(linear.attributes))
    owner = np.r_[np.repeat(np.arange(len(active)), [g.units for g in active]), attributes]
    members = [np.unique(owner[row != 0]) for row in rows]
    component = np.arange(len(active) + len(attributes))
    for joined in members:
        joined = np.unique(component[joined])
        component[np.isin(component, joined)] = joined[0]
    for first in np.unique(component[: len(active)]):
        yield (
            [g for g, c in zip(active, component, strict=False) if c == first],
            [r for r, m in zip(rows, members, strict=True) if component[m[0]] == first],
        )


def rounded_count(group: CouplingGroup, wanted: float, round_to: int, least: float = 1.0) -> int:
    """The count nearest to ``wanted`` whose channels are a multiple of ``round_to``.

    A group in which no multiple lies between ``least`` and all its units stays whole.
    """
    step = _step(group, round_to)
    fewest = max(1, int(np.ceil(least / step)))
    most = group.units // step
    if fewest > most:
        return group.units
    # Of two equally near counts the larger: never more is removed than asked for.
    return min(max(int(np.floor(wanted / step + 0.5)), fewest), most) * step


def _step(group: CouplingGroup, round_to: int) -> int:
    return round_to // int(np.gcd(round_to, group.multiplicity))


def _solve(
    linear: _Linear,
    rows: Sequence[np.ndarray],
    tied: Sequence[CouplingGroup],
    wanted: Mapping[int, float],
    least: Mapping[int, float],
    round_to: int,
) -> Buckets:
    """Minimise the weighted distance to the wanted counts subject to the links."""
    filled = _least_sums(linear, tied)
    matrix = np.stack([*rows, *filled])
    buckets: list[tuple[int, np.ndarray]] = []
    for group in tied:
        first = linear.start[group.index]
        columns = np.round(matrix[:, first : first + group.units], 6)
        _, kind = np.unique(columns, axis=1, return_inverse=True)
        kind = np.asarray(kind).ravel()
        buckets.extend((group.index, np.flatnonzero(kind == k)) for k in range(kind.max() + 1))
    for step in dict.fromkeys((round_to, 1)):
        counts = _integer_program(linear, rows, filled, tied, buckets, wanted, least, step)
        if counts is not None:
            result: Buckets = {}
            for (index, units), count in zip(buckets, counts, strict=True):
                result.setdefault(index, []).append((units, int(count)))
            return result
    return {g.index: [(np.arange(g.units), g.units)] for g in tied}


def _least_sums(linear: _Linear, tied: Sequence[CouplingGroup]) -> list[np.ndarray]:
    """Rows r with ``r @ kept >= 1``: what must not become empty.

    These are the dimensions of parameters that linked groups cover to the last index, and the
    pieces that channels are cut into.
    """
    analysis = linear.analysis
    owned = np.zeros(len(linear.values), dtype=bool)
    covered: dict[tuple[str, int], int] = {}
    for group in tied:
        owned[linear.start[group.index] :][: group.units] = True
        for member in group.members:
            key = member.entry, member.dim
            covered[key] = covered.get(key, 0) + member.indices.size
    found: dict[bytes, np.ndarray] = {}
    dims = [
        analysis.slots[entry, dim]
        for (entry, dim), count in covered.items()
        if count >= analysis.trace.shapes[entry][dim]
    ]
    for slots in (*dims, *(equation.slots for equation in analysis.trace.equations)):
        used = linear.units_of(slots)
        if len(used) and owned[used].all() and used.tobytes() not in found:
            found[used.tobytes()] = row = np.zeros(len(linear.values))
            row[used] = 1.0
    return list(found.values())


def _integer_program(
    linear: _Linear,
    rows: Sequence[np.ndarray],
    filled: Sequence[np.ndarray],
    tied: Sequence[CouplingGroup],
    buckets: list[tuple[int, np.ndarray]],
    wanted: Mapping[int, float],
    least: Mapping[int, float],
    round_to: int,
) -> list[int] | None:
    """Variables: kept units and |distance| per bucket, multiples per group, attributes."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    n, m = len(buckets), len(tied)
    used = np.flatnonzero(np.any([row != 0 for row in rows], axis=0)[linear.units :])
    used += linear.units
    steps = [_step(g, round_to) for g in tied]
    size = 2 * n + m + len(used)
    sizes = np.array([len(units) for _, units in buckets], dtype=float)
    group_units = {g.index: g.units for g in tied}
    goal = np.array([wanted[i] * len(units) / group_units[i] for i, units in buckets], dtype=float)
    first_unit = [linear.start[index] + int(units[0]) for index, units in buckets]
    blocks: list[tuple[np.ndarray, float, float]] = []
    for row in rows:
        line = np.r_[row[first_unit], np.zeros(n + m), row[used]]
        total = float(line[:n] @ sizes + row[used] @ linear.values[used])
        blocks.append((line, total, total))
    blocks.extend((np.r_[row[first_unit], np.zeros(size - n)], 1.0, np.inf) for row in filled)
    for b in range(n):
        for sign in (1.0, -1.0):
            line = np.zeros(size)
            line[b], line[n + b] = sign, -1.0
            blocks.append((line, -np.inf, sign * goal[b]))
    for k, group in enumerate(tied):
        line = np.zeros(size)
        line[:n] = [index == group.index for index, _ in buckets]
        if group.index in least:
            blocks.append((line.copy(), least[group.index], np.inf))
        if 1 < steps[k] <= group.units:
            line[2 * n + k] = -float(steps[k])
            blocks.append((line, 0.0, 0.0))
    weight = np.array([float(group_channels(tied, i)) for i, _ in buckets])
    solution = milp(
        # Distance first; among equal plans the one that keeps more.
        np.r_[-1e-4 * weight, weight, np.zeros(size - 2 * n)],
        constraints=LinearConstraint(
            np.stack([b[0] for b in blocks]), [b[1] for b in blocks], [b[2] for b in blocks]
        ),
        integrality=np.r_[np.ones(n), np.zeros(n), np.ones(size - 2 * n)],
        bounds=Bounds(np.zeros(size), np.r_[sizes, np.full(size - n, np.inf)]),
        options={"time_limit": 20.0},
    )
    if solution.x is None:
        return None
    return [round(v) for v in solution.x[:n]]


def group_channels(groups: Sequence[CouplingGroup], index: int) -> int:
    """Channels one unit of a group stands for."""
    return next(g.multiplicity for g in groups if g.index == index)

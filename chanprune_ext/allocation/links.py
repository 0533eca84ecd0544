"""Whole counts for groups whose sizes are linked, solved as one small integer program."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .linear_sizes import Coefficients, LinearSizes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from chanprune_ext.analysis import Analysis, CouplingGroup
    from chanprune_ext.analysis.provenance import Equation

__all__ = ["pinned_groups", "rounded_count", "rounded_whole", "solve_linked_counts"]

Buckets = dict[int, list[tuple[np.ndarray, int]]]


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
    linear = LinearSizes(analysis, active)
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
    linear = LinearSizes(analysis, active)
    rows = [(equation, linear.row(equation)) for equation in analysis.trace.equations]
    links = [(equation, row) for equation, row in rows if row is not None]
    free = np.ones(len(linear.values), dtype=bool)
    found: dict[int, Equation] = {}
    progress = True
    while progress:
        progress = False
        for equation, row in links:
            open_ones = free[row.unknowns]
            kept, part = row.unknowns[open_ones], row.values[open_ones]
            if not len(part):
                continue
            one_way = kept[-1] < linear.units and (part.min() > 0 or part.max() < 0)
            if not one_way and len(part) > 1:
                continue
            free[kept] = False
            progress = True
            for group in _owners(linear, active, kept):
                own = slice(linear.start[group.index], linear.start[group.index] + group.units)
                if not free[own].any():
                    found.setdefault(group.index, equation)
    return found


def _owners(
    linear: LinearSizes, active: Sequence[CouplingGroup], unknowns: np.ndarray
) -> list[CouplingGroup]:
    """The groups that some of the unknowns are units of."""
    starts = [linear.start[g.index] for g in active]
    units = unknowns[unknowns < linear.units]
    return [active[i] for i in np.unique(np.searchsorted(starts, units, side="right") - 1)]


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
    linear = LinearSizes(analysis, active)
    components = _components(linear, active, linear.rows())
    return narrow - {g.index for groups, own_rows in components if own_rows for g in groups}


def _components(
    linear: LinearSizes, active: Sequence[CouplingGroup], rows: Sequence[Coefficients]
) -> Iterator[tuple[list[CouplingGroup], list[Coefficients]]]:
    """Groups that links join, with their links; a group without links comes alone."""
    attributes = np.arange(len(active), len(active) + len(linear.attributes))
    owner = np.r_[np.repeat(np.arange(len(active)), [g.units for g in active]), attributes]
    members = [np.unique(owner[row.unknowns]) for row in rows]
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
    linear: LinearSizes,
    rows: Sequence[Coefficients],
    tied: Sequence[CouplingGroup],
    wanted: Mapping[int, float],
    least: Mapping[int, float],
    round_to: int,
) -> Buckets:
    """Minimise the weighted distance to the wanted counts subject to the links."""
    filled = _least_sums(linear, tied)
    buckets = [
        (group.index, units) for group in tied for units in _alike(linear, [*rows, *filled], group)
    ]
    for step in dict.fromkeys((round_to, 1)):
        counts = _integer_program(linear, rows, filled, tied, buckets, wanted, least, step)
        if counts is not None:
            result: Buckets = {}
            for (index, units), count in zip(buckets, counts, strict=True):
                result.setdefault(index, []).append((units, int(count)))
            return result
    return {g.index: [(np.arange(g.units), g.units)] for g in tied}


def _alike(
    linear: LinearSizes, rows: Sequence[Coefficients], group: CouplingGroup
) -> Iterator[np.ndarray]:
    """The units of a group, those together that every row counts alike."""
    first = linear.start[group.index]
    kind = np.zeros(group.units, dtype=np.int64)
    for row in rows:
        begin, end = np.searchsorted(row.unknowns, (first, first + group.units))
        if begin == end:
            continue
        counted = np.zeros(group.units)
        counted[row.unknowns[begin:end] - first] = np.round(row.values[begin:end], 6)
        _, inverse = np.unique(np.stack([kind, counted]), axis=1, return_inverse=True)
        kind = np.asarray(inverse).ravel()
    for k in range(int(kind.max()) + 1):
        yield np.flatnonzero(kind == k)


def _least_sums(linear: LinearSizes, tied: Sequence[CouplingGroup]) -> list[Coefficients]:
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
    found: dict[bytes, Coefficients] = {}
    dims = [
        analysis.slots[entry, dim]
        for (entry, dim), count in covered.items()
        if count >= analysis.trace.shapes[entry][dim]
    ]
    for slots in (*dims, *(equation.slots for equation in analysis.trace.equations)):
        used = linear.units_of(slots)
        if len(used) and owned[used].all():
            found.setdefault(used.tobytes(), Coefficients(used, np.ones(len(used))))
    return list(found.values())


def _integer_program(
    linear: LinearSizes,
    rows: Sequence[Coefficients],
    filled: Sequence[Coefficients],
    tied: Sequence[CouplingGroup],
    buckets: list[tuple[int, np.ndarray]],
    wanted: Mapping[int, float],
    least: Mapping[int, float],
    round_to: int,
) -> list[int] | None:
    """Variables: kept units and |distance| per bucket, multiples per group, attributes."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    n, m = len(buckets), len(tied)
    used = np.unique(np.concatenate([row.unknowns for row in rows]))
    used = used[used >= linear.units]
    steps = [_step(g, round_to) for g in tied]
    size = 2 * n + m + len(used)
    sizes = np.array([len(units) for _, units in buckets], dtype=float)
    group_units = {g.index: g.units for g in tied}
    goal = np.array([wanted[i] * len(units) / group_units[i] for i, units in buckets], dtype=float)
    first_unit = np.array([linear.start[index] + int(units[0]) for index, units in buckets])
    blocks: list[tuple[np.ndarray, float, float]] = []
    for row in rows:
        line = np.r_[row.of(first_unit), np.zeros(n + m), row.of(used)]
        total = float(line[:n] @ sizes + row.of(used) @ linear.values[used])
        blocks.append((line, total, total))
    blocks.extend((np.r_[row.of(first_unit), np.zeros(size - n)], 1.0, np.inf) for row in filled)
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

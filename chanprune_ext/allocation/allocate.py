"""How many units each group keeps, and which ones.

Without coupling between sizes a group's count follows from its ratio alone. Where sizes are linked
(chunks that stay equal, one attribute that serves two layers) the counts of all linked groups are
solved together as a small integer program.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chanprune_ext.errors import BudgetError, NothingToPruneError

from .links import solve_linked_counts
from .named_channels import units_of_channels
from .normalisation import NORMALISATIONS
from .selection import (
    Goal,
    active_groups,
    fewest_units,
    group_ratios,
    is_named,
    why_nothing,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from chanprune_ext.analysis import Analysis, CouplingGroup
    from chanprune_ext.analysis.groups import Sizes

    from .selection import Selection

__all__ = ["allocate"]

_SAVING_ROUNDS = 3  # how often savings are computed again next to what has gone
_REFINEMENTS = 8  # how often the search for a budget skips a group that does not fit


def allocate(
    analysis: Analysis,
    scores: Sequence[np.ndarray],
    selection: Selection,
    parameter_names: Sequence[str],
    held: frozenset[int] = frozenset(),
) -> dict[int, np.ndarray]:
    """Choose the units to remove.

    Args:
        analysis: Groups of the model.
        scores: One score per unit of each group, high = keep.
        selection: What the user asked for.
        parameter_names: Parameters that a params budget counts.
        held: Indices of groups that must stay whole.

    Returns:
        Group index -> bool (units,), True where a unit is removed. No layer is left empty.

    Raises:
        InvalidArgumentError: A glob names no group, or a channel that was named can't go.
        NothingToPruneError: No group may be pruned.
    """
    if selection.remove is not None:
        return units_of_channels(analysis, selection.remove, selection.kinds)
    ratios = group_ratios(analysis, selection)
    active = active_groups(analysis, selection, held, ratios)
    if not active:
        raise NothingToPruneError(why_nothing(analysis, selection, held))
    by_ratio = {g.index: g.units * (1 - ratios[g.index]) for g in active}
    if selection.budget is not None:
        fixed = {g.index: by_ratio[g.index] for g in active if is_named(g, selection)}
        return _meet_budget(analysis, scores, selection, active, parameter_names, fixed)
    if selection.threshold is not None:
        wanted = {g.index: float(np.sum(scores[g.index] >= selection.threshold)) for g in active}
        least = fewest_units(active, selection)
        wanted = {i: max(w, least[i]) for i, w in wanted.items()}
    elif selection.scope != "local":
        pool = [g for g in active if not is_named(g, selection)]
        least = fewest_units(pool, selection)
        wanted = {**by_ratio, **_ranked_counts(analysis, pool, scores, selection, selection.ratio)}
    else:
        least, wanted = {}, by_ratio
    return _select(analysis, scores, active, wanted, least, selection.round_to)


def _select(
    analysis: Analysis,
    scores: Sequence[np.ndarray],
    active: Sequence[CouplingGroup],
    wanted: Mapping[int, float],
    least: Mapping[int, float],
    round_to: int,
) -> dict[int, np.ndarray]:
    """Whole counts near the wanted ones, then the lowest scores of each group."""
    buckets = solve_linked_counts(analysis, active, wanted, least, round_to)
    removed: dict[int, np.ndarray] = {}
    for group in active:
        mask = np.zeros(group.units, dtype=bool)
        score = scores[group.index]
        for units, keep in buckets[group.index]:
            # Stable: of equal scores the later channel goes.
            order = units[np.argsort(-score[units], kind="stable")]
            mask[order[keep:]] = True
        if mask.any():
            removed[group.index] = mask
    return removed


def _ranked_counts(
    analysis: Analysis,
    pool: Sequence[CouplingGroup],
    scores: Sequence[np.ndarray],
    selection: Selection,
    ratio: float,
    savings: Mapping[int, float] | None = None,
) -> dict[int, float]:
    """One threshold over all groups, or one for those of the same build each.

    Args:
        analysis: Groups of the model.
        pool: Groups that are ranked.
        scores: One score per unit of each group.
        selection: What the user asked for.
        ratio: Share of all units that goes, of each build alike.
        savings: Group index -> what the removal of one unit saves: scores count per saving.
    """
    least = fewest_units(pool, selection)
    counts: dict[int, float] = {}
    for groups in [pool] if selection.scope == "global" else _isomorphic(analysis, pool):
        ranked = [
            NORMALISATIONS[selection.normalise](scores[g.index])
            / (1.0 if savings is None else max(savings[g.index], 1e-12))
            for g in groups
        ]
        taken = _lowest(ranked, [g.units - least[g.index] for g in groups], ratio)
        counts.update({g.index: float(g.units - n) for g, n in zip(groups, taken, strict=True)})
    return counts


def _isomorphic(
    analysis: Analysis, pool: Sequence[CouplingGroup]
) -> Iterable[Sequence[CouplingGroup]]:
    """Groups that touch the same dimensions of the same sorts of parameters, together.

    Widths and kernel sizes may differ, and so may the number of layers that add to one stream.
    """
    builds: dict[tuple[str, frozenset[tuple[str, int, str, int]]], list[CouplingGroup]] = {}
    for group in pool:
        touched = frozenset(
            (m.role, m.dim, m.entry.rpartition(".")[2], len(analysis.trace.shapes[m.entry]))
            for m in group.members
        )
        builds.setdefault((group.kind, touched), []).append(group)
    return builds.values()


def _lowest(ranked: Sequence[np.ndarray], spare: Sequence[float], ratio: float) -> np.ndarray:
    """How many units of each group are among the lowest of all, none losing more than it can spare.

    Args:
        ranked: Scores of each group's units, comparable.
        spare: The most units that each group may lose.
        ratio: Share of all units that goes.
    """
    taken = np.zeros(len(ranked), dtype=int)
    if not len(ranked):
        return taken
    owners = _owners_in_order(ranked)
    goal = int(np.floor(ratio * len(owners) + 0.5))
    count = 0
    for k in owners:
        if count >= goal:
            break
        if taken[k] < spare[k]:
            taken[k] += 1
            count += 1
    return taken


def _owners_in_order(ranked: Sequence[np.ndarray]) -> np.ndarray:
    """The group of each unit, lowest scores first.

    Of equal scores all groups lose the same share side by side, and none all of its own first. What
    differs by round-off counts as equal.
    """
    keys, shares = [], []
    for score in ranked:
        mantissa, exponent = np.frexp(score.astype(float))
        key = np.ldexp(np.round(mantissa, 10), exponent)
        _, first, kind, counts = np.unique(
            np.sort(key), return_index=True, return_inverse=True, return_counts=True
        )
        keys.append(np.sort(key))
        shares.append((np.arange(len(key)) - first[kind] + 0.5) / counts[kind])
    owner = np.repeat(np.arange(len(ranked)), [len(score) for score in ranked])
    # Of equal shares the earlier group comes first: the sort is stable.
    order: np.ndarray = owner[np.lexsort((np.concatenate(shares), np.concatenate(keys)))]
    return order


def _meet_budget(
    analysis: Analysis,
    scores: Sequence[np.ndarray],
    selection: Selection,
    active: Sequence[CouplingGroup],
    parameter_names: Sequence[str],
    fixed: Mapping[int, float],
) -> dict[int, np.ndarray]:
    """The smallest common ratio whose plan fits the budget, found by bisection.

    Where whole channels make that coarse, some groups take the next smaller ratio. Groups in
    ``fixed`` keep as many units as stands there.
    """
    goals = _goals(analysis, selection, parameter_names)
    free = [g for g in active if g.index not in fixed]
    least = fewest_units(free, selection)
    savings: dict[int, float] | None = None

    def counts(ratio: float) -> dict[int, float]:
        if selection.scope != "local":
            return {**fixed, **_ranked_counts(analysis, free, scores, selection, ratio, savings)}
        common = {g.index: max(g.units * (1 - ratio), least[g.index]) for g in free}
        return {**fixed, **common}

    def attempt(wanted: Mapping[int, float]) -> tuple[dict[int, np.ndarray], bool]:
        removed = _select(analysis, scores, active, wanted, least, selection.round_to)
        sizes = analysis.sizes(analysis.removed_labels(removed))
        return removed, all(goal.cost(sizes) <= goal.limit for goal in goals)

    small = counts(selection.max_ratio)
    best, fits = attempt(small)
    if not fits:
        sizes = analysis.sizes(analysis.removed_labels(best))
        kept = " and ".join(
            f"{goal.cost(sizes) / max(goal.whole, 1e-30):.3f} of its {goal.name} (wanted "
            f"{goal.limit / max(goal.whole, 1e-30):.3f})"
            for goal in goals
        )
        raise BudgetError(
            f"budget cannot be met: with at most {selection.max_ratio:.0%} of each group removed "
            f"{'that ratios does not name ' if fixed else ''}the model keeps {kept}; raise "
            f"{'ratios or ' if fixed else ''}max_ratio or ask for less"
        )
    # Losses count per saving, and what a unit saves depends on how many others have gone.
    per_saving = selection.scope != "local" and selection.normalise == "none"
    for _ in range(_SAVING_ROUNDS if per_saving else 1):
        if per_saving:
            savings = _savings(analysis, active, {} if savings is None else best, goals)
            small = counts(selection.max_ratio)
        low, high, large = 0.0, selection.max_ratio, counts(0.0)
        for _ in range(16):
            middle = (low + high) / 2
            wanted = counts(middle)
            removed, fits = attempt(wanted)
            if fits:
                high, best, small = middle, removed, wanted
            else:
                low, large = middle, wanted
    # Many groups change their count at the same ratio: let as many as fit take the larger one.
    larger: set[int] = set()
    rest = [g.index for g in active if large[g.index] != small[g.index]]
    for _ in range(_REFINEMENTS):
        first, last = 0, len(rest) + 1
        while last - first > 1:
            middle_group = (first + last) // 2
            trial = larger.union(rest[:middle_group])
            removed, fits = attempt({i: (large if i in trial else small)[i] for i in small})
            if fits:
                first, best = middle_group, removed
            else:
                last = middle_group
        larger.update(rest[:first])
        rest = rest[first + 1 :]  # the next one alone is too much
        if not rest:
            break
    return best


def _goals(analysis: Analysis, selection: Selection, parameter_names: Sequence[str]) -> list[Goal]:
    """What the budget asks for, and what else was asked for."""
    assert selection.budget is not None
    costs: dict[str, tuple[str, Callable[[Sizes], float]]] = {
        "macs": ("MACs", lambda sizes: sizes.macs()),
        "params": ("parameters", lambda sizes: sizes.params(parameter_names)),
    }
    whole = analysis.sizes(analysis.removed_labels({}))
    goals = list(selection.goals)
    for key, fraction in selection.budget.fractions().items():
        if key in costs:
            name, cost = costs[key]
            goals.append(Goal(name, cost, fraction * cost(whole), cost(whole)))
    return goals


def _savings(
    analysis: Analysis,
    active: Sequence[CouplingGroup],
    removed: Mapping[int, np.ndarray],
    goals: Sequence[Goal],
) -> dict[int, float]:
    """What one unit of each group saves, as a share of the whole, next to what has gone already."""
    savings: dict[int, float] = {}
    for group in active:
        few = np.ones(group.units, dtype=bool)
        few[0] = False
        ends = [
            analysis.sizes(analysis.removed_labels({**removed, group.index: mask}))
            for mask in (np.zeros_like(few), few)
        ]
        savings[group.index] = sum(
            (goal.cost(ends[0]) - goal.cost(ends[1])) / max(goal.whole, 1e-30) for goal in goals
        ) / max(1, group.units - 1)
    return savings

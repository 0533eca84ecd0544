"""How many units each group keeps, and which ones.

Without coupling between sizes a group's count follows from its ratio alone. Where sizes are linked
(chunks that stay equal, one attribute that serves two layers) the counts of all linked groups are
solved together as a small integer program.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from chanprune_ext.analysis.groups import KINDS
from chanprune_ext.errors import BudgetError, InvalidArgumentError, NothingToPruneError
from chanprune_ext.links import solve_linked_counts

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from chanprune_ext.analysis import Analysis, CouplingGroup
    from chanprune_ext.analysis.groups import Sizes

__all__ = ["Budget", "Goal", "Selection", "active_groups", "allocate"]

COSTS = ("macs", "params", "latency", "file_size")  # fields of Budget that are fractions
_SAVING_ROUNDS = 3
_REFINEMENTS = 8  # how often the search for a budget skips a group that does not fit


NORMALISATIONS: dict[str, Callable[[np.ndarray], float]] = {
    "mean": lambda score: float(np.mean(np.abs(score))),
    "max": lambda score: float(np.max(np.abs(score))),
    "l2": lambda score: float(np.linalg.norm(score)),
    "none": lambda _: 1.0,
}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Budget:
    """What the pruned model may cost, as fractions of the original.

    Attributes:
        macs: Fraction of the multiply-accumulates to keep, in (0, 1].
        params: Fraction of the parameters to keep, in (0, 1].
        latency: Fraction of the measured time of a forward on the example inputs, in (0, 1]. Both
            networks are timed side by side in eval mode, on the device they are on and with the
            threads torch is set to.
        file_size: Fraction of the bytes of the file that :func:`chanprune_ext.save` writes of the
            original, in (0, 1]. The plan inside the file counts.
        tolerance: How far below its budget the latency may end, as a fraction of the budget.
        latency_table: Where times of single layers are kept between runs, a JSON file. Default: one
            file for each device and torch version under ``$CHANPRUNE_CACHE`` or the user's cache
            folder.
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    file_size: float | None = None
    tolerance: float = 0.05
    latency_table: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for name in COSTS:
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value <= 1):
                raise InvalidArgumentError(f"Budget.{name} must be in (0, 1], got {value!r}")
        if not self.fractions():
            raise InvalidArgumentError(
                f"Budget needs one of {', '.join(COSTS)}, for example Budget(macs=0.5)"
            )
        if not (_is_number(self.tolerance) and 0 < self.tolerance < 1):
            raise InvalidArgumentError(
                f"Budget.tolerance must be in (0, 1), got {self.tolerance!r}"
            )

    def fractions(self) -> dict[str, float]:
        """The fractions that were asked for, by name."""
        return {n: getattr(self, n) for n in COSTS if getattr(self, n) is not None}


@dataclass(frozen=True)
class Goal:
    """A cost that the pruned model must not exceed.

    Attributes:
        name: What it is, for messages.
        cost: The cost at given sizes, in any unit; grows with every size.
        limit: The most it may be.
        whole: The cost with nothing removed.
    """

    name: str
    cost: Callable[[Sizes], float]
    limit: float
    whole: float


@dataclass(frozen=True)
class Selection:
    """The arguments of :func:`chanprune_ext.plan` that say how much to remove and where."""

    ratio: float
    ratios: Mapping[str, float]
    scope: str
    threshold: float | None
    budget: Budget | None
    round_to: int
    ignore: tuple[str, ...]
    max_ratio: float
    kinds: tuple[str, ...] | None = None
    normalise: str = "mean"
    goals: tuple[Goal, ...] = ()  # beside those of the budget's macs and params

    def __post_init__(self) -> None:
        if not isinstance(self.ratios, Mapping):
            raise InvalidArgumentError(
                f"ratios must map globs on module names to ratios, got {self.ratios!r}"
            )
        self._check_globs()
        for name, value in (
            ("ratio", self.ratio),
            *((f"ratios[{g!r}]", r) for g, r in self.ratios.items()),
        ):
            if not _is_number(value) or not 0 <= value < 1:
                raise InvalidArgumentError(
                    f"{name} must be in [0, 1): the fraction of channels to remove; got {value!r}"
                )
        if unknown := set(self.kinds or ()) - set(KINDS):
            raise InvalidArgumentError(f"kinds must be some of {KINDS}, got {sorted(unknown)}")
        if self.scope not in ("local", "global"):
            raise InvalidArgumentError(f"scope must be 'local' or 'global', got {self.scope!r}")
        if self.normalise not in NORMALISATIONS:
            raise InvalidArgumentError(
                f"normalise must be one of {', '.join(NORMALISATIONS)}, got {self.normalise!r}"
            )
        if not isinstance(self.round_to, int) or self.round_to < 1:
            raise InvalidArgumentError(f"round_to must be an int >= 1, got {self.round_to!r}")
        if not _is_number(self.max_ratio) or not 0 < self.max_ratio < 1:
            raise InvalidArgumentError(f"max_ratio must be in (0, 1), got {self.max_ratio!r}")
        if self.threshold is not None and not (
            _is_number(self.threshold) and math.isfinite(self.threshold)
        ):
            raise InvalidArgumentError(f"threshold must be a number, got {self.threshold!r}")
        if self.budget is not None and not isinstance(self.budget, Budget):
            raise InvalidArgumentError(
                f"budget must be a Budget, for example Budget(macs=0.5), got {self.budget!r}"
            )
        if self.threshold is not None and self.budget is not None:
            raise InvalidArgumentError("give either threshold or budget, not both")

    def _check_globs(self) -> None:
        for argument, globs in (("ratios", self.ratios), ("ignore", self.ignore)):
            for glob in globs:
                if not isinstance(glob, str):
                    raise InvalidArgumentError(
                        f"{argument} must hold globs on module names (str), got {glob!r}"
                    )


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
        InvalidArgumentError: A glob names no group.
        NothingToPruneError: No group may be pruned.
    """
    ratios = _ratios(analysis, selection)
    active = active_groups(analysis, selection, held, ratios)
    if not active:
        raise NothingToPruneError(_why_nothing(analysis, selection, held))
    if selection.budget is not None:
        return _meet_budget(analysis, scores, selection, active, parameter_names)
    if selection.threshold is not None:
        wanted = {g.index: float(np.sum(scores[g.index] >= selection.threshold)) for g in active}
        wanted = {i: max(w, _floor(analysis.groups[i], selection)) for i, w in wanted.items()}
    elif selection.scope == "global":
        wanted = _global_counts(active, scores, selection, ratios)
    else:
        wanted = {g.index: g.units * (1 - ratios[g.index]) for g in active}
    return _select(analysis, scores, active, wanted, selection.round_to)


def _select(
    analysis: Analysis,
    scores: Sequence[np.ndarray],
    active: Sequence[CouplingGroup],
    wanted: Mapping[int, float],
    round_to: int,
) -> dict[int, np.ndarray]:
    """Whole counts near the wanted ones, then the lowest scores of each group."""
    buckets = solve_linked_counts(analysis, active, wanted, round_to)
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


def _floor(group: CouplingGroup, selection: Selection) -> float:
    return max(1.0, np.ceil(group.units * (1 - selection.max_ratio)))


def _global_counts(
    active: Sequence[CouplingGroup],
    scores: Sequence[np.ndarray],
    selection: Selection,
    ratios: Mapping[int, float],
    savings: Mapping[int, float] | None = None,
) -> dict[int, float]:
    """One threshold over all groups, on scores made comparable by ``selection.normalise``.

    Args:
        active: Groups that take part.
        scores: One score per unit of each group.
        selection: What the user asked for.
        ratios: Group index -> ratio; groups with another ratio than the default keep theirs.
        savings: Group index -> what the removal of one unit saves: scores count per saving.
    """
    named = {g.index for g in active if ratios[g.index] != selection.ratio}
    pool = [g for g in active if g.index not in named]
    wanted = {g.index: g.units * (1 - ratios[g.index]) for g in active if g.index in named}
    if pool:
        ranked = np.concatenate(
            [
                _normalised(scores[g.index], selection.normalise)
                / (1.0 if savings is None else max(savings[g.index], 1e-12))
                for g in pool
            ]
        )
        owner = np.concatenate([np.full(g.units, k) for k, g in enumerate(pool)])
        order = np.argsort(ranked, kind="stable")
        goal = int(np.floor(selection.ratio * len(ranked) + 0.5))
        spare = np.array([g.units - _floor(g, selection) for g in pool])
        taken = np.zeros(len(pool), dtype=int)
        count = 0
        for position in order:
            if count >= goal:
                break
            k = owner[position]
            if taken[k] < spare[k]:
                taken[k] += 1
                count += 1
        wanted.update({g.index: float(g.units - taken[k]) for k, g in enumerate(pool)})
    return wanted


def _normalised(score: np.ndarray, how: str) -> np.ndarray:
    unit = NORMALISATIONS[how](score)
    return score / unit if unit > 0 else score


def _meet_budget(
    analysis: Analysis,
    scores: Sequence[np.ndarray],
    selection: Selection,
    active: Sequence[CouplingGroup],
    parameter_names: Sequence[str],
) -> dict[int, np.ndarray]:
    """The smallest common ratio whose plan fits the budget, found by bisection.

    Where whole channels make that coarse, some groups take the next smaller ratio.
    """
    goals = _goals(analysis, selection, parameter_names)

    savings: dict[int, float] | None = None

    def counts(ratio: float) -> dict[int, float]:
        if selection.scope == "global":
            trial = replace(selection, ratio=ratio, ratios={}, threshold=None, budget=None)
            return _global_counts(active, scores, trial, {g.index: ratio for g in active}, savings)
        return {g.index: max(g.units * (1 - ratio), _floor(g, selection)) for g in active}

    def attempt(wanted: Mapping[int, float]) -> tuple[dict[int, np.ndarray], bool]:
        removed = _select(analysis, scores, active, wanted, selection.round_to)
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
            f"the model keeps {kept}; raise max_ratio or ask for less"
        )
    # Losses count per saving, and what a unit saves depends on how many others have gone.
    per_saving = selection.scope == "global" and selection.normalise == "none"
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


# -- which groups take part ----------------------------------------------------------------------


def _matches(names: Sequence[str], glob: str) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for name in names)


def _ratios(analysis: Analysis, selection: Selection) -> dict[int, float]:
    """Every group's ratio: the default, or that of the last glob naming one of its producers."""
    ratios = {g.index: float(selection.ratio) for g in analysis.groups}
    frozen = {f.entry.rpartition(".")[0] or f.entry for f in analysis.frozen}
    for glob, ratio in selection.ratios.items():
        found = [g.index for g in analysis.groups if _matches(g.producers, glob)]
        if not found:
            why = next(
                (str(f) for f in analysis.frozen if _matches([_module(f.entry)], glob)), None
            )
            raise InvalidArgumentError(
                f"ratios[{glob!r}] names no group: "
                + (why or f"no module that makes channels matches; there are {_examples(analysis)}")
            )
        ratios.update(dict.fromkeys(found, float(ratio)))
    for glob in selection.ignore:
        if not any(_matches(g.producers, glob) for g in analysis.groups) and not any(
            fnmatch.fnmatchcase(name, glob) for name in frozen
        ):
            raise InvalidArgumentError(
                f"ignore {glob!r} names no module that makes channels; there are "
                f"{_examples(analysis)}"
            )
    return ratios


def _module(entry: str) -> str:
    return entry.rpartition(".")[0] or entry


def _examples(analysis: Analysis) -> str:
    names = [name for g in analysis.groups for name in g.producers]
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") if names else "none"


def active_groups(
    analysis: Analysis,
    selection: Selection,
    held: frozenset[int] = frozenset(),
    ratios: Mapping[int, float] | None = None,
) -> list[CouplingGroup]:
    """Groups that may shrink; of two factors of one dimension (groups x width) the finer one."""
    ratios = _ratios(analysis, selection) if ratios is None else ratios
    candidates = [
        g
        for g in analysis.groups
        if (g.units > 1 or _is_part_everywhere(analysis, g))
        and g.index not in held
        and not any(_matches(g.producers, glob) for glob in selection.ignore)
        and (
            selection.kinds is None
            or g.kind in selection.kinds
            or any(_matches(g.producers, glob) for glob in selection.ratios)
        )
        and (selection.budget is not None or selection.threshold is not None or ratios[g.index] > 0)
    ]
    chosen: dict[int, CouplingGroup] = {}
    rivals: dict[int, set[int]] = {}
    for a, b in analysis.conflicts:
        rivals.setdefault(a, set()).add(b)
        rivals.setdefault(b, set()).add(a)
    for group in sorted(candidates, key=lambda g: (-g.units, g.index)):
        if not rivals.get(group.index, set()) & chosen.keys():
            chosen[group.index] = group
    return [chosen[i] for i in sorted(chosen)]


def _is_part_everywhere(analysis: Analysis, group: CouplingGroup) -> bool:
    """Whether the group could go as a whole: every dimension it shortens has other indices too."""
    return all(m.indices.size < analysis.trace.shapes[m.entry][m.dim] for m in group.members)


def _why_nothing(analysis: Analysis, selection: Selection, held: frozenset[int]) -> str:
    if not analysis.groups:
        events = dict.fromkeys([*map(str, analysis.trace.unknown), *map(str, analysis.frozen)])
        reasons = "; ".join(list(events)[:4])
        return "the model has no channels that may be removed" + (f": {reasons}" if reasons else "")
    if held:
        return "every group that was asked for is held back by sizes that cannot change"
    if all(g.units == 1 for g in analysis.groups):
        return (
            f"nothing to prune: the channels of each of the {len(analysis.groups)} groups can only "
            f"be removed all at once, which would leave a layer empty"
        )
    return (
        f"nothing to prune: of {len(analysis.groups)} groups none has a ratio above 0 and is not "
        f"ignored (ratio={selection.ratio}, ratios={dict(selection.ratios)}, "
        f"ignore={list(selection.ignore)}, kinds={selection.kinds}; the model has "
        f"{sorted({g.kind for g in analysis.groups})})"
    )

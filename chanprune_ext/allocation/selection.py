"""What a user asks for: how much to remove, where, and within which budget."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING

import numpy as np

from chanprune_ext.analysis.groups import KINDS
from chanprune_ext.errors import InvalidArgumentError

from .links import pinned_groups, rounded_whole
from .normalisation import NORMALISATIONS

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from chanprune_ext.analysis import Analysis, CouplingGroup
    from chanprune_ext.analysis.groups import Sizes

__all__ = [
    "COSTS",
    "SCOPES",
    "Budget",
    "Goal",
    "Selection",
    "active_groups",
    "asked_groups",
    "fewest_units",
    "group_ratios",
    "is_named",
    "is_whole",
    "rivals_of",
    "why_nothing",
]

COSTS = ("macs", "params", "latency", "file_size")  # fields of Budget that are fractions
SCOPES = ("local", "isomorphic", "global")  # which channels compete with each other


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """Whether a value is an integer, of Python or numpy."""
    return isinstance(value, Integral)


def _set_floats(owner: object, *names: str) -> None:
    """Makes fields of a frozen dataclass Python's floats: those of numpy are no JSON."""
    for name in names:
        value = getattr(owner, name)
        object.__setattr__(owner, name, None if value is None else float(value))


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
        _set_floats(self, *COSTS, "tolerance")

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
    by_index: Mapping[int, float] | None = None  # ratios of groups, see :meth:`of_groups`
    remove: Mapping[str, tuple[int, ...]] | None = None  # just these channels, by maker

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
        if self.scope not in SCOPES:
            raise InvalidArgumentError(
                f"scope must be one of {', '.join(SCOPES)}, got {self.scope!r}"
            )
        if self.normalise not in NORMALISATIONS:
            raise InvalidArgumentError(
                f"normalise must be one of {', '.join(NORMALISATIONS)}, got {self.normalise!r}"
            )
        if not is_whole(self.round_to) or self.round_to < 1:
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
        _set_floats(self, "ratio", "threshold", "max_ratio")
        object.__setattr__(self, "ratios", {g: float(r) for g, r in self.ratios.items()})
        object.__setattr__(self, "round_to", int(self.round_to))

    @classmethod
    def of_groups(cls, ratios: Mapping[int, float]) -> Selection:
        """Ratios of groups by their indices, nothing of the others: a name may stand for several.

        Args:
            ratios: Index of a group -> share of its channels to remove, in [0, 1).
        """
        return cls(
            ratio=0.0,
            ratios={},
            scope="local",
            threshold=None,
            budget=None,
            round_to=1,
            ignore=(),
            max_ratio=0.9,
            by_index=ratios,
        )

    def _check_globs(self) -> None:
        for argument, globs in (("ratios", self.ratios), ("ignore", self.ignore)):
            for glob in globs:
                if not isinstance(glob, str):
                    raise InvalidArgumentError(
                        f"{argument} must hold globs on module names (str), got {_shown(glob)}"
                    )


def _shown(value: object) -> str:
    """A value in a message; of a module, which may be a whole network, its class."""
    return f"a {type(value).__name__}" if callable(value) else repr(value)


def _matches(names: Sequence[str], glob: str) -> bool:
    return any(name == glob or fnmatch.fnmatchcase(name, glob) for name in names)


def group_ratios(analysis: Analysis, selection: Selection) -> dict[int, float]:
    """Every group's ratio: the default, or that of the last glob naming one of its producers."""
    ratios = {g.index: float(selection.ratio) for g in analysis.groups}
    ratios.update(selection.by_index or {})
    frozen = {f.entry.rpartition(".")[0] or f.entry for f in analysis.frozen}
    for glob, ratio in selection.ratios.items():
        found = [g.index for g in analysis.groups if _matches(g.producers, glob)]
        if not found:
            why = next(
                (str(f) for f in analysis.frozen if _matches([_module(f.entry)], glob)), None
            )
            raise InvalidArgumentError(
                f"ratios[{glob!r}] names no group: "
                + (why or f"no module that makes channels matches; {_instead(analysis, glob)}")
            )
        ratios.update(dict.fromkeys(found, float(ratio)))
    for glob in selection.ignore:
        if not any(_matches(g.producers, glob) for g in analysis.groups) and not any(
            _matches([name], glob) for name in frozen
        ):
            raise InvalidArgumentError(
                f"ignore {glob!r} names no module that makes channels; {_instead(analysis, glob)}"
            )
    return ratios


def is_named(group: CouplingGroup, selection: Selection) -> bool:
    """Whether ``ratios`` says how much of the group goes, whatever else is asked for."""
    return any(_matches(group.producers, glob) for glob in selection.ratios)


def _module(entry: str) -> str:
    return entry.rpartition(".")[0] or entry


def _instead(analysis: Analysis, glob: str) -> str:
    """What may have been meant by a glob that names nothing, or what there is to name."""
    names = list(dict.fromkeys(name for g in analysis.groups for name in g.producers))
    if any(name.startswith(f"{glob}.") for name in names):
        return f"'{glob}.*' names those inside it"
    examples = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"there are {examples or 'none'}"


def asked_groups(
    analysis: Analysis,
    selection: Selection,
    held: frozenset[int],
    ratios: Mapping[int, float],
) -> list[CouplingGroup]:
    """Groups of which something is asked, rivals among them."""
    rivals = rivals_of(analysis)
    return [
        g
        for g in analysis.groups
        if (g.units > 1 or _is_part_everywhere(analysis, g))
        and g.index not in held
        and not any(_matches(g.producers, glob) for glob in selection.ignore)
        and _is_of_kind(analysis, g, selection, rivals[g.index])
        and (selection.budget is not None or selection.threshold is not None or ratios[g.index] > 0)
    ]


def active_groups(
    analysis: Analysis,
    selection: Selection,
    held: frozenset[int] = frozenset(),
    ratios: Mapping[int, float] | None = None,
) -> list[CouplingGroup]:
    """Groups that may shrink; of two factors of one dimension (groups x width) the finer one.

    A factor that sizes or ``round_to`` keep whole gives way to the other one.
    """
    ratios = group_ratios(analysis, selection) if ratios is None else ratios
    rivals = rivals_of(analysis)
    candidates = asked_groups(analysis, selection, held, ratios)
    indices = {g.index for g in candidates}
    gave_way: set[int] = set()
    while True:
        chosen = _without_rivals(candidates, rivals, gave_way)
        contested = {g.index for g in chosen if rivals[g.index] & indices - gave_way} - gave_way
        if not contested:
            return chosen
        least = fewest_units(chosen, selection)
        whole = rounded_whole(analysis, chosen, least, selection.round_to)
        pinned = contested & (pinned_groups(analysis, chosen).keys() | whole)
        if not pinned:
            return chosen
        gave_way |= pinned


def fewest_units(groups: Sequence[CouplingGroup], selection: Selection) -> dict[int, float]:
    """Group index -> the fewest units it may keep, for groups that ``max_ratio`` limits."""
    if selection.scope == "local" and selection.threshold is None and selection.budget is None:
        return {}
    return {
        g.index: max(1.0, np.ceil(g.units * (1 - selection.max_ratio)))
        for g in groups
        if not is_named(g, selection)
    }


def rivals_of(analysis: Analysis) -> dict[int, set[int]]:
    """Group index -> groups that are other ways to take the same channels."""
    rivals: dict[int, set[int]] = {g.index: set() for g in analysis.groups}
    for a, b in analysis.conflicts:
        rivals[a].add(b)
        rivals[b].add(a)
    return rivals


def _without_rivals(
    candidates: Sequence[CouplingGroup], rivals: Mapping[int, set[int]], last: set[int]
) -> list[CouplingGroup]:
    """Of groups that are rivals the finest one, and those in ``last`` only where no other is."""
    chosen: dict[int, CouplingGroup] = {}
    for group in sorted(candidates, key=lambda g: (g.index in last, -g.units, g.index)):
        if not rivals[group.index] & chosen.keys():
            chosen[group.index] = group
    return [chosen[i] for i in sorted(chosen)]


def _is_of_kind(
    analysis: Analysis, group: CouplingGroup, selection: Selection, rivals: set[int]
) -> bool:
    """Whether a group is of the kinds asked for, or named beside them.

    A name may stand for several rivals, for heads and their width: there the kinds decide.
    """
    if selection.kinds is None or group.kind in selection.kinds:
        return True
    return is_named(group, selection) and not any(
        analysis.groups[i].kind in selection.kinds and is_named(analysis.groups[i], selection)
        for i in rivals
    )


def _is_part_everywhere(analysis: Analysis, group: CouplingGroup) -> bool:
    """Whether the group could go as a whole: every dimension it shortens has other indices too."""
    return all(m.indices.size < analysis.trace.shapes[m.entry][m.dim] for m in group.members)


def why_nothing(analysis: Analysis, selection: Selection, held: frozenset[int]) -> str:
    """Why no group may be pruned."""
    if not analysis.groups:
        events = dict.fromkeys([*map(str, analysis.trace.unknown), *map(str, analysis.frozen)])
        reasons = "; ".join(list(events)[:4])
        return "the model has no channels that may be removed" + (f": {reasons}" if reasons else "")
    if held:
        return "every group that was asked for is held back by sizes or numbers that cannot change"
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

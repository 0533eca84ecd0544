"""What a user asks for: how much to remove, where, and within which budget."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chanprune_ext.analysis.groups import KINDS
from chanprune_ext.errors import InvalidArgumentError

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from chanprune_ext.analysis import Analysis, CouplingGroup
    from chanprune_ext.analysis.groups import Sizes

__all__ = [
    "COSTS",
    "NORMALISATIONS",
    "Budget",
    "Goal",
    "Selection",
    "active_groups",
    "group_ratios",
    "is_named",
    "why_nothing",
]

COSTS = ("macs", "params", "latency", "file_size")  # fields of Budget that are fractions
# What the scores of a group are divided by, so that groups can be ranked together.
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


def _matches(names: Sequence[str], glob: str) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for name in names)


def group_ratios(analysis: Analysis, selection: Selection) -> dict[int, float]:
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


def is_named(group: CouplingGroup, selection: Selection) -> bool:
    """Whether ``ratios`` says how much of the group goes, whatever else is asked for."""
    return any(_matches(group.producers, glob) for glob in selection.ratios)


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
    ratios = group_ratios(analysis, selection) if ratios is None else ratios
    candidates = [
        g
        for g in analysis.groups
        if (g.units > 1 or _is_part_everywhere(analysis, g))
        and g.index not in held
        and not any(_matches(g.producers, glob) for glob in selection.ignore)
        and (selection.kinds is None or g.kind in selection.kinds or is_named(g, selection))
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


def why_nothing(analysis: Analysis, selection: Selection, held: frozenset[int]) -> str:
    """Why no group may be pruned."""
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

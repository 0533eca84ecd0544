"""From scores to a removal that is known to work: allocate, solve the attributes, replay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chanprune_ext.analysis.equations import attributes_in, solve_attributes
from chanprune_ext.analysis.groups import Frozen
from chanprune_ext.analysis.provenance import Attribute, Dim, leaves
from chanprune_ext.analysis.replay import DivergenceError, replay
from chanprune_ext.errors import NothingToPruneError, VerificationError

from .allocate import allocate
from .links import pinned_groups, rounded_whole
from .selection import (
    Selection,
    active_groups,
    asked_groups,
    fewest_units,
    group_ratios,
    rivals_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import nn

    from chanprune_ext.analysis import Analysis, CouplingGroup
    from chanprune_ext.analysis.groups import Sizes
    from chanprune_ext.analysis.provenance import Equation
    from chanprune_ext.analysis.scales import Rescaling
    from chanprune_ext.analysis.tracer import Event, Slots

__all__ = ["Removal", "verified_removal"]


@dataclass(frozen=True)
class Removal:
    """Units to remove, and all that follows from them.

    Attributes:
        units: Group index -> bool (units,), True where a unit goes.
        masks: Parameter or buffer -> {dim: bool (n,), True where an index stays}.
        sizes: Every surviving size.
        attributes: Ints stored on modules -> new value, for those that change.
        rescalings: What is multiplied so that constants keep their effect.
        held: Groups that had to stay whole, and why.
    """

    units: dict[int, np.ndarray]
    masks: dict[str, dict[int, np.ndarray]]
    sizes: Sizes
    attributes: dict[Attribute, int]
    rescalings: tuple[Rescaling, ...]
    held: tuple[Frozen, ...]


@dataclass(frozen=True)
class _Refusal:
    """Why a removal does not work: what said so, about which dimensions, and what would go.

    ``alike`` are more places of one replay that say the same about other dimensions.
    """

    event: Event
    slots: Sequence[Slots]
    error: VerificationError
    shrinking: frozenset[int]
    alike: Sequence[DivergenceError] = ()


@dataclass(frozen=True)
class _Search:
    """All that does not change while groups are held back."""

    analysis: Analysis
    model: nn.Module
    example_inputs: Any
    scores: Sequence[np.ndarray]
    selection: Selection
    parameter_names: Sequence[str]

    def attempt(self, held: Mapping[int, Event | None]) -> Removal | _Refusal | None:
        """Allocate, solve, replay, with some groups left whole; None if nothing would go."""
        analysis = self.analysis
        units = allocate(
            analysis, self.scores, self.selection, self.parameter_names, frozenset(held)
        )
        if not units:
            return None
        labels = analysis.removed_labels(units)
        sizes = analysis.sizes(labels)
        attributes, violated = solve_attributes(analysis, sizes)
        if violated:
            event = analysis.trace.events[violated[0].reason]
            error = VerificationError(f"no plan satisfies the sizes at {event}")
            return _Refusal(event, _slots_of(analysis, violated[0]), error, frozenset(units))
        masks = analysis.kept_masks(labels)
        try:
            rescalings = replay(analysis, self.model, self.example_inputs, masks, attributes, sizes)
        except DivergenceError as error:
            return _Refusal(error.where, error.slots, error, frozenset(units), error.alike())
        told = _kept_whole(analysis, self.selection, held, units)
        return Removal(units, masks, sizes, attributes, rescalings, told)

    def culprit(self, held: Mapping[int, Event | None]) -> int | None:
        """A group without which a removal gets further, where no dimension names it.

        Groups are added in order until the removal fails; bisection finds the one that does it.
        """
        rest = [g.index for g in self.analysis.groups if g.index not in held]
        works, fails = 0, len(rest)
        while fails - works > 1:
            middle = (works + fails) // 2
            try:
                failed = self.attempt({**held, **dict.fromkeys(rest[middle:])})
            except NothingToPruneError:
                failed = None
            if isinstance(failed, _Refusal):
                fails = middle
            else:
                works = middle
        return rest[fails - 1] if rest else None


def verified_removal(
    analysis: Analysis,
    model: nn.Module,
    example_inputs: Any,
    scores: Sequence[np.ndarray],
    selection: Selection,
    parameter_names: Sequence[str],
    whole: Iterable[int] = (),
) -> Removal:
    """Allocate, solve the attributes, replay; hold back the groups that any of these refuses.

    The groups whose indices are in ``whole`` are held back from the start.

    Raises:
        NothingToPruneError: Nothing is left to remove.
        VerificationError: The model does not run as predicted even where nothing is removed.
    """
    search = _Search(analysis, model, example_inputs, scores, selection, parameter_names)
    held: dict[int, Event | None] = dict.fromkeys(whole)
    while True:
        try:
            found = search.attempt(held)
        except NothingToPruneError as error:
            event = next((e for e in held.values() if e is not None), None)
            raise error if event is None else NothingToPruneError(f"{error}: {event}") from error
        if isinstance(found, Removal):
            return found
        if found is None:
            raise NothingToPruneError(_why_nothing(analysis, selection, held))
        if selection.remove is not None:
            raise _with_ties(analysis, found)  # just these channels, or none
        culprits = _groups_in(analysis, found.slots) & found.shrinking
        alike = found.alike if culprits else ()
        if not culprits:
            culprit = search.culprit(held)
            culprits = set() if culprit is None else {culprit}
        held.update(dict.fromkeys(culprits, found.event))
        for place in alike:
            others = _groups_in(analysis, place.slots) & found.shrinking - held.keys()
            held.update(dict.fromkeys(others, place.where))
        if not culprits or len(held) == len(analysis.groups):
            raise found.error  # holding everything back does not help


def _with_ties(analysis: Analysis, refusal: _Refusal) -> VerificationError:
    """A refusal that names the groups which sizes tie to those that would shrink."""
    rivals = rivals_of(analysis)
    passed_over = {rival for index in refusal.shrinking for rival in rivals[index]}
    others = _groups_in(analysis, refusal.slots) - refusal.shrinking - passed_over
    if not others:
        return VerificationError(
            f"{refusal.error}; name as many channels in each piece that must stay of one size"
        )
    named = {analysis.groups[i].name for i in refusal.shrinking}
    found = [analysis.groups[i] for i in sorted(others)]
    ties = [f"{'others of ' if g.name in named else ''}'{g.name}' ({g.kind})" for g in found]
    return VerificationError(
        f"{refusal.error}; it ties these channels to {', '.join(dict.fromkeys(ties))}: name both"
    )


def _why_nothing(analysis: Analysis, selection: Selection, held: Mapping[int, Event | None]) -> str:
    """What keeps groups whole that something was asked of."""
    active = active_groups(analysis, selection, frozenset(held))
    for group, tie in _tied(analysis, active, held):
        advice = "; choose both" if tie.by_choice else ""
        return (
            f"nothing would be removed: the channels of '{group.name}' ({group.kind}) are "
            f"{tie.why}, at {tie.event}{advice}"
        )
    if selection.remove is not None:
        return "nothing would be removed: remove names no channel"
    asked, larger = f"ratio={selection.ratio}", "a larger ratio"
    if selection.threshold is not None:
        asked, larger = f"threshold={selection.threshold}", "a higher threshold"
    elif selection.budget is not None:
        fractions = ", ".join(f"{k}={v}" for k, v in selection.budget.fractions().items())
        asked, larger = f"Budget({fractions})", "a smaller budget"
    elif selection.ratios:
        asked = f"{asked}, ratios={dict(selection.ratios)}"
    return (
        f"nothing would be removed: every group keeps all its channels under {asked}, "
        f"round_to={selection.round_to}; ask for {larger} or a smaller round_to"
    )


@dataclass(frozen=True)
class _Tie:
    """The size that keeps a group whole: why, at which operation, and whether by choice alone."""

    why: str
    event: Event
    by_choice: bool


def _tied(
    analysis: Analysis, active: Sequence[CouplingGroup], held: Mapping[int, Event | None]
) -> Iterator[tuple[CouplingGroup, _Tie]]:
    """Active groups that sizes keep whole, and what they are tied to."""
    rivals = rivals_of(analysis)
    chosen = {g.index for g in active}
    for index, equation in sorted(pinned_groups(analysis, active).items()):
        group = analysis.groups[index]
        event = analysis.trace.events[equation.reason]
        # A rival that was passed over would not help: it takes the same channels.
        others = _groups_in(analysis, _slots_of(analysis, equation)) - chosen - rivals[group.index]
        if not others:
            yield group, _Tie("part of a size that must stay", event, by_choice=False)
            continue
        other = analysis.groups[min(others)]
        reason = held.get(other.index)
        because = "" if reason is None else f" ({reason.detail or reason.op})"
        why = f"tied to those of '{other.name}' ({other.kind}), which stay{because}, by a size"
        yield group, _Tie(why, event, by_choice=not others & held.keys())


def _slots_of(analysis: Analysis, equation: Equation) -> list[Slots]:
    """Every dimension an equation speaks of, by itself or through an attribute."""
    found = [equation.slots]
    found += [leaf.slots for leaf in leaves(equation.expr) if isinstance(leaf, Dim)]
    named = set(attributes_in(equation.expr))
    found += [
        other.slots
        for other in analysis.trace.equations
        if isinstance(other.expr, Attribute) and other.expr in named
    ]
    return found


def _groups_in(analysis: Analysis, slots: Iterable[Slots]) -> set[int]:
    """Groups that any of these dimensions loses channels with."""
    owner = np.full(analysis.trace.store.size, -1, dtype=np.int64)
    for group in analysis.groups:
        owner[group.roots] = group.index
    found: set[int] = set()
    for each in slots:
        resolved = analysis.trace.store.resolve(each)
        found.update(int(i) for i in np.unique(owner[resolved]) if i >= 0)
    return found


def _kept_whole(
    analysis: Analysis,
    selection: Selection,
    held: Mapping[int, Event | None],
    removed: Mapping[int, np.ndarray],
) -> tuple[Frozen, ...]:
    """Groups a plan had to leave whole, told like frozen channels.

    Where a rival takes the same channels in another way, they do not stay.
    """
    told = {
        index: _whole(analysis.groups[index], event.detail or event.op, event)
        for index, event in held.items()
        if event is not None
    }
    rivals = rivals_of(analysis)
    asked = asked_groups(analysis, selection, frozenset(held), group_ratios(analysis, selection))
    if any(not (rivals[g.index] | {g.index}) & removed.keys() for g in asked):
        active = active_groups(analysis, selection, frozenset(held))
        for group, tie in _tied(analysis, active, held):
            told[group.index] = _whole(group, tie.why, tie.event)
        least = fewest_units(active, selection)
        for index in rounded_whole(analysis, active, least, selection.round_to) - told.keys():
            told[index] = _unrounded(analysis.groups[index], selection, least.get(index, 1.0))
    return tuple(frozen for i, frozen in told.items() if not rivals[i] & removed.keys())


def _whole(group: CouplingGroup, why: str, event: Event) -> Frozen:
    return Frozen(
        next(m.entry for m in group.members if m.role == "out"),
        group.units * group.multiplicity,
        why,
        event.op,
        event.module,
        event.source,
    )


def _unrounded(group: CouplingGroup, selection: Selection, least: float) -> Frozen:
    """A group that ``round_to`` and ``max_ratio`` leave no smaller width."""
    width = group.units * group.multiplicity
    reasons = []
    if least > 1:
        fewest = int(least) * group.multiplicity
        reasons.append(f"max_ratio={selection.max_ratio:g} leaves at least {fewest} of {width}")
    if least <= 1 or selection.round_to > 1:
        reasons.append(f"no smaller width is a multiple of round_to={selection.round_to}")
    entry = next(m.entry for m in group.members if m.role == "out")
    # What a user has asked for has no operation of its own, as an output has none.
    return Frozen(
        entry,
        width,
        ", and ".join(reasons),
        "output",
        entry.rpartition(".")[0],
        "arguments of plan",
    )

"""From scores to a removal that is known to work: allocate, solve the attributes, replay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chanprune_ext.allocation import Selection, allocate
from chanprune_ext.analysis.equations import attributes_in, solve_attributes
from chanprune_ext.analysis.groups import Frozen
from chanprune_ext.analysis.provenance import Attribute, Dim, leaves
from chanprune_ext.analysis.replay import DivergenceError, replay
from chanprune_ext.errors import NothingToPruneError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import nn

    from chanprune_ext.analysis import Analysis
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


def verified_removal(
    analysis: Analysis,
    model: nn.Module,
    example_inputs: Any,
    scores: Sequence[np.ndarray],
    selection: Selection,
    parameter_names: Sequence[str],
) -> Removal:
    """Allocate, solve the attributes, replay; hold back the groups that any of these refuses.

    Raises:
        NothingToPruneError: Nothing is left to remove.
        VerificationError: The model does not run as predicted even where nothing is removed.
    """
    held: dict[int, Event] = {}
    refusal: VerificationError | None = None
    while True:
        if refusal is not None and len(held) == len(analysis.groups):
            raise refusal  # holding everything back does not help
        units = allocate(analysis, scores, selection, parameter_names, frozenset(held))
        if not units:
            raise NothingToPruneError(
                f"nothing would be removed: every group keeps all its channels under ratio="
                f"{selection.ratio}, round_to={selection.round_to}; ask for a larger ratio or a "
                f"smaller round_to"
            )
        labels = analysis.removed_labels(units)
        sizes = analysis.sizes(labels)
        attributes, violated = solve_attributes(analysis, sizes)
        if violated:
            event = analysis.trace.events[violated[0].reason]
            slots = _slots_of(analysis, violated[0])
            refusal = VerificationError(f"no plan satisfies the sizes at {event}")
        else:
            masks = analysis.kept_masks(labels)
            try:
                rescalings = replay(analysis, model, example_inputs, masks, attributes, sizes)
            except DivergenceError as error:
                event, slots, refusal = error.where, list(error.slots), error
            else:
                told = _held_back(analysis, held)
                return Removal(units, masks, sizes, attributes, rescalings, told)
        culprits = _groups_in(analysis, slots) & units.keys()
        culprits = culprits or _groups_near(analysis, event.module, units.keys())
        if not culprits:
            raise refusal
        held.update(dict.fromkeys(culprits, event))


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


def _groups_near(analysis: Analysis, module: str, candidates: Iterable[int]) -> set[int]:
    """Groups with a parameter in a module, or in the smallest one around it that has any."""
    while True:
        prefix = f"{module}." if module else ""
        near = {
            i
            for i in candidates
            if any(m.entry.startswith(prefix) for m in analysis.groups[i].members)
        }
        if near or not module:
            return near
        module = module.rpartition(".")[0]


def _held_back(analysis: Analysis, held: Mapping[int, Event]) -> tuple[Frozen, ...]:
    """Groups a plan had to leave whole, told like frozen channels."""
    return tuple(
        Frozen(
            next(m.entry for m in analysis.groups[index].members if m.role == "out"),
            analysis.groups[index].units * analysis.groups[index].multiplicity,
            event.detail or event.op,
            event.op,
            event.module,
            event.source,
        )
        for index, event in held.items()
    )

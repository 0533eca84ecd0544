"""Coupling groups: the channels of a network that can only leave together, and their sizes.

A *unit* is one class of labels: removing it removes certain indices of certain parameter
dimensions. Units that touch the same dimensions in the same way form a group, the thing a ratio
applies to.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from chanprune_ext.analysis.trace import Trace
    from chanprune_ext.analysis.tracer import Slots

__all__ = ["KINDS", "Analysis", "CouplingGroup", "Frozen", "Member", "Sizes"]


KINDS = ("heads", "head_dim", "residual", "mlp", "hidden")


@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of one parameter or buffer that loses indices with a group.

    Attributes:
        entry: Name of the parameter or buffer.
        dim: The dimension that shrinks.
        role: ``"out"`` (makes the channels), ``"in"`` (reads them) or ``"with"`` (goes along).
        indices: int64 (units, m): the indices each unit removes.
    """

    entry: str
    dim: int
    role: str
    indices: np.ndarray

    @property
    def module(self) -> str:
        """Path of the module that owns the entry."""
        return self.entry.rpartition(".")[0] or self.entry


@dataclass(frozen=True, eq=False)
class CouplingGroup:
    """Channels removed together, unit by unit.

    Attributes:
        index: Position among the groups of the model, in execution order of the first producer.
        members: Every parameter dimension the group touches.
        roots: int64 (units,): label class of each unit.
        normalised: A layer takes statistics over these channels, so removal equals the same layer
            over the kept channels rather than zeroing.
        kind: One of :data:`KINDS`: ``"heads"`` (whole attention heads), ``"head_dim"`` (the same
            positions of every head), ``"residual"`` (what one path adds to another), ``"mlp"``
            (inside, made by a linear layer) or ``"hidden"`` (inside, made by a convolution).
    """

    index: int
    members: tuple[Member, ...]
    roots: np.ndarray
    normalised: bool
    kind: str = "hidden"

    @property
    def units(self) -> int:
        """How many units can be removed one by one."""
        return len(self.roots)

    @property
    def name(self) -> str:
        """The first module that makes these channels."""
        return self.producers[0]

    @property
    def producers(self) -> tuple[str, ...]:
        """Modules that make the channels (a bare parameter counts under its own name)."""
        return tuple(dict.fromkeys(m.module for m in self.members if m.role == "out"))

    @property
    def consumers(self) -> tuple[str, ...]:
        """Modules that read the channels."""
        return tuple(dict.fromkeys(m.module for m in self.members if m.role == "in"))

    @property
    def multiplicity(self) -> int:
        """Channels of the first producer that one unit stands for."""
        return int(next(m.indices.shape[1] for m in self.members if m.role == "out"))


@dataclass(frozen=True)
class Frozen:
    """Channels that must stay, and what keeps them.

    Attributes:
        entry: Parameter whose output channels these are.
        channels: How many of them are kept.
        why: The reason in words.
        op: The operation that asked for it.
        module: Path of the module that was running.
        source: ``file.py:line``.
    """

    entry: str
    channels: int
    why: str
    op: str
    module: str
    source: str

    def __str__(self) -> str:
        where = f" in '{self.module}'" if self.module else ""
        kept = f"{self.channels} channels of '{self.entry}' are kept"
        return f"{kept}: {self.why}{where} ({self.source})"


@dataclass(eq=False)
class Analysis:
    """What may be removed from one model, and what that does to every size in it."""

    trace: Trace
    groups: tuple[CouplingGroup, ...]
    slots: dict[tuple[str, int], Slots]
    conflicts: frozenset[tuple[int, int]]
    frozen: tuple[Frozen, ...]

    @functools.cached_property
    def leaves(self) -> np.ndarray:
        """Int64 (rows, labels): the classes that each label is the OR of, 0 for none."""
        return self.trace.store.resolve(np.arange(self.trace.store.size)[None])

    def removed_labels(self, removed_units: Mapping[int, np.ndarray]) -> np.ndarray:
        """Bool (labels,): which label classes go, given bool (units,) per group index."""
        removed = np.zeros(self.trace.store.size, dtype=bool)
        for index, units in removed_units.items():
            removed[self.groups[index].roots[units]] = True
        return removed

    def kept_mask(self, slots: Slots, removed: np.ndarray) -> np.ndarray:
        """Bool (n,): which indices of a dimension survive."""
        if not len(slots):
            return np.ones(slots.shape[1], dtype=bool)
        gone = np.any(removed[self.trace.store.resolve(slots)], axis=0)
        return np.logical_not(gone)

    def kept_masks(self, removed: np.ndarray) -> dict[str, dict[int, np.ndarray]]:
        """Masks of every parameter dimension that loses an index."""
        masks: dict[str, dict[int, np.ndarray]] = {}
        for (entry, dim), resolved in self.slots.items():
            mask = ~removed[resolved].any(axis=0)
            if not mask.all():
                masks.setdefault(entry, {})[dim] = mask
        return masks

    def sizes(self, removed: np.ndarray) -> Sizes:
        """Surviving sizes under a removal, computed once per dimension."""
        return Sizes(self, removed)


class Sizes:
    """Surviving sizes of dimensions under one removal."""

    def __init__(self, analysis: Analysis, removed: np.ndarray) -> None:
        self._analysis = analysis
        # Bool (labels,): whether a label goes, as a class that goes or as the OR of such.
        self._gone = removed[analysis.leaves].any(axis=0) if removed.any() else None
        self._counts: dict[int, int] = {}

    def of(self, slots: Slots) -> int:
        """How many indices of a dimension survive."""
        if self._gone is None or not len(slots):
            return int(slots.shape[1])
        # Slot arrays live as long as the trace: their identity is a safe key.
        count = self._counts.get(id(slots))
        if count is None:
            gone = self._gone[slots[0]] if len(slots) == 1 else self._gone[slots].any(axis=0)
            count = len(gone) - int(np.count_nonzero(gone))
            self._counts[id(slots)] = count
        return count

    def macs(self) -> int:
        """Multiply-accumulates of one forward on the example inputs."""
        return sum(
            cost.constant * math.prod([self.of(s) for s in cost.dims])
            for cost in self._analysis.trace.costs
        )

    def params(self, names: Iterable[str]) -> int:
        """Elements of the given parameters."""
        trace = self._analysis.trace
        total = 0
        for name in names:
            shape = trace.shapes[name]
            dims = trace.parameters.get(name)
            sizes = shape if dims is None else [self.of(s) for s in dims]
            total += math.prod(sizes)
        return total

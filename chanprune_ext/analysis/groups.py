"""Coupling groups: the channels of a network that can only leave together, and their sizes.

A *unit* is one class of labels: removing it removes certain indices of certain parameter
dimensions. Units that touch the same dimensions in the same way form a group, the thing a ratio
applies to.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chanprune_ext.analysis.provenance import Attribute, Const, leaves
from chanprune_ext.analysis.tracer import ADDED, HEAD_DIM, HEADS, NORMALISED

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from chanprune_ext.analysis.trace import Trace
    from chanprune_ext.analysis.tracer import Slots

__all__ = ["KINDS", "Analysis", "CouplingGroup", "Frozen", "Member", "build_analysis"]


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


def build_analysis(trace: Trace) -> Analysis:
    """Group the live label classes of a trace."""
    store = trace.store
    _freeze_literals(trace)
    keys = [(entry, dim) for entry, dims in trace.parameters.items() for dim in range(len(dims))]
    resolved = [store.resolve(trace.parameters[entry][dim]) for entry, dim in keys]
    live = [(key, slots) for key, slots in zip(keys, resolved, strict=True) if len(slots)]
    frozen = _frozen_outputs(trace, dict(live))
    if not live:
        return Analysis(trace, (), {}, frozenset(), frozen)
    roots, signatures = store.signatures([slots for _, slots in live])
    order = np.argsort(roots, kind="stable")
    roots, signatures = roots[order], signatures[order]
    _, group_of_root = np.unique(signatures, return_inverse=True)
    members, rank = _members(trace, live, roots, group_of_root)

    # Roots of each group, by rank.
    arrangement = np.lexsort((rank, group_of_root))
    arranged = group_of_root[arrangement]
    starts = np.flatnonzero(np.r_[True, arranged[1:] != arranged[:-1]])
    roots_of = dict(enumerate(np.split(roots[arrangement], starts[1:])))
    flags = store.flags(roots)[arrangement]
    flags_of = np.bitwise_or.reduceat(flags, starts).tolist()

    position_in_order = {entry: i for i, entry in enumerate(trace.order)}
    late = len(position_in_order)
    keyed = []
    for group_id, found_members in members.items():
        if not any(m.role == "out" for m in found_members):
            continue
        found_members.sort(key=lambda m: position_in_order.get(m.entry, late))
        first = next(m for m in found_members if m.role == "out")
        keyed.append(
            (
                position_in_order.get(first.entry, late),
                int(first.indices[0, 0]),
                group_id,
                found_members,
            )
        )
    keyed.sort(key=lambda item: item[:3])
    groups = tuple(
        CouplingGroup(
            index,
            tuple(found_members),
            roots_of[group_id],
            bool(flags_of[group_id] & NORMALISED),
            _kind(trace, flags_of[group_id], found_members),
        )
        for index, (_, _, group_id, found_members) in enumerate(keyed)
    )
    return Analysis(trace, groups, dict(live), _conflicts(groups, dict(live), store.size), frozen)


def _members(
    trace: Trace,
    live: Sequence[tuple[tuple[str, int], Slots]],
    roots: np.ndarray,
    group_of_root: np.ndarray,
) -> tuple[dict[int, list[Member]], np.ndarray]:
    """What each group touches, dimension by dimension, and the order of the units.

    All dimensions are sorted in one go: a network has thousands of them, most of them short.

    Returns:
        Group number -> members, and the rank of each root: units are ordered by first appearance.
    """
    # Live roots column by column, with the dimension and the index they stand for.
    label = np.concatenate([slots[0] if len(slots) == 1 else slots.T.ravel() for _, slots in live])
    depths = np.array([len(slots) for _, slots in live])
    widths = np.array([slots.shape[1] for _, slots in live])
    sizes = depths * widths
    dim = np.repeat(np.arange(len(live)), sizes)
    index = np.arange(len(label)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    if (depths > 1).any():
        index //= np.repeat(depths, sizes)
    if not label.all():
        used = np.flatnonzero(label)
        label, dim, index = label[used], dim[used], index[used]
    position = np.searchsorted(roots, label)
    first = np.full(len(roots), len(label), dtype=np.int64)
    # Of several assignments to one place the last one stays.
    first[position[::-1]] = np.arange(len(label))[::-1]
    column = (np.cumsum(widths) - widths)[dim[first]] + index[first]
    rank = np.empty(len(roots), dtype=np.int64)
    rank[np.argsort(column, kind="stable")] = np.arange(len(roots))

    group = group_of_root[position]
    segment = dim * (int(group_of_root.max()) + 1) + group
    key = segment * len(roots) + rank[position]
    if (key[1:] < key[:-1]).any():
        arrangement = np.argsort(key, kind="stable")
        key, segment, index = key[arrangement], segment[arrangement], index[arrangement]
        dim, group = dim[arrangement], group[arrangement]
    starts = np.flatnonzero(np.r_[True, segment[1:] != segment[:-1]])
    units = np.add.reduceat(np.r_[True, key[1:] != key[:-1]], starts, dtype=np.int64)
    members: dict[int, list[Member]] = {}
    for number, owner, piece, n in zip(
        dim[starts].tolist(),
        group[starts].tolist(),
        np.split(index, starts[1:]),
        units.tolist(),
        strict=True,
    ):
        entry, d = live[number][0]
        role = trace.roles.get((entry, d), "with")
        members.setdefault(owner, []).append(Member(entry, d, role, piece.reshape(n, -1)))
    return members, rank


def _kind(trace: Trace, flags: int, members: Iterable[Member]) -> str:
    for bit, kind in ((HEADS, "heads"), (HEAD_DIM, "head_dim"), (ADDED, "residual")):
        if flags & bit:
            return kind
    maker = next(m for m in members if m.role == "out")
    return "mlp" if len(trace.shapes[maker.entry]) == 2 else "hidden"


def _freeze_literals(trace: Trace) -> None:
    """Freeze what would change a size that must stay.

    Such is a plain number, and an attribute that is also the size of something that cannot change.
    """
    store = trace.store
    fixed: dict[Attribute, int] = {}
    pending = list(trace.equations)
    progress = True
    while progress:
        progress = False
        for equation in tuple(pending):
            parts = leaves(equation.expr)
            if all(isinstance(p, Const) or p in fixed for p in parts):
                reasons = [fixed[p] for p in parts if isinstance(p, Attribute)]
                store.freeze(equation.slots.ravel(), (reasons or [equation.reason])[0])
            elif isinstance(equation.expr, Attribute) and not len(store.resolve(equation.slots)):
                fixed[equation.expr] = equation.reason
            else:
                continue
            pending.remove(equation)
            progress = True


def _conflicts(
    groups: tuple[CouplingGroup, ...], slots: Mapping[tuple[str, int], Slots], labels: int
) -> frozenset[tuple[int, int]]:
    """Pairs of groups that are two factors of one dimension (heads and head dims, say)."""
    group_of = np.full(labels, -1, dtype=np.int64)
    for group in groups:
        group_of[group.roots] = group.index
    group_of[0] = -1
    pairs: set[int] = set()
    for resolved in slots.values():
        if len(resolved) < 2:
            continue
        owners = group_of[resolved]
        for a, b in itertools.combinations(owners, 2):
            keys = np.minimum(a, b) * len(groups) + np.maximum(a, b)
            keys[(a < 0) | (b < 0) | (a == b)] = -1
            # The same pair mostly fills long runs.
            pairs.update(keys[np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])].tolist())
    pairs.discard(-1)
    return frozenset(divmod(pair, len(groups)) for pair in pairs)


def _frozen_outputs(trace: Trace, live: Mapping[tuple[str, int], Slots]) -> tuple[Frozen, ...]:
    """Output channels that no plan may remove, by reason."""
    found: list[Frozen] = []
    for (entry, dim), role in trace.roles.items():
        if role != "out":
            continue
        slots = trace.parameters[entry][dim]
        resolved = live.get((entry, dim))
        stuck = (
            np.ones(slots.shape[1], dtype=bool) if resolved is None else ~(resolved > 0).any(axis=0)
        )
        if not len(slots) or not stuck.any():
            continue
        reasons: dict[int, int] = {}
        for label in slots[0][stuck]:
            reason = trace.store.reason(int(label))
            reasons[reason] = reasons.get(reason, 0) + 1
        for reason, channels in reasons.items():
            if 0 <= reason < len(trace.events):
                event = trace.events[reason]
                found.append(
                    Frozen(
                        entry,
                        channels,
                        event.detail or event.op,
                        event.op,
                        event.module,
                        event.source,
                    )
                )
    return tuple(found)

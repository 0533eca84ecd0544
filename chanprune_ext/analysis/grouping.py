"""Finds the coupling groups of a traced network from its label classes."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from chanprune_ext.analysis.groups import Analysis, CouplingGroup, Frozen, Member
from chanprune_ext.analysis.provenance import Attribute, Const, leaves
from chanprune_ext.analysis.tracer import ADDED, HEAD_DIM, HEADS, NORMALISED

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from chanprune_ext.analysis.trace import Trace
    from chanprune_ext.analysis.tracer import Slots

__all__ = ["build_analysis"]


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
    # The last dim of a matrix, or of several in one tensor, makes or reads; that of a kernel not.
    last = len(trace.shapes[maker.entry]) - 1
    return "mlp" if (maker.entry, last) in trace.roles else "hidden"


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

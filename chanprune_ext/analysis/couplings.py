"""Who is coupled to whom, through which operation, and what keeps the channels that must stay.

The label store knows that channels are equal, not why. The trace remembers every operation that
made labels equal; here these become edges between parameter dimensions, plain enough to be saved
with a plan.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from chanprune_ext.analysis.trace import Event, Trace

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from chanprune_ext.analysis.groups import Analysis

__all__ = ["CoupledDim", "Couplings", "StuckDim", "couplings_of"]

Edge = tuple[int, int, Event]


@dataclass(frozen=True)
class CoupledDim:
    """One dimension of one parameter or buffer in one group, or a step between such.

    Attributes:
        entry: Name of the parameter or buffer; empty for a step on the way, such as the factors a
            reshape makes of a dimension.
        dim: The dimension that shrinks with the group.
        role: ``"out"`` (makes the channels), ``"in"`` (reads them) or ``"with"`` (goes along).
        group: Index of the group.
        channels: How many indices of the dimension belong to the group.
    """

    entry: str
    dim: int
    role: str
    group: int
    channels: int

    @property
    def module(self) -> str:
        """Path of the module that owns the entry."""
        return self.entry.rpartition(".")[0] or self.entry


@dataclass(frozen=True)
class StuckDim:
    """Channels of one dimension that no plan removes.

    Attributes:
        entry: Name of the parameter or buffer.
        dim: The dimension.
        role: As in :class:`CoupledDim`.
        channels: How many of its indices stay for this reason.
        why: The operation that keeps them, and where; None where no layer makes these channels.
    """

    entry: str
    dim: int
    role: str
    channels: int
    why: Event | None


@dataclass(frozen=True, eq=False)
class Couplings:
    """The channels of a model as a graph.

    Attributes:
        members: Every dimension of every group, by group, and the steps between them.
        edges: ``(a, b, event)``: positions in ``members`` that the operation ``event`` joined.
        stuck: Channels that must stay.
        units: For every group, into how many parts it can be taken that leave one by one.
        rivals: Pairs of groups that are two ways to take the same channels (heads, or the same
            positions of every head), of which a plan takes one.
        aliases: Further names of shared parameters and buffers -> the name used here.
    """

    members: tuple[CoupledDim, ...] = ()
    edges: tuple[Edge, ...] = ()
    stuck: tuple[StuckDim, ...] = ()
    units: tuple[int, ...] = ()
    rivals: tuple[tuple[int, int], ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers, strings, lists and dicts; each event is written once."""
        events: dict[Event | None, int] = {}

        def number(event: Event | None) -> int:
            return events.setdefault(event, len(events))

        edges = [[a, b, number(event)] for a, b, event in self.edges]
        stuck = [[s.entry, s.dim, s.role, s.channels, number(s.why)] for s in self.stuck]
        return {
            "members": [list(astuple(m)) for m in self.members],
            "edges": edges,
            "stuck": stuck,
            "units": list(self.units),
            "rivals": [list(pair) for pair in self.rivals],
            "aliases": dict(self.aliases),
            "events": [None if event is None else list(astuple(event)) for event in events],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Couplings:
        """The inverse of :meth:`to_dict`.

        Raises:
            KeyError, TypeError, ValueError, IndexError: ``data`` is damaged.
        """
        events = [None if fields is None else Event(*fields) for fields in data["events"]]
        members = tuple(CoupledDim(*fields) for fields in data["members"])
        units = tuple(int(n) for n in data["units"])
        edges: list[Edge] = []
        for a, b, event in data["edges"]:
            where = events[event]
            if where is None or not (0 <= a < len(members) and 0 <= b < len(members)):
                raise ValueError(f"a coupling between {a} and {b} of {len(members)} dimensions")
            edges.append((a, b, where))
        for member in members:
            if not 0 <= member.group < len(units):
                raise ValueError(f"group {member.group} of '{member.entry}' is one of {len(units)}")
        stuck = tuple(
            StuckDim(entry, dim, role, channels, events[event])
            for entry, dim, role, channels, event in data["stuck"]
        )
        rivals = tuple((int(a), int(b)) for a, b in data["rivals"])
        return cls(members, tuple(edges), stuck, units, rivals, dict(data["aliases"]))


def couplings_of(analysis: Analysis, model: nn.Module) -> Couplings:
    """Turn what a trace remembers into a graph of parameter dimensions.

    Args:
        analysis: The groups of ``model``.
        model: Where shared parameters have their further names.
    """
    trace = analysis.trace
    # (rows, labels): the groups that each label belongs to, -1 for none; several where a label is
    # the OR of others.
    leaves = trace.store.resolve(np.arange(trace.store.size)[None])
    group_of_root = np.full(trace.store.size, -1, dtype=np.int32)
    for group in analysis.groups:
        group_of_root[group.roots] = group.index
    groups = group_of_root[leaves]
    graph = _Graph(analysis, groups)
    for event, a, b in trace.joins:
        graph.join(event, a, b)
    members, edges = graph.finished(trace.events)
    return Couplings(
        members,
        edges,
        tuple(_stuck(trace, groups)),
        tuple(group.units for group in analysis.groups),
        tuple(sorted(analysis.conflicts)),
        _aliases(model),
    )


class _Graph:
    """Edges between (row of labels, group) pairs, gathered join by join."""

    def __init__(self, analysis: Analysis, groups: np.ndarray) -> None:
        trace = analysis.trace
        self.members = [
            CoupledDim(m.entry, m.dim, m.role, group.index, m.indices.size)
            for group in analysis.groups
            for m in group.members
        ]
        first_label = {
            (entry, dim): int(slots[0, 0])
            for entry, dims in trace.parameters.items()
            for dim, slots in enumerate(dims)
            if len(slots)
        }
        # Labels of parameters come first; what follows the last of them belongs to none.
        end = max(
            (int(s[0, -1]) + 1 for dims in trace.parameters.values() for s in dims if len(s)),
            default=1,
        )
        starts = np.unique(np.array([0, end, *trace.axes], dtype=np.int64))
        row_of = {int(first): row for row, first in enumerate(starts)}
        self.node = {
            (row_of[first_label[m.entry, m.dim]], m.group): i for i, m in enumerate(self.members)
        }
        # Labels beside each other in the same row and the same groups form a cell: joins are
        # compared cell by cell, not label by label.
        rows = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, groups.shape[1]]))
        keys = np.concatenate([rows[None], groups])
        begins = np.r_[True, (keys[:, 1:] != keys[:, :-1]).any(axis=0)]
        self.cell_of = np.cumsum(begins) - 1
        self.cells = [
            (int(row), frozenset(int(g) for g in found if g >= 0))
            for row, *found in keys[:, begins].T.tolist()
        ]
        self.edges: dict[tuple[int, int], int] = {}
        self._seen: set[tuple[int, int]] = set()

    def join(self, event: int, a: np.ndarray, b: np.ndarray) -> None:
        """Add the edges of one operation that made the columns of ``a`` and ``b`` equal."""
        for left in self.cell_of[a]:
            for right in self.cell_of[b]:
                new = np.flatnonzero((left[1:] != left[:-1]) | (right[1:] != right[:-1])) + 1
                first = [0, *new.tolist()]
                for pair in zip(left[first].tolist(), right[first].tolist(), strict=True):
                    if pair not in self._seen:
                        self._seen.add(pair)
                        self._add(event, *pair)

    def _add(self, event: int, left: int, right: int) -> None:
        (row_a, groups_a), (row_b, groups_b) = self.cells[left], self.cells[right]
        if row_a == row_b:
            return
        for group in sorted(groups_a & groups_b):
            a, b = sorted((self._node(row_a, group), self._node(row_b, group)))
            self.edges.setdefault((a, b), event)

    def _node(self, row: int, group: int) -> int:
        found = self.node.setdefault((row, group), len(self.members))
        if found == len(self.members):
            self.members.append(CoupledDim("", 0, "", group, 0))
        return found

    def finished(
        self, events: list[Event]
    ) -> tuple[tuple[CoupledDim, ...], tuple[tuple[int, int, Event], ...]]:
        """Members and edges, without steps that lead nowhere."""
        neighbours: dict[int, set[int]] = {}
        for a, b in self.edges:
            neighbours.setdefault(a, set()).add(b)
            neighbours.setdefault(b, set()).add(a)
        dropped: set[int] = set()
        pending = [i for i, m in enumerate(self.members) if not m.entry]
        while pending:
            i = pending.pop()
            if self.members[i].entry or i in dropped or len(neighbours[i]) > 1:
                continue
            dropped.add(i)
            for other in neighbours[i]:
                neighbours[other].discard(i)
                pending.append(other)
        position = {
            i: p for p, i in enumerate(i for i in range(len(self.members)) if i not in dropped)
        }
        return (
            tuple(self.members[i] for i in position),
            tuple(
                (position[a], position[b], events[event])
                for (a, b), event in self.edges.items()
                if a in position and b in position
            ),
        )


def _stuck(trace: Trace, groups: np.ndarray) -> list[StuckDim]:
    """Channels in no group, by what keeps them.

    Positions of a kernel are left out: nobody takes them for channels.
    """
    weights = {entry for entry, _ in trace.roles}
    found: list[StuckDim] = []
    for entry, dims in trace.parameters.items():
        for dim, slots in enumerate(dims):
            role = trace.roles.get((entry, dim), "with")
            if not len(slots) or (role == "with" and entry in weights):
                continue
            stuck = slots[0][(groups[:, slots[0]] < 0).all(axis=0)]
            roots, counts = np.unique(trace.store.find(stuck), return_counts=True)
            reasons: dict[Event | None, int] = {}
            for root, channels in zip(roots.tolist(), counts.tolist(), strict=True):
                reason = trace.store.reason(root)
                event = trace.events[reason] if reason >= 0 else None
                reasons[event] = reasons.get(event, 0) + channels
            found.extend(StuckDim(entry, dim, role, n, event) for event, n in reasons.items())
    return found


def _aliases(model: nn.Module) -> dict[str, str]:
    """Further names of shared parameters and buffers -> the first one."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for tensors in (
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    ):
        for name, tensor in tensors:
            known = first.setdefault(id(tensor), name)
            if known != name:
                aliases[name] = known
    return aliases

"""From joins of labels to edges between parameter dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanprune_ext.analysis.groups import Analysis
    from chanprune_ext.analysis.tracer import Event

__all__ = ["CoupledDim", "CouplingGraph"]


@dataclass(frozen=True, slots=True)
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


class CouplingGraph:
    """Edges between (row of labels, group) pairs, gathered join by join.

    Pairs are numbered rather than made tuples: thousands of those would set off the garbage
    collector, which takes longer than all the rest.
    """

    def __init__(self, analysis: Analysis, groups: np.ndarray) -> None:
        trace = analysis.trace
        self.members = [
            CoupledDim(m.entry, m.dim, m.role, group.index, m.indices.size)
            for group in analysis.groups
            for m in group.members
        ]
        self.group_count = max(len(analysis.groups), 1)
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
            row_of[first_label[m.entry, m.dim]] * self.group_count + m.group: i
            for i, m in enumerate(self.members)
        }
        # Labels beside each other in the same row and the same groups form a cell: joins are
        # compared cell by cell, not label by label.
        rows = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, groups.shape[1]]))
        begins = np.r_[
            True, (rows[1:] != rows[:-1]) | (groups[:, 1:] != groups[:, :-1]).any(axis=0)
        ]
        self.cell_of = np.cumsum(begins) - 1
        self.cell_row = rows[begins].tolist()
        found = groups[:, begins]
        highest = found.max(axis=0, initial=-1)
        self.cell_group = highest.tolist()
        self.cell_groups = {
            int(cell): frozenset(int(g) for g in found[:, cell] if g >= 0)
            for cell in np.flatnonzero(((found >= 0) & (found != highest)).any(axis=0))
        }
        self.edges: dict[int, int] = {}  # two numbered nodes -> event
        self._seen: set[int] = set()

    def join(self, event: int, a: np.ndarray, b: np.ndarray) -> None:
        """Add the edges of one operation that made the columns of ``a`` and ``b`` equal."""
        for left in self.cell_of[a]:
            for right in self.cell_of[b]:
                new = np.flatnonzero((left[1:] != left[:-1]) | (right[1:] != right[:-1])) + 1
                first = [0, *new.tolist()]
                for x, y in zip(left[first].tolist(), right[first].tolist(), strict=True):
                    pair = x * len(self.cell_row) + y
                    if pair not in self._seen:
                        self._seen.add(pair)
                        self._add(event, x, y)

    def _add(self, event: int, left: int, right: int) -> None:
        row_a, row_b = self.cell_row[left], self.cell_row[right]
        if row_a == row_b:
            return
        if left in self.cell_groups or right in self.cell_groups:
            common = sorted(self._groups(left) & self._groups(right))
        else:
            common = (
                [self.cell_group[left]] if self.cell_group[left] == self.cell_group[right] else []
            )
        for group in common:
            if group >= 0:
                a, b = sorted((self._node(row_a, group), self._node(row_b, group)))
                self.edges.setdefault(a << 32 | b, event)

    def _groups(self, cell: int) -> frozenset[int]:
        return self.cell_groups.get(cell) or frozenset((self.cell_group[cell],))

    def _node(self, row: int, group: int) -> int:
        found = self.node.setdefault(row * self.group_count + group, len(self.members))
        if found == len(self.members):
            self.members.append(CoupledDim("", 0, "", group, 0))
        return found

    def finished(
        self, events: Sequence[Event]
    ) -> tuple[tuple[CoupledDim, ...], np.ndarray, tuple[Event, ...]]:
        """Members, edges and their events, without steps that lead nowhere."""
        keys = np.fromiter(self.edges, dtype=np.int64, count=len(self.edges))
        found = np.fromiter(self.edges.values(), dtype=np.int64, count=len(self.edges))
        ends = np.stack([keys >> 32, keys & 0xFFFFFFFF], axis=1)
        step = np.array([not m.entry for m in self.members], dtype=bool)
        while True:
            degree = np.bincount(ends.ravel(), minlength=len(step))
            useful = ~(step & (degree < 2))[ends].any(axis=1)
            if useful.all():
                break
            ends, found = ends[useful], found[useful]
        kept = ~step | (degree > 0)
        position = np.cumsum(kept) - 1
        # Operations that did the same at the same place are one.
        number: dict[Event, int] = {}
        told = [number.setdefault(events[event], len(number)) for event in found.tolist()]
        edges = np.column_stack([position[ends], np.array(told, dtype=np.int64)])
        members = tuple(m for m, keep in zip(self.members, kept.tolist(), strict=True) if keep)
        return members, edges, tuple(number)

"""Who is coupled to whom, through which operation, and what keeps the channels that must stay.

The label store knows that channels are equal, not why. The trace remembers every operation that
made labels equal; here these become edges between parameter dimensions, plain enough to be saved
with a plan.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from chanprune_ext.analysis.coupling_graph import CoupledDim, CouplingGraph
from chanprune_ext.analysis.tracer import Event
from chanprune_ext.module_tree import modules_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from chanprune_ext.analysis.groups import Analysis
    from chanprune_ext.analysis.trace import Trace

__all__ = ["CoupledDim", "Couplings", "StuckDim", "aliases_of", "couplings_of"]


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
        edges: int64 (edges, 3): two positions in ``members``, and the position in ``events`` of the
            operation that joined them. An array, for there are thousands.
        events: The operations.
        stuck: Channels that must stay.
        units: For every group, into how many parts it can be taken that leave one by one.
        rivals: Pairs of groups that are two ways to take the same channels (heads, or the same
            positions of every head), of which a plan takes one.
        aliases: Further names of shared parameters and buffers -> the name used here.
    """

    members: tuple[CoupledDim, ...] = ()
    edges: np.ndarray = field(default_factory=lambda: np.empty((0, 3), dtype=np.int64))
    events: tuple[Event, ...] = ()
    stuck: tuple[StuckDim, ...] = ()
    units: tuple[int, ...] = ()
    rivals: tuple[tuple[int, int], ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers, strings, lists and dicts; each event is written once."""
        events: dict[Event | None, int] = {event: i for i, event in enumerate(self.events)}
        stuck = [
            [s.entry, s.dim, s.role, s.channels, events.setdefault(s.why, len(events))]
            for s in self.stuck
        ]
        return {
            "members": [list(astuple(m)) for m in self.members],
            "edges": self.edges.tolist(),
            "stuck": stuck,
            "units": list(self.units),
            "rivals": [list(pair) for pair in self.rivals],
            "aliases": dict(self.aliases),
            "events": [None if event is None else list(astuple(event)) for event in events],
            "joining": len(self.events),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Couplings:
        """The inverse of :meth:`to_dict`.

        Raises:
            KeyError, TypeError, ValueError, IndexError: ``data`` is damaged.
        """
        events = [None if fields is None else Event(*fields) for fields in data["events"]]
        joining = tuple(event for event in events[: data["joining"]] if event is not None)
        members = tuple(CoupledDim(*fields) for fields in data["members"])
        units = tuple(int(n) for n in data["units"])
        edges = np.array(data["edges"], dtype=np.int64).reshape(len(data["edges"]), 3)
        if edges.size and (
            edges.min() < 0 or (edges.max(axis=0) >= [len(members)] * 2 + [len(joining)]).any()
        ):
            raise ValueError(f"couplings among {len(members)} dimensions name others")
        for member in members:
            if not 0 <= member.group < len(units):
                raise ValueError(f"group {member.group} of '{member.entry}' is one of {len(units)}")
        stuck = tuple(
            StuckDim(entry, dim, role, channels, events[event])
            for entry, dim, role, channels, event in data["stuck"]
        )
        rivals = tuple((int(a), int(b)) for a, b in data["rivals"])
        return cls(members, edges, joining, stuck, units, rivals, dict(data["aliases"]))


def couplings_of(analysis: Analysis, aliases: Mapping[str, str]) -> Couplings:
    """Turn what a trace remembers into a graph of parameter dimensions.

    Args:
        analysis: The groups of a model.
        aliases: Further names of its shared parameters, from :func:`aliases_of`.
    """
    trace = analysis.trace
    # (rows, labels): the groups that each label belongs to, -1 for none; several where a label is
    # the OR of others.
    group_of_root = np.full(trace.store.size, -1, dtype=np.int32)
    for group in analysis.groups:
        group_of_root[group.roots] = group.index
    groups = group_of_root[analysis.leaves]
    graph = CouplingGraph(analysis, groups)
    for event, a, b in trace.joins:
        graph.join(event, a, b)
    members, edges, events = graph.finished(trace.events)
    return Couplings(
        members,
        edges,
        events,
        tuple(_stuck(trace, groups)),
        tuple(group.units for group in analysis.groups),
        tuple(sorted(analysis.conflicts)),
        aliases,
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


def aliases_of(model: nn.Module) -> dict[str, str]:
    """Further names of shared parameters and buffers -> the first one."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for kind in ("_parameters", "_buffers"):
        for path, module in _every_path(model):
            for name, tensor in module.__dict__[kind].items():
                if tensor is None:
                    continue
                full = f"{path}.{name}" if path else name
                known = first.setdefault(id(tensor), full)
                if known != full:
                    aliases[full] = known
    return aliases


def _every_path(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module under each of its paths, parents first."""
    modules = modules_of(model)
    ways = sum(child is not None for _, m in modules for child in m._modules.values())  # noqa: SLF001
    # A tree has one way less than modules.
    return modules if ways < len(modules) else list(model.named_modules(remove_duplicate=False))

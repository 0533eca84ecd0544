"""A whole model at a glance: its groups, and what keeps the channels that must stay."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from chanprune_ext.analysis import analyse
from chanprune_ext.analysis.couplings import aliases_of, couplings_of
from chanprune_ext.explanation import explain
from chanprune_ext.plan import structure_of
from chanprune_ext.pruning import group_summaries

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from chanprune_ext.analysis.couplings import Couplings
    from chanprune_ext.analysis.groups import Frozen
    from chanprune_ext.explanation import Explanation
    from chanprune_ext.group_summary import GroupSummary

__all__ = ["Inspection", "inspect_model"]


@dataclass(frozen=True, eq=False)
class Inspection:
    """What an analysis finds, without a decision on what to remove.

    Attributes:
        groups: Every group, nothing removed.
        frozen: Output channels that no plan may remove, and why.
        couplings: Who is coupled to whom.
        channels: Output channels of all layers.
        stuck: How many of those must stay.
        fingerprint: Structure of the model.
        substrate: The model ran on ``"meta"``, ``"fake"`` or ``"real"`` tensors.
    """

    groups: tuple[GroupSummary, ...]
    frozen: tuple[Frozen, ...]
    couplings: Couplings
    channels: int
    stuck: int
    fingerprint: Mapping[str, Any]
    substrate: str

    def explain(self, name: str) -> Explanation:
        """As :meth:`chanprune_ext.PruningPlan.explain`, before anything is decided."""
        return explain(name, self.couplings, self.groups, self.frozen, self.fingerprint)

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain numbers, strings, lists and dicts."""
        return {
            "groups": [
                {
                    "name": group.name,
                    "producers": list(group.producers),
                    "consumers": list(group.consumers),
                    "width": group.width_before,
                    "units": units,
                    "normalised": group.normalised,
                }
                for group, units in zip(self.groups, self.couplings.units, strict=True)
            ],
            "frozen": [asdict(frozen) for frozen in self.frozen],
            "couplings": self.couplings.to_dict(),
            "channels": self.channels,
            "stuck": self.stuck,
            "substrate": self.substrate,
        }


def inspect_model(model: nn.Module, example_inputs: Any) -> Inspection:
    """Find the groups of a model and what freezes the rest. The model is left untouched.

    Args:
        model: Any eager module, also on the meta device.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs.

    Raises:
        InvalidArgumentError: The model cannot be followed, or the inputs hold no tensor.
        AnalysisError: The model's forward raised.
    """
    analysis = analyse(model, example_inputs)
    couplings = couplings_of(analysis, aliases_of(model))
    trace = analysis.trace
    return Inspection(
        groups=group_summaries(analysis, {}),
        frozen=analysis.frozen,
        couplings=couplings,
        channels=sum(trace.shapes[e][d] for (e, d), role in trace.roles.items() if role == "out"),
        stuck=sum(s.channels for s in couplings.stuck if s.role == "out"),
        fingerprint=structure_of(model),
        substrate=trace.substrate,
    )

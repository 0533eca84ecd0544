"""How much a network's output suffers when one coupling group alone loses channels.

Each group in turn loses its lowest-scored units, here by zeroing them, which is exactly what
removing them does to the output. Nothing is sliced, so a curve costs forward passes only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from chanprune_ext.analysis import analyse
from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.atomic_files import write_text
from chanprune_ext.compensation.batches import read_batches
from chanprune_ext.compensation.outputs import DeviationMeter, forward, output_tensors
from chanprune_ext.copying import copied
from chanprune_ext.criteria import Criterion, score_groups
from chanprune_ext.errors import InvalidArgumentError, NothingToPruneError
from chanprune_ext.module_modes import evaluating
from chanprune_ext.verification import zero_slices

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from chanprune_ext.analysis import CouplingGroup

__all__ = ["GroupCurve", "Sensitivity", "sensitivity"]


@dataclass(frozen=True)
class GroupCurve:
    """What removing a growing part of one group does to the output.

    Attributes:
        group: The first module that makes the channels.
        producers: All modules that make them.
        width: Channels of that module in the group.
        removed: Channels removed at each point.
        error: Relative L2 error of the outputs at each point; 0 is no change.
        kl: Mean KL divergence in nats between the softmax outputs, where the model returns one
            (N, C) tensor; None elsewhere.
    """

    group: str
    producers: tuple[str, ...]
    width: int
    removed: tuple[int, ...]
    error: tuple[float, ...]
    kl: tuple[float, ...] | None


@dataclass(frozen=True)
class Sensitivity:
    """The curves of all groups of a model, in execution order.

    Attributes:
        curves: One curve per group.
        ratios: The ratios asked for.
        criterion: Name of the criterion that ordered the channels.
        samples: Samples the errors were measured on.
        skipped: Groups without a curve: a layer normalises over their channels, so that zeroing
            is not removing.
    """

    curves: tuple[GroupCurve, ...]
    ratios: tuple[float, ...]
    criterion: str
    samples: int
    skipped: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The curves as plain numbers, strings, lists and dicts."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the curves as JSON, whole or not at all.

        Raises:
            OutputError: The file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1)
        write_text(path, text)

    def __str__(self) -> str:
        header = ["group", "width", *(f"-{ratio:.0%}" for ratio in self.ratios)]
        rows = [[c.group, str(c.width), *(f"{e:.4f}" for e in c.error)] for c in self.curves]
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
            for row in (header, *rows)
        ]
        return "\n".join([*lines, f"relative output error, {self.samples} samples"])


def sensitivity(
    model: nn.Module,
    example_inputs: Any,
    batches: Any,
    *,
    ratios: Sequence[float] = (0.25, 0.5, 0.75),
    criterion: str | Criterion = "l1",
    seed: int = 0,
) -> Sensitivity:
    """Measure the output error of removing each ratio from each group alone.

    Args:
        model: Any eager module; left untouched.
        example_inputs: As for :func:`chanprune_ext.plan`.
        batches: Inputs to measure on, as for :func:`chanprune_ext.compensate`; labels are ignored.
        ratios: Fractions of a group's channels to remove, each in (0, 1), in rising order.
        criterion: Orders the channels: the lowest-scored go first.
        seed: Seed of criteria that draw numbers.

    Raises:
        InvalidArgumentError: A ratio is out of range, or the inputs are empty or not finite.
        NothingToPruneError: The model has no groups.
    """
    ratios = tuple(float(r) for r in ratios)
    if not ratios or not all(0 < r < 1 for r in ratios) or list(ratios) != sorted(ratios):
        raise InvalidArgumentError(f"ratios must rise and lie in (0, 1), got {list(ratios)}")
    analysis = analyse(model, example_inputs)
    if not analysis.groups:
        raise NothingToPruneError("the model has no channels that may be removed")
    scores = score_groups(model, analysis.groups, criterion, seed)
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    items = read_batches(batches, model, device=device)
    work = copied(model)
    originals = dict(model.named_parameters())
    with evaluating(work), torch.no_grad():
        expected = [output_tensors(forward(work, item)) for item in items]
        curves = []
        for group in analysis.groups:
            if group.normalised:
                continue
            points = []
            for ratio in ratios:
                units = _lowest(scores[group.index], ratio)
                slices = _slices(group, units)
                zero_slices(work, slices)
                meter = DeviationMeter()
                for item, before in zip(items, expected, strict=True):
                    meter.add(before, output_tensors(forward(work, item)))
                _restore(work, originals, slices)
                points.append((len(units) * group.multiplicity, meter.deviation()))
            kl = tuple(d.kl for _, d in points if d.kl is not None)
            curves.append(
                GroupCurve(
                    group.name,
                    group.producers,
                    group.units * group.multiplicity,
                    tuple(removed for removed, _ in points),
                    tuple(d.relative_l2 for _, d in points),
                    kl if len(kl) == len(points) else None,
                )
            )
    return Sensitivity(
        tuple(curves),
        ratios,
        criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "function"),
        sum(len(tensors_in(item)[0]) for item in items),
        tuple(g.name for g in analysis.groups if g.normalised),
    )


def _lowest(score: np.ndarray, ratio: float) -> np.ndarray:
    """Units to remove: the lowest-scored ones, never all; of equal scores the later goes first."""
    count = min(int(ratio * len(score) + 0.5), len(score) - 1)
    order = np.argsort(-score, kind="stable")
    return order[len(score) - count :]


def _slices(group: CouplingGroup, units: np.ndarray) -> dict[str, dict[int, Tensor]]:
    slices: dict[str, dict[int, Tensor]] = {}
    for member in group.members:
        index = np.unique(member.indices[units])
        slices.setdefault(member.entry, {})[member.dim] = torch.from_numpy(index)
    return slices


def _restore(
    work: nn.Module, originals: Mapping[str, Tensor], slices: Mapping[str, Mapping[int, Tensor]]
) -> None:
    for name, parameter in work.named_parameters():
        if name in slices:
            parameter.copy_(originals[name])

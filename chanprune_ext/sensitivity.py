"""How much a network suffers when one coupling group alone loses channels.

Each group in turn loses its lowest-scored units, by zeroing them, which is exactly what removing
them does to the output: nothing is sliced, and a curve costs forward passes only. On request each
point is also measured after compensation, which slices and refits a copy of the network.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from chanprune_ext.allocation.links import rounded_count
from chanprune_ext.allocation.selection import Selection
from chanprune_ext.analysis import analyse
from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.atomic_files import write_text
from chanprune_ext.compensation import compensate
from chanprune_ext.compensation.batches import read_batches
from chanprune_ext.compensation.outputs import DeviationMeter, forward, output_tensors
from chanprune_ext.copying import copied
from chanprune_ext.criteria import Criterion, score_groups
from chanprune_ext.errors import CheckpointError, InvalidArgumentError, NothingToPruneError
from chanprune_ext.module_modes import evaluating
from chanprune_ext.pruning import plan_of_scores
from chanprune_ext.verification import input_shapes, zero_slices

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from chanprune_ext.analysis import Analysis, CouplingGroup

__all__ = ["Curve", "GroupCurve", "Sensitivity", "sensitivity", "told_apart"]


@dataclass(frozen=True)
class Curve:
    """What removing more and more channels does, one value a ratio.

    Attributes:
        error: Relative L2 error of the outputs; 0 is no change.
        kl: Mean KL divergence in nats between the softmax outputs, where the model returns one
            (N, C) tensor; None elsewhere.
        accuracy: Share of samples whose label has the highest logit, where labels were given.
    """

    error: tuple[float, ...]
    kl: tuple[float, ...] | None
    accuracy: tuple[float, ...] | None = None


@dataclass(frozen=True)
class GroupCurve(Curve):
    """The curve of one group.

    Attributes:
        group: The first module that makes the channels.
        producers: All modules that make them.
        width: Channels of that module in the group.
        removed: Channels removed at each point.
        compensated: The same after compensation, where that was asked for; None too where a size
            ties the channels to those of other groups, so that no plan removes them alone.
        kind: What the channels are, one of the ``kinds`` of :func:`chanprune_ext.plan`; empty in
            files of earlier versions.
    """

    group: str = ""
    producers: tuple[str, ...] = ()
    width: int = 0
    removed: tuple[int, ...] = ()
    compensated: Curve | None = None
    kind: str = ""


def told_apart(groups: Sequence[tuple[str, str]]) -> list[str]:
    """Labels of groups from their names and kinds: the kind only where a name repeats.

    One layer may make channels of several groups: heads and their width.
    """
    counts = Counter(name for name, _ in groups)
    return [f"{name} ({kind})" if counts[name] > 1 and kind else name for name, kind in groups]


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
        accuracy: Of the original on the same samples; None without labels.
    """

    curves: tuple[GroupCurve, ...]
    ratios: tuple[float, ...]
    criterion: str
    samples: int
    skipped: tuple[str, ...]
    accuracy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The curves as plain numbers, strings, lists and dicts."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sensitivity:
        """The inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: A field is missing or unknown.
        """
        try:
            curves = []
            for item in data["curves"]:
                values: dict[str, Any] = {
                    k: tuple(v) if isinstance(v, list) else v for k, v in item.items()
                }
                if values.get("compensated") is not None:
                    values["compensated"] = Curve(
                        **{
                            k: tuple(v) if isinstance(v, list) else v
                            for k, v in values["compensated"].items()
                        }
                    )
                curves.append(GroupCurve(**values))
            rest: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in data.items()
            }
            rest["curves"] = tuple(curves)
            return cls(**rest)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"no sensitivity curves: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the curves as JSON, whole or not at all.

        Raises:
            OutputError: The file cannot be written.
        """
        write_text(path, json.dumps(self.to_dict(), indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """Read curves written by :meth:`save`.

        Raises:
            CheckpointError: The file is missing, no JSON, or holds no curves.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read curves from '{path}': {error}") from error
        return cls.from_dict(data)

    def __str__(self) -> str:
        header = ["group", "width", *(f"-{ratio:.0%}" for ratio in self.ratios)]
        names = told_apart([(c.group, c.kind) for c in self.curves])
        rows = [
            [name, str(c.width), *(f"{e:.4f}" for e in c.error)]
            for name, c in zip(names, self.curves, strict=True)
        ]
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
    calibration: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> Sensitivity:
    """Measure what removing each ratio from each group alone does to the output.

    Args:
        model: Any eager module; left untouched.
        example_inputs: As for :func:`chanprune_ext.plan`.
        batches: Inputs to measure on, as for :func:`chanprune_ext.compensate`. Where every batch is
            a pair of inputs and integer labels (N), accuracy is measured too.
        ratios: Fractions of a group's channels to remove, each in (0, 1), in rising order.
        criterion: Orders the channels: the lowest-scored go first.
        calibration: Unlabelled inputs, others than ``batches``: each point is also measured after
            :func:`chanprune_ext.compensate` on them. Costs one compensation of the network for each
            point; left out for groups that can't be pruned alone. Default: None, not done.
        seed: Seed of criteria that draw numbers.
        progress: Draw a progress bar on a terminal. Default: True.

    Raises:
        InvalidArgumentError: A ratio is out of range, or the inputs are empty or not finite.
        NothingToPruneError: The model has no groups.
    """
    try:
        ratios = tuple(float(r) for r in ratios)
    except (TypeError, ValueError):
        raise InvalidArgumentError(
            f"ratios: expected several numbers in (0, 1), such as (0.25, 0.5), got {ratios!r}"
        ) from None
    if not ratios or not all(0 < r < 1 for r in ratios) or list(ratios) != sorted(ratios):
        raise InvalidArgumentError(f"ratios must rise and lie in (0, 1), got {list(ratios)}")
    analysis = analyse(model, example_inputs)
    if not analysis.groups:
        raise NothingToPruneError("the model has no channels that may be removed")
    scores = score_groups(model, analysis.groups, criterion, seed)
    meter = _Meter(model, batches, example_inputs)
    work = copied(model)
    originals = dict(model.named_parameters())
    if calibration is not None and not isinstance(calibration, Tensor):
        calibration = list(calibration)
    measured = [group for group in analysis.groups if not group.normalised]
    curves = []
    with evaluating(work), _bar(len(measured) * len(ratios), progress) as advance:
        for group in measured:
            plain, compensated, removed = [], [], []
            for ratio in ratios:
                units = _lowest(group, scores[group.index], ratio)
                slices = _slices(group, units)
                with torch.no_grad():
                    zero_slices(work, slices)
                    plain.append(meter.point(work))
                    _restore(work, originals, slices)
                removed.append(len(units) * group.multiplicity)
                if calibration is not None:
                    # A tied group may be removed alone at some ratios only.
                    with contextlib.suppress(NothingToPruneError):
                        pruned = _pruned(model, example_inputs, analysis, group, units, scores)
                        if pruned is not None:
                            compensate(pruned, model, calibration, progress=False)
                        with evaluating(pruned or work), torch.no_grad():
                            compensated.append(meter.point(pruned or work))
                advance(group.name)
            after = _curve(compensated) if len(compensated) == len(ratios) else None
            curves.append(
                GroupCurve(
                    **vars(_curve(plain)),
                    group=group.name,
                    producers=group.producers,
                    width=group.units * group.multiplicity,
                    removed=tuple(removed),
                    compensated=after,
                    kind=group.kind,
                )
            )
    return Sensitivity(
        tuple(curves),
        ratios,
        criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "function"),
        meter.samples,
        tuple(g.name for g in analysis.groups if g.normalised),
        meter.accuracy,
    )


class _Meter:
    """Compares networks with the original on the same inputs."""

    def __init__(self, model: nn.Module, batches: Any, example_inputs: Any) -> None:
        device = next((t.device for t in model.parameters()), torch.device("cpu"))
        if not isinstance(batches, Tensor):
            batches = list(batches)
        inputs = input_shapes(example_inputs)
        self._items = read_batches(batches, model, device=device, inputs=inputs)
        self._labels = _labels(batches)
        with evaluating(model), torch.no_grad():
            self._expected = [output_tensors(forward(model, item)) for item in self._items]
        self.samples = sum(len(tensors_in(item)[0]) for item in self._items)
        self.accuracy = self._accuracy(self._expected)

    def point(self, model: nn.Module) -> tuple[float, float | None, float | None]:
        """Relative error, KL divergence and accuracy of a network's outputs."""
        meter = DeviationMeter()
        outputs = []
        for item, before in zip(self._items, self._expected, strict=True):
            outputs.append(output_tensors(forward(model, item)))
            meter.add(before, outputs[-1])
        found = meter.deviation()
        return found.relative_l2, found.kl, self._accuracy(outputs)

    def _accuracy(self, outputs: Sequence[Sequence[Tensor]]) -> float | None:
        if self._labels is None or any(len(o) != 1 or o[0].ndim != 2 for o in outputs):
            return None
        right = sum(
            int((o[0].argmax(1).cpu() == y.cpu()).sum())
            for o, y in zip(outputs, self._labels, strict=True)
        )
        return right / self.samples


def _labels(batches: Any) -> list[Tensor] | None:
    """The integer labels of every batch; None where one has none."""
    if isinstance(batches, Tensor):
        return None
    labels = []
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            return None
        label = batch[1]
        if not isinstance(label, Tensor) or label.ndim != 1 or label.is_floating_point():
            return None
        labels.append(label)
    return labels


def _curve(points: Sequence[tuple[float, float | None, float | None]]) -> Curve:
    error, kl, accuracy = (
        tuple(v for v in values if v is not None) for values in zip(*points, strict=True)
    )
    whole = len(points)
    return Curve(
        error, kl if len(kl) == whole else None, accuracy if len(accuracy) == whole else None
    )


def _pruned(
    model: nn.Module,
    example_inputs: Any,
    analysis: Analysis,
    group: CouplingGroup,
    units: np.ndarray,
    scores: Sequence[np.ndarray],
) -> nn.Module | None:
    """A copy of the model without some units of one group; None if there is nothing to remove."""
    if not len(units):
        return None
    selection = Selection.of_groups({group.index: len(units) / group.units})
    made = plan_of_scores(analysis, model, example_inputs, scores, selection, "sensitivity", 0)
    return made.apply(model)


@contextlib.contextmanager
def _bar(points: int, progress: bool) -> Iterator[Callable[[str], None]]:
    """Advances a progress bar by one point of a named group."""
    if not progress or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=points)
        yield lambda name: bar.update(task, advance=1, description=f"measuring {name}")


def _lowest(group: CouplingGroup, score: np.ndarray, ratio: float) -> np.ndarray:
    """Units that a plan would remove: the lowest-scored ones; of equal ones the later goes."""
    order = np.argsort(-score, kind="stable")
    return order[rounded_count(group, group.units * (1 - ratio), 1) :]


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

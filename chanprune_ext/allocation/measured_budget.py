"""Budgets that are measured and not counted: latency, and the size of the saved file.

Both are met in rounds. A round asks the allocation for a plan within a cost that can be counted
(the predicted time; the bytes of the tensors), measures the result, and moves the limit by what the
count was off. Latency is noisy: original and candidate are timed in turns, and what counts is the
median of their paired ratios.
"""

from __future__ import annotations

import math
import statistics
import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.analysis.stand_ins import tensors_of
from chanprune_ext.errors import InvalidArgumentError, NothingToPruneError
from chanprune_ext.latency import Latency, measure_latency
from chanprune_ext.latency.layer_times import LatencyTable, default_table
from chanprune_ext.latency.prediction import LatencyModel
from chanprune_ext.widths import shape_after

from .saved_size import saved_bytes, tensor_bytes
from .selection import Goal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from chanprune_ext.analysis import Analysis
    from chanprune_ext.analysis.groups import Sizes
    from chanprune_ext.plan import PruningPlan

    from .selection import Budget

__all__ = ["Comparison", "compare_latency", "plan_within"]

_ROUNDS = 8  # plans that are measured at most
_PREDICTED_ROUNDS = 3  # of them by the predicted time
_GENTLE = 5  # of them that correct the file's size by no more than is certain
_SECONDS = 4.0  # what one comparison of two networks may take, more or less
_FEWEST_PAIRS = 5
_MOST_PAIRS = 101
_REPEATS = 3  # of a comparison that is not precise enough


@dataclass(frozen=True)
class Comparison:
    """Two networks timed in turns.

    Attributes:
        ratio: Time of the second over that of the first: median over the rounds.
        standard_error: Of the ratio, from the spread over the rounds.
        original: Times of the first.
        pruned: Times of the second.
    """

    ratio: float
    standard_error: float
    original: Latency
    pruned: Latency

    def to_dict(self) -> dict[str, Any]:
        """What was reached, and how it was measured."""
        return {
            "ratio": round(self.ratio, 4),
            "standard_error": round(self.standard_error, 4),
            "original_ms": round(self.original.median_ms, 4),
            "pruned_ms": round(self.pruned.median_ms, 4),
            "conditions": self.pruned.conditions(),
        }


def compare_latency(
    original: nn.Module, pruned: nn.Module, example_inputs: Any, *, precision: float = 0.01
) -> Comparison:
    """Times two networks in turns, for some seconds.

    Args:
        original: The first network.
        pruned: The second; both take ``example_inputs`` and are on their device.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs.
        precision: Standard error of the ratio that is enough. On a busy machine up to three times
            as many rounds are run to come there.
    """
    models = {"original": original, "pruned": pruned}
    first = measure_latency(models, example_inputs, rounds=1, warmup=0)
    pair_ms = sum(latency.median_ms for latency in first.values())
    # Calls shorter than a sample are repeated to fill it.
    pairs = int(_SECONDS * 1e3 / max(pair_ms, 4.0))
    rounds = min(max(pairs, _FEWEST_PAIRS), _MOST_PAIRS)
    samples: dict[str, tuple[float, ...]] = dict.fromkeys(models, ())
    for _ in range(_REPEATS):
        found = measure_latency(models, example_inputs, rounds=rounds, warmup=0)
        samples = {name: samples[name] + found[name].samples_ms for name in models}
        latencies = {n: replace(found[n], samples_ms=samples[n]) for n in models}
        ratio, error = _paired_ratio(samples["original"], samples["pruned"])
        if error <= precision:
            break
    return Comparison(ratio, error, latencies["original"], latencies["pruned"])


def _paired_ratio(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Median of after / before over the rounds, and its standard error."""
    ratios = [ours / theirs for theirs, ours in zip(before, after, strict=True)]
    ratio = statistics.median(ratios)
    deviation = 1.4826 * statistics.median(abs(r - ratio) for r in ratios)
    # A median's standard error is 1.25 times that of a mean.
    return ratio, 1.2533 * deviation / math.sqrt(len(ratios))


def plan_within(
    budget: Budget,
    analysis: Analysis,
    model: nn.Module,
    example_inputs: Any,
    plan_for: Callable[[tuple[Goal, ...]], PruningPlan],
) -> PruningPlan:
    """The plan that keeps most within a budget on latency, file size, or both.

    The latency of the result lies within ``budget.tolerance`` below the budget where the widths
    allow it; where another part of the budget binds it may be faster. What the last measurement
    gave is in the plan's ``options["reached"]``, with its standard error. A round measures for some
    four seconds, three times that on a busy machine; two or three rounds are usual, eight the most.
    Beside the model there has to be memory for a pruned copy of it.

    Args:
        budget: With a latency, a file size or both; MACs and parameters are the business of
            ``plan_for``.
        analysis: Groups of the model.
        model: The model, on the device and with the threads that count.
        example_inputs: What is timed.
        plan_for: Makes a plan that meets some goals beside the budget's counted ones.

    Raises:
        InvalidArgumentError: The model has no weights to run with, or the budget can't be met.
    """
    goals: dict[str, Goal] = {}
    latency = None
    if budget.latency is not None:
        latency = _LatencySearch(budget, analysis, model, example_inputs)
        goals["latency"] = latency.goal()
    size = None
    if budget.file_size is not None:
        size = _SizeSearch(budget.file_size, analysis, model)
        goals["file size"] = size.goal()
    best: PruningPlan | None = None
    for _ in range(_ROUNDS):
        try:
            made = plan_for(tuple(goals.values()))
        except (InvalidArgumentError, NothingToPruneError):
            if latency is None or latency.best is None:
                raise
            break  # the correction went further than the widths do
        finally:
            if latency is not None:
                latency.model.table.save()  # an interrupted search need not measure again
        if size is not None and not size.fits(made):
            goals["file size"] = size.goal()
            continue
        if latency is None:
            best = made
            break
        settled = latency.settle(made)
        best = latency.best
        if settled:
            break
        goals["latency"] = latency.goal()
    if best is None:
        raise InvalidArgumentError(
            f"budget cannot be met: no plan in {_ROUNDS} rounds was small enough; ask for less"
        )
    reached: dict[str, Any] = {}
    if latency is not None:
        reached["latency"] = latency.comparison.to_dict()
        latency.warn_if_missed()
    if size is None:
        return replace(best, options={**best.options, "reached": reached})
    return size.with_size(best, reached)


class _SizeSearch:
    """Counts the tensors' bytes, and corrects the limit by what else is in the file."""

    def __init__(self, fraction: float, analysis: Analysis, model: nn.Module) -> None:
        self.fraction = fraction
        self.model = model
        self.whole = saved_bytes(model)
        self.limit = math.floor(fraction * self.whole)
        self.element_bytes = tensor_bytes(model)
        self.shapes = analysis.trace.shapes
        self.overhead = self.whole - self._counted(lambda name: math.prod(self.shapes[name]))
        self.failures = 0

    def goal(self) -> Goal:
        return Goal("file size", self._cost, float(self.limit), float(self.whole))

    def fits(self, made: PruningPlan) -> bool:
        """Whether the file would be small enough; if not, the next goal is that much lower."""
        placeholder = {"latency": dict.fromkeys(range(5), "0" * 20)}
        size = self._bytes(self.with_size(made, placeholder))
        if size > self.limit:
            counted = self._counted(
                lambda name: math.prod(shape_after(self.shapes[name], made.kept.get(name, {})))
            )
            # At least so much that this very plan does not meet the goal any more; after a few
            # rounds all that is not counted in it, which may cost others a little.
            few = max(self.overhead + size - self.limit, self.limit - counted + 1)
            self.overhead = few if self.failures < _GENTLE else size - counted
            self.failures += 1
        return size <= self.limit

    def with_size(self, made: PruningPlan, reached: Mapping[str, Any]) -> PruningPlan:
        """The plan, telling the size of its own file."""
        result, size = made, self.limit
        for _ in range(4):  # the number is part of what is counted
            told = {
                "bytes": size,
                "original_bytes": self.whole,
                "ratio": round(size / self.whole, 4),
            }
            options = {**made.options, "reached": {**reached, "file_size": told}}
            result = replace(made, options=options)
            before, size = size, self._bytes(result)
            if size == before:
                break
        return result

    def _bytes(self, made: PruningPlan) -> int:
        return saved_bytes(self.model, made)

    def _cost(self, sizes: Sizes) -> float:
        return self._counted(lambda name: sizes.params([name])) + self.overhead

    def _counted(self, elements: Callable[[str], int]) -> int:
        """Bytes of the tensors whose sizes are known, given how many elements each has."""
        return sum(
            size * elements(name)
            for name, size in self.element_bytes.items()
            if name in self.shapes
        )


@dataclass
class _Scale:
    """A cost that can be counted, and what was measured at limits of it.

    Attributes:
        cost: The cost at given sizes.
        whole: The cost with nothing removed.
        points: Limit as a fraction of ``whole``, and measured ratio of the times.
    """

    cost: Callable[[Sizes], float]
    whole: float
    points: list[tuple[float, float]] = field(default_factory=list)


class _LatencySearch:
    """Predicts the time, measures plans, and corrects the limit of the prediction."""

    def __init__(
        self, budget: Budget, analysis: Analysis, model: nn.Module, example_inputs: Any
    ) -> None:
        assert budget.latency is not None
        if any(t.is_meta for t in (*tensors_of(model).values(), *tensors_in(example_inputs))):
            raise InvalidArgumentError(
                "Budget.latency needs a model with weights and inputs with values: on the meta "
                "device nothing can be timed; load them, or give a budget on macs"
            )
        self.most = budget.latency
        self.least = budget.latency * (1 - budget.tolerance)
        self.network = model
        self.inputs = example_inputs
        device = tensors_in(example_inputs)[0].device
        path = budget.latency_table or default_table(device)
        whole = measure_latency({"original": model}, example_inputs, rounds=3, warmup=1)
        whole_ms = whole["original"].median_ms
        table = LatencyTable(path, device)
        self.model = LatencyModel(analysis, model, example_inputs, table, whole_ms)
        whole_sizes = analysis.sizes(analysis.removed_labels({}))
        self.scales = {
            "predicted": _Scale(self.model.milliseconds, self.model.unpruned_ms),
            "MACs": _Scale(lambda sizes: float(sizes.macs()), float(max(whole_sizes.macs(), 1))),
        }
        self.scale = "predicted"
        self.limit = self.aim
        self.measured = 0
        self.best: PruningPlan | None = None
        self.comparison: Comparison

    @property
    def aim(self) -> float:
        return (self.most + self.least) / 2

    def goal(self) -> Goal:
        scale = self.scales[self.scale]
        return Goal("latency", scale.cost, self.limit * scale.whole, scale.whole)

    def settle(self, made: PruningPlan) -> bool:
        """Measures a plan; whether it will do. If not, the next goal has another limit."""
        pruned = made.apply(self.network, verify=None)
        precision = (self.most - self.least) / 4
        found = compare_latency(self.network, pruned, self.inputs, precision=precision)
        if self.best is None or self._miss(found.ratio) < self._miss(self.comparison.ratio):
            self.best, self.comparison = made, found
        if self.least <= found.ratio <= self.most:
            return True
        if self.scale == "predicted":
            self.scales["predicted"].points.append((self.limit, found.ratio))
        self.scales["MACs"].points.append((made.macs_after / made.macs_before, found.ratio))
        self.measured += 1
        if self.measured == _PREDICTED_ROUNDS:
            # Times of layers jump from width to width; MACs do not, and lead between the jumps.
            self.scale = "MACs"
        before, self.limit = self.limit, self._next_limit()
        return self.measured != _PREDICTED_ROUNDS and abs(self.limit - before) < 1e-4 * before

    def _miss(self, ratio: float) -> float:
        """Distance to what is wanted; too slow counts double."""
        return 2 * (ratio - self.most) if ratio > self.most else max(self.least - ratio, 0.0)

    def _next_limit(self) -> float:
        """Between the two nearest measured limits, or in proportion where all are on one side."""
        points = self.scales[self.scale].points
        slower = min((p for p in points if p[1] > self.aim), default=None, key=lambda p: p[1])
        faster = max((p for p in points if p[1] <= self.aim), default=None, key=lambda p: p[1])
        if slower is None or faster is None:
            limit, ratio = points[-1]
            return min(limit * self.aim / ratio, 1.0)
        (high, above), (low, below) = slower, faster
        return low + (high - low) * (self.aim - below) / (above - below)

    def warn_if_missed(self) -> None:
        ratio = self.comparison.ratio
        if not self.least <= ratio <= self.most:
            reason = "slower" if ratio > self.most else "faster"
            warnings.warn(
                f"Budget.latency={self.most}: the nearest plan takes {ratio:.3f} ± "
                f"{self.comparison.standard_error:.3f} of the original's time, {reason} than "
                f"asked for; widths move the time in steps here, or the machine is busy: try "
                f"again with a larger tolerance",
                UserWarning,
                stacklevel=4,
            )

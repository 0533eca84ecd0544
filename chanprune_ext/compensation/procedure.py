"""Accuracy back without training: batch-norm statistics and least squares from calibration data."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..analysis.call_trace import record_calls
from ..analysis.calls import steady_calls
from ..host_memory import freed_memory_kept
from .batches import Calibration, first_samples, read_batches, sample_count, split_batches
from .checks import (
    HasKept,
    check_networks,
    check_options,
    check_same_calls,
    inputs_of,
    kept_of,
    rescalings_of,
)
from .fit import FitOptions, fit_target, skipped_report
from .joint import refit_jointly
from .ledger import Ledger
from .lockstep import Lockstep
from .memory import plan_memory
from .outputs import DeviationMeter, forward, output_tensors
from .report import CompensationReport, Deviation, LayerReport
from .survey import survey_calls
from .targets import DEAD_SCALE, Pair, Skipped, Target, find_targets
from .variants import Variants

__all__ = ["compensate"]

_log = logging.getLogger(__name__)
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ..analysis.scales import Rescaling
_SURVEYED = 2  # samples that tell how the calls are made
_ROUND_OFF = {torch.float64: 1e-12, torch.float32: 1e-5}


def compensate(
    pruned: nn.Module,
    original: nn.Module,
    batches: Any,
    *,
    method: str = "least_squares",
    ridge: float = 1e-4,
    one_sided_steps: int = 3,
    refit_producers: bool = True,
    joint_rounds: int = 1,
    refit_classifier: bool | None = None,
    held_back: float = 0.1,
    memory_limit: int | None = None,
    logits: bool = True,
    progress: bool = True,
    plan: HasKept | None = None,
) -> CompensationReport:
    """Changes the weights that are left so that the pruned network computes what it did before.

    Both networks walk through the calibration data side by side. At every convolution and linear
    layer the pruned network's weights are replaced by those that reproduce, in the least-squares
    sense, the original's values from the pruned network's inputs, with all earlier layers already
    compensated; the value matched is the one after batch norm and after the residual sum. Needs no
    labels and no gradients, and a few hundred inputs.

    ``W <- (C + l W0) (G + l I)^-1`` with ``G = E[x x^T]``, ``C = E[t x^T]`` over the unfolded
    inputs ``x`` (He, Zhang, Sun: Channel pruning for accelerating very deep neural networks, ICCV
    2017, extended by a ridge towards the weights ``W0`` before the fit). Where a ReLU follows,
    values below zero need only stay below zero; a few majorise-minimise steps make use of it.
    With channels gone, the values that the ones left had are not the best ones any more: a layer
    in front of a ReLU is refitted for the value behind the next layer as well, by one Gauss-Newton
    step after the other on the same data.

    The outputs on held-back samples judge the result: if it is not better than the plain pruned
    network and than re-estimated batch-norm statistics alone, the best of the three is kept, and
    the report says so. Whatever goes wrong, ``pruned`` is left as it was.

    Args:
        pruned: Network after pruning; changed in place.
        original: Network before pruning; not changed.
        batches: Calibration data: one tensor, or a finite iterable of inputs (tensors, tuples of
            positional inputs, dicts of keyword inputs) or of pairs (input, label), whose label is
            ignored. All of it is kept in memory. Two tensors are two inputs where the plan was made
            with two.
        method: ``"least_squares"``, or ``"batch_norm"`` to re-estimate running statistics only.
        ridge: Strength of the ridge, relative to the mean energy of the layer's inputs, or to four
            times their mean variance if that is less and the layer holds a constant. Raised for a
            layer, in steps of ten, where its held-back error gains by it.
        one_sided_steps: Majorise-minimise steps where a ReLU or ReLU6 follows.
        joint_rounds: How often a layer in front of a ReLU or ReLU6 is refitted for what the next
            layer makes of its output, and that layer after it. 0: each layer only for its own
            target; faster, and less accurate.
        refit_producers: Also refit layers whose own inputs were not pruned, but drifted.
        refit_classifier: Also refit layers that make the network's output. None: only where their
            inputs were pruned.
        held_back: Share of the samples to judge by, in [0, 1). 0: nothing is judged, and what
            ``method`` gives is kept.
        memory_limit: Bytes of working memory besides networks, data and one layer's moments. Less
            memory takes more time. None: half of what is free.
        logits: Take an output that is one matrix of several columns for logits, and judge by KL
            divergence. False: judge by relative L2, as it should be for a regression.
        progress: Show a progress bar on a terminal.
        plan: The plan ``pruned`` was made by, or anything with its ``kept``. None: the plan that
            ``pruned`` carries.

    Returns:
        What was done, layer by layer, and the output deviations of all variants.

    Raises:
        InvalidArgumentError: an argument is out of range, the data can't be used, or weights or
            data are not finite.
        PlanMismatchError: ``pruned`` was not made from ``original`` by the plan.
        AnalysisError: the forward of ``original`` raised.
    """
    start = time.perf_counter()
    check_options(method, ridge, one_sided_steps, joint_rounds, held_back, memory_limit)
    kept, rescalings = kept_of(pruned, plan), rescalings_of(pruned, plan)
    device = check_networks(pruned, original, kept)
    ledger = Ledger()
    inputs = inputs_of(pruned, plan)
    items = read_batches(batches, original, device=device, inputs=inputs)
    session = _Session(
        pruned, original, items, kept, rescalings, held_back, memory_limit, logits, device
    )
    try:
        with (
            freed_memory_kept(),
            torch.inference_mode(False),
            torch.autocast(device.type, enabled=False),
            steady_calls(original),
            steady_calls(pruned),
            torch.no_grad(),
        ):
            session.prepare()
            layers: list[LayerReport] = []
            variants = Variants(session.pruned, session.data, session.deviation, ledger)
            variants.try_batch_norm(required=method == "batch_norm")
            if method == "least_squares":
                options = FitOptions(
                    ridge,
                    one_sided_steps,
                    session.memory.piece,
                    session.round_off,
                    joint_rounds if refit_producers else 0,
                )
                chosen, layers = session.choose(refit_producers, refit_classifier)
                layers = session.fit(chosen, options, ledger, progress) + layers
                variants.measure("least_squares")
            result, reason = variants.settle(method, judged=bool(session.data.held_back))
            if result == "least_squares" and session.data.held_back:
                layers = session.refit_outputs(chosen, layers, options, ledger)
    except BaseException:
        ledger.restore()
        raise
    report = CompensationReport(
        method=method,
        kept=result,
        reason=reason,
        images=session.data.fit_samples,
        held_back_images=session.data.held_back_samples,
        deviations=variants.deviations,
        layers=tuple(layers),
        seconds=time.perf_counter() - start,
    )
    _log.info("%s", report)
    return report


class _Session:
    """The networks, the data, and what is known of the calls."""

    def __init__(
        self,
        pruned: nn.Module,
        original: nn.Module,
        items: list[Any],
        kept: Mapping[str, Mapping[int, Tensor]],
        rescalings: Sequence[Rescaling],
        held_back: float,
        memory_limit: int | None,
        logits: bool,
        device: torch.device,
    ) -> None:
        self.pruned = pruned
        self.original = original
        self._items = items
        self._kept = kept
        self._rescalings = rescalings
        self._held_back = held_back
        self._limit = memory_limit
        self._logits = logits
        self._device = device

    def prepare(self) -> None:
        """Traces both networks on a few samples, finds the targets and cuts the data."""
        few = first_samples(self._items[0], _SURVEYED, self.original)
        trace = record_calls(self.original, few)
        surveys = survey_calls(self.original, few), survey_calls(self.pruned, few)
        check_same_calls(trace, surveys)
        self._names = [call.name for call in surveys[0].calls]
        self.targets, self.skipped = find_targets(trace, surveys[1], self._kept, self._rescalings)
        samples = sum(sample_count(item) for item in self._items)
        self.memory = plan_memory(
            surveys, sample_count(few), samples, self.targets, self._limit, self._device
        )
        self.data: Calibration = split_batches(
            self._items,
            self.original,
            held_back=self._held_back,
            batch_size=self.memory.batch_size,
        )
        self._items = []
        dtype = next((t.dtype for t in output_tensors(surveys[1].output)), torch.float32)
        self.round_off = _ROUND_OFF.get(dtype, 1e-3)
        self._reference = [
            output_tensors(forward(self.original, batch)) for batch in self._judges()
        ]

    def _judges(self) -> tuple[Any, ...]:
        return self.data.held_back or self.data.fit

    def deviation(self) -> Deviation:
        """How far the pruned network's outputs are off as it is now."""
        meter = DeviationMeter(logits=self._logits)
        for reference, batch in zip(self._reference, self._judges(), strict=True):
            meter.add(reference, output_tensors(forward(self.pruned, batch)))
        return meter.deviation()

    def choose(
        self, refit_producers: bool, refit_classifier: bool | None
    ) -> tuple[list[Target], list[LayerReport]]:
        """The targets with the layers that are to be fitted, and reports of the others."""
        chosen: list[Target] = []
        left: list[LayerReport] = []
        for target in self.targets:
            layers = []
            for layer in target.layers:
                wanted = layer.inputs_pruned or refit_producers
                if target.is_output:
                    wanted = layer.inputs_pruned if refit_classifier is None else refit_classifier
                if wanted:
                    layers.append(layer)
                else:
                    left.append(skipped_report(layer, target, "not asked for"))
            if layers:
                chosen.append(
                    Target(target.call, target.module, layers, target.bounds, target.is_output)
                )
        left += [_unfitted(layer) for layer in self.skipped]
        return chosen, left

    def fit(
        self, targets: Sequence[Target], options: FitOptions, ledger: Ledger, progress: bool
    ) -> list[LayerReport]:
        """Fits all targets in order."""
        reports: list[LayerReport] = []
        runs = Lockstep(
            self.original,
            self.pruned,
            self.data.fit,
            self.data.held_back,
            self._names,
            targets,
            self.memory,
            self._device,
        )
        pairs = _pairs(targets) if options.joint_rounds else {}
        first = {pair.between.call for pair in pairs.values()}
        with runs:
            for target in _with_progress(targets, progress):
                found = fit_target(target, runs, options, ledger)
                pair = pairs.get(target.call)
                for _ in range(options.joint_rounds if pair is not None else 0):
                    assert pair is not None
                    if not refit_jointly(pair, runs, options, ledger):
                        break
                    again = fit_target(target, runs, options, ledger)
                    found = [_continued(a, b) for a, b in zip(found, again, strict=True)]
                runs.leave(target, keep=target.call in first, pair=pair)
                reports += found
                for report in found:
                    _log.debug("%s", report)
        return reports

    def refit_outputs(
        self,
        targets: Sequence[Target],
        layers: Sequence[LayerReport],
        options: FitOptions,
        ledger: Ledger,
    ) -> list[LayerReport]:
        """Fits layers that make the output once more, on the samples that have judged as well.

        A classifier has about as many columns as there are samples, and none to spare. It keeps the
        ridge that the held-back samples chose; nothing comes behind it that they still judge.
        """
        fitted = {layer.entry: layer for layer in layers if layer.skipped is None}
        for target in targets:
            entries = [layer.entry for layer in target.layers]
            if not target.is_output or any(entry not in fitted for entry in entries):
                continue
            runs = Lockstep(
                self.original,
                self.pruned,
                (*self.data.fit, *self.data.held_back),
                (),
                self._names,
                [target],
                self.memory,
                self._device,
            )
            ridge = max(fitted[entry].ridge or 0.0 for entry in entries)
            with runs:
                again = fit_target(target, runs, replace(options, ridge=ridge), ledger)
            for report in again:
                if report.skipped is None:
                    before = fitted[report.entry]
                    seconds = before.seconds + report.seconds
                    fitted[report.entry] = replace(before, samples=report.samples, seconds=seconds)
        return [fitted.get(layer.entry, layer) for layer in layers]


def _pairs(targets: Sequence[Target]) -> dict[int, Pair]:
    """Target call -> the layer that ends there and the one in front of it, each alone."""
    known = {target.call: target for target in targets if len(target.layers) == 1}
    pairs = {}
    for target in known.values():
        source = target.layers[0].reads
        between = None if source is None else known.get(source)
        if between is None or between.bounds is None:
            continue
        first = between.layers[0]
        if not bool((first.scale.abs() < DEAD_SCALE).any()):
            pairs[target.call] = Pair(first, between, target.layers[0], target)
    return pairs


def _continued(before: LayerReport, after: LayerReport) -> LayerReport:
    """One report of a layer that was fitted twice."""
    if after.skipped is not None:
        return before
    return replace(after, error_before=before.error_before, seconds=before.seconds + after.seconds)


def _unfitted(layer: Skipped) -> LayerReport:
    return LayerReport(
        module=layer.module,
        entry=layer.entry,
        kind=layer.kind,
        target="",
        rows=0,
        columns=0,
        skipped=layer.reason,
    )


def _with_progress(targets: Sequence[Target], progress: bool) -> Iterable[Target]:
    if not progress or not sys.stderr.isatty():
        return targets
    return _progress_bar(targets)


def _progress_bar(targets: Sequence[Target]) -> Iterator[Target]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("compensating", total=len(targets))
        for target in targets:
            bar.update(task, description=f"compensating {target.module or 'root'}")
            yield target
            bar.advance(task)

"""Ways of pruning one trained classifier without any label, measured side by side.

Every trial is repeated with several draws of the calibration images; nothing is chosen by the test
images. A trial's network is compared with the original on the same images, which is much tighter
than the two accuracies: the share of images on which both agree.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chanprune_ext.atomic_files import write_text
from chanprune_ext.compensation import compensate
from chanprune_ext.data import make_loader
from chanprune_ext.module_modes import evaluating
from chanprune_ext.pruning import plan
from chanprune_ext.quantities import accuracy_error
from chanprune_ext.report import environment

from .job_folder import read_json, require_same

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from chanprune_ext.data import ImageDataset

__all__ = ["Draw", "Further", "Trial", "TrialResult", "load_trials", "run_trials", "save_trials"]

Calibration = list[Tensor]


@dataclass(frozen=True)
class Further:
    """What else is done to a trial's network, measured as a row of its own.

    Attributes:
        name: What tables call it, after the trial's name.
        step: Changes the network: ``step(pruned, original, batches)``.
        published: What is known from elsewhere, in words.
    """

    name: str
    step: Callable[[nn.Module, nn.Module, Calibration], object]
    published: str = ""


@dataclass(frozen=True)
class Trial:
    """One way of pruning.

    Attributes:
        name: What tables call it.
        plan_options: Options of :func:`chanprune_ext.plan`, made from the calibration batches.
        after: Changes the pruned network: ``after(pruned, original, batches)``. Default:
            :func:`chanprune_ext.compensate`.
        published: What is known from elsewhere, in words.
        further: Steps that go on from there, one after the other.
    """

    name: str
    plan_options: Callable[[Calibration], Mapping[str, Any]]
    after: Callable[[nn.Module, nn.Module, Calibration], object] | None = compensate
    published: str = ""
    further: tuple[Further, ...] = ()


@dataclass(frozen=True)
class Draw:
    """What a trial gave with one draw of the calibration images.

    Attributes:
        seed: Seed of the draw.
        top1: Accuracy on the test images, a fraction.
        agreement: Share of test images on which pruned and original network agree.
        kl: Mean ``KL(original || pruned)`` of the softmax outputs on the test images, in nats.
        difference_error: Standard error of the accuracy's difference from the original's, paired.
        seconds: CPU time for choosing channels and refitting, further steps up to this one
            included.
    """

    seed: int
    top1: float
    agreement: float
    kl: float
    difference_error: float
    seconds: float


@dataclass(frozen=True)
class TrialResult:
    """A trial over all draws.

    Attributes:
        name: What tables call it.
        published: What is known from elsewhere, in words.
        params: Parameters left.
        macs: Multiply-accumulates left.
        params_share: Of the original's.
        macs_share: Of the original's.
        draws: One a seed.
    """

    name: str
    published: str
    params: int
    macs: int
    params_share: float
    macs_share: float
    draws: tuple[Draw, ...] = field(default_factory=tuple)

    @property
    def top1(self) -> float:
        """Mean accuracy over the draws."""
        return statistics.fmean(draw.top1 for draw in self.draws)

    @property
    def spread(self) -> float:
        """Standard deviation of the accuracy over the draws; 0 for one."""
        return statistics.stdev(d.top1 for d in self.draws) if len(self.draws) > 1 else 0.0

    @property
    def agreement(self) -> float:
        """Mean agreement over the draws."""
        return statistics.fmean(draw.agreement for draw in self.draws)


def run_trials(
    model: nn.Module,
    test: ImageDataset,
    trials: Sequence[Trial],
    calibration: Callable[[int], Calibration],
    *,
    seeds: Sequence[int],
    say: Callable[[str], None],
    keep: Callable[[float, Sequence[TrialResult]], None] = lambda *_: None,
    earlier: Sequence[TrialResult] = (),
) -> tuple[float, list[TrialResult]]:
    """Runs every trial with every draw of calibration images.

    Args:
        model: The trained classifier; left as it is.
        test: Labelled images to report on.
        trials: What to try.
        calibration: Seed -> unlabelled batches, none of them from ``test``.
        seeds: Seeds of the draws.
        say: Receives one line as each trial begins.
        keep: Receives the original's accuracy and all results so far after every trial, so that
            hours of work need not be lost with the last one.
        earlier: What :func:`load_trials` read of a run that was stopped. Trials that have all their
            draws there are not run again.

    Returns:
        The original's accuracy, and one result a trial.
    """
    expected, labels = _predictions(model, test)
    right = expected.argmax(1) == labels
    baseline = float(right.float().mean())
    results: list[TrialResult] = []
    known = {r.name: r for r in earlier if [draw.seed for draw in r.draws] == list(seeds)}
    for trial in trials:
        rows = {name: known[name] for name in _row_names(trial) if name in known}
        if len(rows) == len(_row_names(trial)):
            say(f"{trial.name}: measured before")
            results += rows.values()
            continue
        rows.clear()
        for seed in seeds:
            for row, pruned, seconds in _rows(trial, model, test, calibration(seed)):
                say(f"{row.name}, seed {seed}, {seconds:.0f} s")
                draw = _draw(seed, *_predictions(pruned, test), expected, right, seconds)
                say(f"  top-1 {draw.top1:.2%}, agreement {draw.agreement:.2%}")
                before = rows[row.name].draws if row.name in rows else ()
                rows[row.name] = replace(row, draws=(*before, draw))
        results += rows.values()
        keep(baseline, results)
    return baseline, results


def _rows(
    trial: Trial, model: nn.Module, test: ImageDataset, batches: Calibration
) -> Iterator[tuple[TrialResult, nn.Module, float]]:
    """The trial's rows without draws, each with the network as it then is and CPU seconds."""
    start = time.process_time()
    made = plan(model, torch.zeros(1, *test.shape, device="cpu"), **trial.plan_options(batches))
    pruned = made.apply(model)
    if trial.after is not None:
        trial.after(pruned, model, batches)
    seconds = time.process_time() - start
    row = TrialResult(
        trial.name,
        trial.published,
        made.params_after,
        made.macs_after,
        made.params_after / made.params_before,
        made.macs_after / made.macs_before,
    )
    yield row, pruned, seconds
    for further, name in zip(trial.further, _row_names(trial)[1:], strict=True):
        start = time.process_time()
        further.step(pruned, model, batches)
        seconds += time.process_time() - start
        yield replace(row, name=name, published=further.published), pruned, seconds


def _row_names(trial: Trial) -> list[str]:
    """The trial's name, and those of its further steps."""
    return [trial.name, *(f"{trial.name}, {further.name}" for further in trial.further)]


def _draw(
    seed: int, logits: Tensor, labels: Tensor, expected: Tensor, right: Tensor, seconds: float
) -> Draw:
    mine = logits.argmax(1) == labels
    difference = mine.double() - right.double()
    log_before = F.log_softmax(expected.double(), 1)
    log_after = F.log_softmax(logits.double(), 1)
    return Draw(
        seed=seed,
        top1=float(mine.float().mean()),
        agreement=float((logits.argmax(1) == expected.argmax(1)).float().mean()),
        kl=float((log_before.exp() * (log_before - log_after)).sum(1).mean()),
        difference_error=float(difference.std()) / math.sqrt(len(difference)),
        seconds=round(seconds, 1),
    )


@torch.no_grad()
def _predictions(model: nn.Module, data: ImageDataset) -> tuple[Tensor, Tensor]:
    with evaluating(model):
        found = [(model(x), y) for x, y in make_loader(data, 64)]
    return torch.cat([logits for logits, _ in found]), torch.cat([labels for _, labels in found])


def save_trials(
    path: Path,
    title: str,
    command: str,
    baseline: float,
    n: int,
    results: Sequence[TrialResult],
    inputs: Mapping[str, Any] | None = None,
) -> None:
    """Writes all figures as JSON, whole or not at all.

    Args:
        path: The file.
        title: What was pruned.
        command: What measured it.
        baseline: Accuracy of the original, a fraction.
        n: Number of test images.
        results: One a trial.
        inputs: What the figures depend on besides, for :func:`load_trials` to compare.

    Raises:
        OutputError: The file cannot be written.
    """
    document = {
        "title": title,
        "command": command,
        "versions": dict(environment()),
        "inputs": dict(inputs or {}),
        "test_images": n,
        "baseline": baseline,
        "baseline_error": accuracy_error(baseline, n),
        "trials": [
            {**asdict(r), "top1": r.top1, "spread": r.spread, "agreement": r.agreement}
            for r in results
        ],
    }
    write_text(path, json.dumps(document, indent=1))


def load_trials(path: Path, inputs: Mapping[str, Any]) -> list[TrialResult]:
    """Reads results that :func:`save_trials` wrote; none where there is no file.

    Raises:
        CheckpointError: The file is damaged.
        InvalidArgumentError: The results depend on other inputs.
    """
    found = read_json(path, lambda d: (dict(d["inputs"]), [_result_from(r) for r in d["trials"]]))
    if found is None:
        return []
    earlier, results = found
    require_same(path, earlier, inputs)
    return results


def _result_from(values: Mapping[str, Any]) -> TrialResult:
    own = {item.name: values[item.name] for item in fields(TrialResult)}
    return TrialResult(**{**own, "draws": tuple(Draw(**draw) for draw in own["draws"])})

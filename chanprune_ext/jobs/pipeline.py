"""One whole job: prune a trained classifier, compensate, recover, measure every stage, report.

The demo and the published results are this function with other inputs.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from chanprune_ext.checkpoint import load, save
from chanprune_ext.checksum import checksum
from chanprune_ext.compensation import compensate
from chanprune_ext.latency import measure_latency
from chanprune_ext.plan import PruningPlan
from chanprune_ext.pruning import plan
from chanprune_ext.recovery import evaluate, recover
from chanprune_ext.report import (
    LayerWidth,
    Reference,
    RunReport,
    Stage,
    StageLatency,
    TrainingEpoch,
    environment,
    load_report,
    write_report,
)

from .job_folder import JobFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from chanprune_ext.data import ImageDataset
    from chanprune_ext.latency import Latency
    from chanprune_ext.recovery import RecoveryResult

__all__ = ["Job", "layer_widths", "run_job", "stage_latency", "training_epochs"]

_COMPENSATED = "compensated"  # the step of a job whose result is not trained any more
_WITHOUT_EFFECT = ("progress", "compile", "workers")  # options of training, on what it ends with


@dataclass(frozen=True)
class Job:
    """What to prune, on what data, and how.

    Attributes:
        title: Heading of the report.
        model: The trained classifier; it is not changed.
        built_from: How the command line names its architecture, with ``model`` and ``arguments``,
            for files that say what they were made from.
        train: Images to recover on.
        test: Images every accuracy is measured on; nothing is chosen by them.
        calibration: Unlabelled batches for compensation, none of them from ``test``.
        plan_options: Options of :func:`chanprune_ext.plan`.
        recover_options: Options of :func:`chanprune_ext.recover`.
        fine_tune_options: Options of :func:`chanprune_ext.recover` for the compensated model
            without a teacher, measured beside distillation. None: this stage is left out.
        stage_notes: One line for the report on each stage: the original, the pruned, the
            compensated, the fine-tuned (where there is one) and the distilled model.
        notes: What the reader of the report must know.
        references: Published results that the report is drawn beside.
        latency_batch: Images per batch while latency is measured.
        latency_rounds: Interleaved rounds of that measurement.
    """

    title: str
    model: nn.Module
    built_from: Mapping[str, Any]
    train: ImageDataset
    test: ImageDataset
    calibration: Sequence[Tensor]
    plan_options: Mapping[str, Any]
    recover_options: Mapping[str, Any]
    fine_tune_options: Mapping[str, Any] | None = None
    stage_notes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    references: tuple[Reference, ...] = ()
    latency_batch: int = 64
    latency_rounds: int = 30


def run_job(
    job: Job,
    out: Path,
    *,
    command: str,
    say: Callable[[str], None],
    resume: bool | None = None,
) -> RunReport:
    """Runs a job and writes models, plan, ``report.json`` and ``report.html`` into ``out``.

    Args:
        job: The work.
        out: Folder for the results, made where missing.
        command: The command line to put into the report.
        say: Receives one line as each step begins.
        resume: Go on with the job that was begun in ``out``, or begin where there is none; False
            begins anew, in a folder without an unfinished job. Both keep checkpoints of the
            training there until all is done. Default: None, keep none, for what takes minutes.

    Returns:
        The report, with its stages: original, pruned by the criterion alone, compensated,
        fine-tuned if asked for, and distilled.

    Raises:
        ChanpruneError: A step failed, a result cannot be written, or the folder holds another job.
        RecoveryInterrupted: Ctrl-C during training; ``resume`` goes on.
    """
    # A place that cannot be written shows now and not after the training.
    folder = JobFolder(out, _inputs(job) if resume is not None else {}, resume)
    if folder.finished:
        say("finished earlier")
        return load_report(out / "report.json")
    models: dict[str, nn.Module] = {}
    file_bytes: dict[str, int] = {}
    runs: dict[str, RecoveryResult] = {}

    def keep(name: str, model: nn.Module, *, again: bool = False) -> None:
        """Writes a model as soon as it is there: what comes after it can take hours, and fail.

        Not ``again`` what an earlier start has written.
        """
        path = out / f"{name.replace(' ', '-').lower()}.safetensors"
        if not (again and path.exists()):
            save(model, path, built_from=job.built_from)
        models[name], file_bytes[name] = model, path.stat().st_size

    again = _COMPENSATED in folder.done
    made, compensated, compensation_note = _compensated(job, folder, say)
    keep("original", job.model, again=again)
    keep(f"plain {made.criterion.upper()}", made.apply(job.model), again=again)
    keep("compensated", compensated, again=again)
    if not again:
        folder.did(_COMPENSATED, compensation_note)

    if job.fine_tune_options is not None:
        say("recovering: fine-tuning on the labels, without a teacher")
        student = copy.deepcopy(compensated)
        runs["fine-tuned"] = recover(
            student,
            train=job.train,
            val=job.test,
            **folder.recovery_options("fine-tuned"),
            **job.fine_tune_options,
        )
        keep("fine-tuned", student)
    say("recovering: distillation from the original")
    recovered = copy.deepcopy(compensated)
    recovery = runs["distilled"] = recover(
        recovered,
        teacher=job.model,
        train=job.train,
        val=job.test,
        **folder.recovery_options("distilled"),
        **job.recover_options,
    )
    keep("distilled", recovered)

    say("measuring accuracy and latency")
    images = torch.stack([job.test[index][0] for index in range(job.latency_batch)])
    latencies = measure_latency(models, images, rounds=job.latency_rounds)
    stages = []
    stage_notes = job.stage_notes or ("",) * len(models)
    for (name, model), note in zip(models.items(), stage_notes, strict=True):
        found = evaluate(model, job.test)
        unpruned = model is job.model
        stages.append(
            Stage(
                name=name,
                accuracy=found.top1,
                standard_error=found.standard_error,
                samples=found.n,
                params=made.params_before if unpruned else made.params_after,
                macs=made.macs_before if unpruned else made.macs_after,
                latency=stage_latency(latencies[name], latencies["original"]),
                file_bytes=file_bytes[name],
                note=note,
            )
        )
    report = RunReport(
        title=job.title,
        command=command,
        created=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        stages=tuple(stages),
        versions=environment(),
        conditions=latencies["original"].conditions(),
        widths=layer_widths(job.model, recovered),
        history=training_epochs(recovery),
        notes=(
            *job.notes,
            compensation_note,
            (
                f"Recovery took {recovery.seconds:.0f} s of training; the weights measured are "
                "those of the last epoch."
            ),
            *(best_epoch_note(name, result) for name, result in runs.items()),
        ),
        references=job.references,
    )
    write_report(report, out)
    folder.finish()
    return report


def _inputs(job: Job) -> dict[str, Any]:
    """What the results of a job depend on, for one that goes on to be known as the same."""
    return {
        "title": job.title,
        "checksum of the weights": checksum(*job.model.state_dict().values()),
        "checksum of the calibration images": checksum(*job.calibration),
        "number of test images": len(job.test),
        "training": {
            step: {k: str(v) for k, v in (options or {}).items() if k not in _WITHOUT_EFFECT}
            for step, options in (
                ("fine-tuned", job.fine_tune_options),
                ("distilled", job.recover_options),
            )
        },
    }


def _compensated(
    job: Job, folder: JobFolder, say: Callable[[str], None]
) -> tuple[PruningPlan, nn.Module, str]:
    """The plan, the compensated model, and a note on it: made, or as an earlier start left them."""
    if _COMPENSATED in folder.done:
        say("going on from the compensated model of before")
        made = PruningPlan.load(folder.path / "plan.json")
        found = load(folder.path / "compensated.safetensors", job.model)
        return made, found, folder.done[_COMPENSATED]
    say("analysing the model and choosing channels")
    made = plan(job.model, torch.zeros(1, *job.test.shape, device="cpu"), **job.plan_options)
    made.save(folder.path / "plan.json")
    say("compensating: no labels, no gradients")
    compensated = made.apply(job.model)
    result = compensate(compensated, job.model, job.calibration)
    note = f"Compensation took {result.seconds:.1f} s and kept {result.kept}: {result.reason}."
    return made, compensated, note


def layer_widths(original: nn.Module, pruned: nn.Module) -> tuple[LayerWidth, ...]:
    """Output channels of every convolution and linear layer in both models, in module order."""
    after = dict(pruned.named_modules())
    widths = []
    for name, layer in original.named_modules():
        for attribute in ("out_channels", "out_features"):
            before = getattr(layer, attribute, None)
            kept = getattr(after.get(name), attribute, None)
            if isinstance(before, int) and isinstance(kept, int):
                widths.append(LayerWidth(name, before, kept))
    return tuple(widths)


def best_epoch_note(name: str, recovery: RecoveryResult) -> str:
    """What a run would be said to give if its best epoch on the test images were chosen."""
    measured = {r.epoch: r.val.top1 for r in recovery.history if r.val is not None}
    last, best = max(measured), max(measured, key=lambda epoch: measured[epoch])
    return (
        f"{name.capitalize()}: {measured[last]:.2%} after the last of {last} epochs (the figure "
        "above). Chosen by the test images themselves, as published figures often are: "
        f"{measured[best]:.2%}, epoch {best}."
    )


def stage_latency(own: Latency, base: Latency) -> StageLatency:
    """A measurement as the report keeps it, with the speed-up over another of the same call."""
    return StageLatency(own.median_ms, *own.quartiles_ms, speedup=own.speedup_over(base))


def training_epochs(recovery: RecoveryResult) -> tuple[TrainingEpoch, ...]:
    """The history of a recovery run as the report keeps it."""
    return tuple(
        TrainingEpoch(
            epoch=record.epoch,
            loss=record.loss,
            val_accuracy=None if record.val is None else record.val.top1,
            learning_rate=record.lr,
        )
        for record in recovery.history
    )

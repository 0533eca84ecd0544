"""The report of one recovery run: the network before pruning, before training, and after it."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.latency import measure_latency
from chanprune_ext.module_modes import evaluating
from chanprune_ext.recovery import evaluate
from chanprune_ext.recovery.evaluation import device_of, validation_loader
from chanprune_ext.report import RunReport, Stage, StageLatency, environment

from .pipeline import layer_widths, stage_latency, training_epochs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from chanprune_ext.data import ImageDataset
    from chanprune_ext.recovery import RecoveryResult
    from chanprune_ext.recovery.evaluation import Evaluation

__all__ = ["recovery_report"]

_TIMED_IMAGES = 16
_ROUNDS = 15


def recovery_report(
    student: nn.Module,
    original: nn.Module | None,
    test: ImageDataset,
    result: RecoveryResult,
    *,
    title: str,
    command: str,
    file_bytes: int | None = None,
) -> RunReport:
    """What a recovery run gave, with its latency measured.

    Args:
        student: The network after training.
        original: The network before pruning, which the student was distilled from; on the same
            device. Without it the report begins with the pruned network.
        test: Images that the accuracies of ``result`` were measured on.
        result: Of :func:`chanprune_ext.recover`, with validation.
        title: Heading of the page.
        command: The command line that made it.
        file_bytes: Size of the saved student.

    Raises:
        InvalidArgumentError: There was no validation, or the two networks are on two devices.
    """
    kept = result.before if result.kept_epoch == 0 else result.history[result.kept_epoch - 1].val
    if result.before is None or kept is None:
        raise InvalidArgumentError("report: expected a run with validation data; pass val=...")
    images = _images(test).to(device_of(student))
    models = {"recovered": student}
    if original is not None:
        models = {"original": original, **models}
        if device_of(original) != device_of(student):
            raise InvalidArgumentError(
                f"original: expected it on {device_of(student)}, where the student is, got "
                f"{device_of(original)}"
            )
    times = measure_latency(models, images, rounds=_ROUNDS)
    base = times[next(iter(models))]
    stages = []
    if original is not None:
        found = evaluate(original, test)
        latency = stage_latency(base, base)
        stages.append(_stage("original", original, found, images, latency, None, "before pruning"))
    latency = stage_latency(times["recovered"], base)
    stages.append(
        _stage("pruned", student, result.before, images, latency, file_bytes, "before training")
    )
    losses = ", ".join(sorted(result.recipe.losses or {}))
    note = f"{result.kept_epoch} epochs" + (f" of {losses}" if losses else "")
    stages.append(_stage("recovered", student, kept, images, latency, file_bytes, note))
    return RunReport(
        title=title,
        command=command,
        created=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        stages=tuple(stages),
        versions=environment(),
        conditions=base.conditions(),
        widths=() if original is None else layer_widths(original, student),
        history=training_epochs(result),
        notes=(
            (
                f"Training took {result.seconds:.0f} s, of which {_waited(result):.0%} went into "
                "waiting for data."
            ),
            "The pruned and the recovered network are the same in size and time.",
        ),
    )


def _images(test: ImageDataset) -> Tensor:
    batch = next(iter(validation_loader(test, _TIMED_IMAGES, 0)))
    images: Tensor = batch[0]
    return images


def _waited(result: RecoveryResult) -> float:
    """Share of the training time in which the device waited for data."""
    waited = sum(record.data_wait * record.seconds for record in result.history)
    return waited / result.seconds if result.seconds else 0.0


def _stage(
    name: str,
    model: nn.Module,
    found: Evaluation,
    images: Tensor,
    latency: StageLatency,
    file_bytes: int | None,
    note: str,
) -> Stage:
    return Stage(
        name=name,
        accuracy=found.top1,
        standard_error=found.standard_error,
        samples=found.n,
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs=_macs(model, images[:1]),
        latency=latency,
        file_bytes=file_bytes,
        note=note,
    )


def _macs(model: nn.Module, image: Tensor) -> int:
    """Multiply-accumulates of one image."""
    with FlopCounterMode(display=False) as counter, evaluating(model), torch.no_grad():
        model(image)
    return counter.get_total_flops() // 2

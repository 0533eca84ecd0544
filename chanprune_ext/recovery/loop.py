"""The training loop: updates, schedule, validation after every epoch."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import DataError, TrainingError
from .ema import WeightAverage
from .evaluation import Evaluation, evaluate
from .losses import recovery_loss
from .optimizers import make_optimizer
from .outputs import check_labels, logits, moved, split_batch
from .progress import RecoveryProgress
from .result import EpochRecord, RecoveryResult
from .schedule import learning_rate
from .weights import copied, named_tensors, overwrite

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .recipe import Recipe

__all__ = ["TrainingLoop"]

ACCELERATE_MARKS = ("_is_accelerate_prepared", "_original_forward", "forward")
LOSS_CHECK_INTERVAL = 50  # updates between looks at the loss where looking stalls the device


class TrainingLoop:
    """One run of :func:`chanprune_ext.recovery.recover`, whose arguments these are.

    Updates go through accelerate, which also knows how to run them on several devices.

    Args:
        student (nn.Module): trained in place, already on ``device``.
        teacher (nn.Module, optional): in evaluation mode, already on ``device``.
        loader (Iterable): sized, of batches ``(images, labels [N])``.
        val (Dataset or Iterable, optional): validation data.
        recipe (Recipe): settings.
        device (torch.device): where the batches go.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        loader: Iterable[Any],
        val: Any,
        recipe: Recipe,
        device: torch.device,
    ) -> None:
        from accelerate import Accelerator

        self.student = student
        self.teacher = teacher
        self.val = val
        self.recipe = recipe
        self.device = device
        self.source = loader
        self.marks = {m: student.__dict__[m] for m in ACCELERATE_MARKS if m in student.__dict__}
        self.accelerator = Accelerator(device_placement=False)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            student, make_optimizer(student, recipe), loader
        )
        steps = len(self.loader)
        self.updates = steps * recipe.epochs
        self.warmup = min(round(steps * recipe.warmup), self.updates - 1)
        self.update = 0
        self.average = (
            None if recipe.ema_decay is None else WeightAverage(student, recipe.ema_decay)
        )
        self.best: tuple[float, int, dict[str, Tensor]] | None = None

    def run(self, progress: bool) -> RecoveryResult:
        """Trains to the end and leaves the weights asked for in the student."""
        recipe = self.recipe
        history: list[EpochRecord] = []
        try:
            before = self._validate(0)
            with RecoveryProgress(recipe.epochs, self.updates, progress) as bar:
                for epoch in range(1, recipe.epochs + 1):
                    record = self._epoch(epoch, bar)
                    bar.validated(record.val)
                    history.append(record)
        finally:
            # accelerate marks what it has prepared, and wraps its forward where the user has asked
            # accelerate for mixed precision; the student is handed back without either
            for mark in ACCELERATE_MARKS:
                self.student.__dict__.pop(mark, None)
            self.student.__dict__.update(self.marks)
        kept = recipe.epochs
        if self.best is not None:
            kept = self.best[1]
            overwrite(self.student, self.best[2])
        elif self.average is not None:
            self.average.copy_to(self.student)
        for name, tensor in named_tensors(self.student).items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise TrainingError(
                    f"{name} holds NaN or infinity after the last update; the student is as it "
                    f"was before. Lower lr ({recipe.lr})"
                )
        return RecoveryResult(tuple(history), before, kept, recipe)

    def _epoch(self, epoch: int, bar: RecoveryProgress) -> EpochRecord:
        started = time.perf_counter()
        for part in ("sampler", "dataset"):
            choose = getattr(getattr(self.source, part, None), "set_epoch", None)
            if choose is not None:
                choose(epoch)
        self.student.train()
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        images, rate = 0, 0.0
        for batch in self.loader:
            rate = learning_rate(self.update, self.updates, self.warmup, self.recipe.lr)
            loss, size = self._step(batch, rate)
            total += loss.double() * size
            images += size
            self.update += 1
            watched = self.device.type == "cpu" or self.update % LOSS_CHECK_INTERVAL == 0
            bar.step(epoch, self._finite(total, epoch) / images if watched else None, rate)
        if images == 0:
            raise DataError(f"train: expected at least one batch, got none in epoch {epoch}")
        mean = self._finite(total, epoch) / images
        seconds = time.perf_counter() - started
        return EpochRecord(epoch, mean, rate, self._validate(epoch), seconds, images)

    def _step(self, batch: Any, rate: float) -> tuple[Tensor, int]:
        recipe = self.recipe
        inputs, labels = split_batch(batch)
        inputs = moved(inputs, self.device, channels_last=recipe.channels_last)
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"
        )
        with autocast:
            wanted = None
            if self.teacher is not None:
                with torch.no_grad():
                    wanted = _widened(logits(self.teacher, inputs))
            scores = _widened(logits(self.model, inputs))
        check_labels(labels, scores.shape[1])
        loss = recovery_loss(scores, labels.to(self.device, non_blocking=True), wanted, recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        if recipe.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), recipe.max_grad_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.student)
        return loss.detach(), len(labels)

    def _finite(self, total: Tensor, epoch: int) -> float:
        # A NaN or an infinity stays in the sum, so looking now and then misses none.
        value = total.item()
        if not math.isfinite(value):
            raise TrainingError(
                f"the training loss became {value} in epoch {epoch}, at or before update "
                f"{self.update} of {self.updates}; the student is as it was before. Lower lr "
                f"({self.recipe.lr}) or max_grad_norm ({self.recipe.max_grad_norm}), and check the "
                "images for NaN"
            )
        return value

    def _validate(self, epoch: int) -> Evaluation | None:
        if self.val is None:
            return None
        average = self.average
        with average.applied_to(self.student) if average is not None else nullcontext():
            found = evaluate(
                self.student, self.val, device=self.device, channels_last=self.recipe.channels_last
            )
            better = self.best is None or found.top1 > self.best[0]
            if self.recipe.keep == "best" and better:
                self.best = (found.top1, epoch, copied(self.student))
        return found


def _widened(scores: Tensor) -> Tensor:
    """Half precision as float32: the loss is small work, its rounding would not be."""
    return scores if scores.dtype in (torch.float32, torch.float64) else scores.float()

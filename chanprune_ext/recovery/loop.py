"""The training loop: updates, schedule, validation after every epoch."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..compensation.batch_norm import reestimate
from ..compensation.ledger import Ledger
from ..errors import DataError, TrainingError
from .ema import WeightAverage
from .evaluation import Evaluation, evaluate
from .objective import Objective
from .optimizers import make_optimizer
from .outputs import inputs_and_labels, moved
from .progress import RecoveryProgress
from .result import EpochRecord, RecoveryResult
from .schedule import learning_rate
from .weights import copied, named_tensors, overwrite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

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
        loader (Iterable): sized, of batches ``(images, labels [N])``, or of images alone.
        val (Dataset or Iterable, optional): validation data.
        recipe (Recipe): settings.
        device (torch.device): where the batches go.
        penalty (Callable, optional): called with the share of the run that is done, 0 to 1; what it
            returns is added to the loss. Default: None.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        loader: Iterable[Any],
        val: Any,
        recipe: Recipe,
        device: torch.device,
        penalty: Callable[[float], Tensor] | None = None,
    ) -> None:
        from accelerate import Accelerator

        self.student = student
        self.teacher = teacher
        self.val = val
        self.recipe = recipe
        self.device = device
        self.penalty = penalty
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
        self.hold = None
        self.average: WeightAverage | None = None
        if recipe.swa_start is not None:
            self.hold = min(max(round(self.updates * recipe.swa_start), 1), self.updates - 1)
        if recipe.ema_decay is not None or recipe.swa_start is not None:
            self.average = WeightAverage(student, recipe.ema_decay)
        self.objective = Objective(recipe, student, teacher)
        self.best: tuple[float, int, dict[str, Tensor]] | None = None

    def run(self, progress: bool) -> RecoveryResult:
        """Trains to the end and leaves the weights asked for in the student."""
        recipe = self.recipe
        history: list[EpochRecord] = []
        try:
            before = self._validate(0)
            bar = RecoveryProgress(recipe.epochs, self.updates, progress)
            with bar, self.objective:
                for epoch in range(1, recipe.epochs + 1):
                    record = self._epoch(epoch, bar)
                    bar.validated(record.val)
                    history.append(record)
                    if self._stuck(epoch):
                        break
        finally:
            # accelerate marks what it has prepared, and wraps its forward where the user has asked
            # accelerate for mixed precision; the student is handed back without either
            for mark in ACCELERATE_MARKS:
                self.student.__dict__.pop(mark, None)
            self.student.__dict__.update(self.marks)
        kept = len(history)
        if recipe.keep == "best" and self.best is not None:
            kept = self.best[1]
            overwrite(self.student, self.best[2])
        for name, tensor in named_tensors(self.student).items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise TrainingError(
                    f"{name} holds NaN or infinity after the last update; the student is as it "
                    f"was before. Lower lr ({recipe.peak_lr})"
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
            rate = learning_rate(
                self.update, self.updates, self.warmup, self.recipe.peak_lr, self.hold
            )
            loss, size = self._step(batch, rate)
            total += loss.double() * size
            images += size
            self.update += 1
            watched = self.device.type == "cpu" or self.update % LOSS_CHECK_INTERVAL == 0
            bar.step(epoch, self._finite(total, epoch) / images if watched else None, rate)
        if images == 0:
            raise DataError(f"train: expected at least one batch, got none in epoch {epoch}")
        mean = self._finite(total, epoch) / images
        if epoch == self.recipe.epochs:
            self._settle()
        seconds = time.perf_counter() - started
        return EpochRecord(epoch, mean, rate, self._validate(epoch), seconds, images)

    def _settle(self) -> None:
        """Gives the student the average, and batch-norm statistics that go with it."""
        if self.average is not None:
            self.average.copy_to(self.student)
            self.average = None
        if self.recipe.bn_batches:
            batches = (inputs_and_labels(batch)[0] for batch in self.loader)
            placed = (
                moved(inputs, self.device, channels_last=self.recipe.channels_last)
                for inputs in islice(batches, self.recipe.bn_batches)
            )
            reestimate(self.student, placed, Ledger())

    def _step(self, batch: Any, rate: float) -> tuple[Tensor, int]:
        recipe = self.recipe
        inputs, labels = inputs_and_labels(batch)
        inputs = moved(inputs, self.device, channels_last=recipe.channels_last)
        done = self.update / self.updates
        loss, size = self.objective(self.model, inputs, labels, done * recipe.epochs)
        if self.penalty is not None:
            loss = loss + self.penalty(done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        if recipe.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), recipe.max_grad_norm)
        self.optimizer.step()
        if self.average is not None and (self.hold is None or self.update >= self.hold):
            self.average.update(self.student)
        return loss.detach(), size

    def _finite(self, total: Tensor, epoch: int) -> float:
        # A NaN or an infinity stays in the sum, so looking now and then misses none.
        value = total.item()
        if not math.isfinite(value):
            raise TrainingError(
                f"the training loss became {value} in epoch {epoch}, at or before update "
                f"{self.update} of {self.updates}; the student is as it was before. Lower lr "
                f"({self.recipe.peak_lr}) or max_grad_norm ({self.recipe.max_grad_norm}), and "
                "check the images for NaN"
            )
        return value

    def _validate(self, epoch: int) -> Evaluation | None:
        if self.val is None:
            return None
        average = self.average if self.hold is None or self.update > self.hold else None
        with average.applied_to(self.student) if average is not None else nullcontext():
            found = evaluate(
                self.student, self.val, device=self.device, channels_last=self.recipe.channels_last
            )
            if self.best is None or found.top1 > self.best[0]:
                weights = copied(self.student) if self.recipe.keep == "best" else {}
                self.best = (found.top1, epoch, weights)
        return found

    def _stuck(self, epoch: int) -> bool:
        """Whether validation has not improved for as long as the recipe is patient."""
        patience = self.recipe.patience
        if patience is None or self.best is None or epoch - self.best[1] < patience:
            return False
        self._settle()
        return True

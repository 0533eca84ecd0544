"""The training loop: updates, schedule, validation after every epoch."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..compensation.batch_norm import reestimate
from ..compensation.ledger import Ledger
from ..errors import DataError, InvalidArgumentError, TrainingError
from .ema import WeightAverage
from .evaluation import Evaluation, evaluate
from .interruption import Interruption, RecoveryInterrupted
from .objective import Objective
from .optimizers import make_optimizer
from .outputs import inputs_and_labels, moved
from .progress import RecoveryProgress
from .result import EpochRecord, RecoveryResult
from .resumable_pass import ResumablePass
from .run_state import captured, put_back
from .schedule import learning_rate
from .weights import copied, named_tensors, overwrite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .checkpoints import CheckpointFolder
    from .recipe import Recipe

__all__ = ["Position", "TrainingLoop"]

ACCELERATE_MARKS = ("_is_accelerate_prepared", "_original_forward", "forward")
LOSS_CHECK_INTERVAL = 50  # updates between looks at the loss where looking stalls the device


@dataclass
class Position:
    """How far a run is.

    Attributes:
        update (int): updates made.
        epoch (int): the epoch at hand, from 1; one more than the run has when it is over.
        batches (int): batches of it that are done.
        loss_sum (float): their summed loss, per image.
        images (int): images in them.
        lr (float): learning rate of the last of them.
        seconds (float): time they took.
    """

    update: int = 0
    epoch: int = 1
    batches: int = 0
    loss_sum: float = 0.0
    images: int = 0
    lr: float = 0.0
    seconds: float = 0.0

    def next_epoch(self, epoch: int) -> None:
        """Goes to the start of an epoch."""
        self.epoch, self.batches, self.images = epoch, 0, 0
        self.loss_sum = self.lr = self.seconds = 0.0


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
        checkpoints (CheckpointFolder, optional): where the run is kept, and perhaps resumed from.
            Default: None.
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
        checkpoints: CheckpointFolder | None = None,
    ) -> None:
        from accelerate import Accelerator

        self.student = student
        self.teacher = teacher
        self.val = val
        self.recipe = recipe
        self.device = device
        self.penalty = penalty
        self.checkpoints = checkpoints
        self.source = loader
        self.marks = {m: student.__dict__[m] for m in ACCELERATE_MARKS if m in student.__dict__}
        self.accelerator = Accelerator(device_placement=False)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            student, make_optimizer(student, recipe), loader
        )
        steps = len(self.loader)
        self.updates = steps * recipe.epochs
        self.warmup = min(round(steps * recipe.warmup), self.updates - 1)
        self.at = Position()
        self.before: Evaluation | None = None
        self.history: list[EpochRecord] = []
        self.pass_ = ResumablePass(self.loader, loader, device, watch=checkpoints is not None)
        self.interruption = Interruption()
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
        recipe, at = self.recipe, self.at
        try:
            self._begin()
            bar = RecoveryProgress(recipe.epochs, self.updates, progress, at.update)
            with self.interruption if self._keeps() else nullcontext(), bar, self.objective:
                while at.epoch <= recipe.epochs:
                    record = self._epoch(at.epoch, bar)
                    bar.validated(record.val)
                    self.history.append(record)
                    at.next_epoch(recipe.epochs + 1 if self._stuck(at.epoch) else at.epoch + 1)
                    self._keep()
        finally:
            # accelerate marks what it has prepared, and wraps its forward where the user has asked
            # accelerate for mixed precision; the student is handed back without either
            for mark in ACCELERATE_MARKS:
                self.student.__dict__.pop(mark, None)
            self.student.__dict__.update(self.marks)
        kept = len(self.history)
        if recipe.keep == "best" and self.best is not None:
            kept = self.best[1]
            overwrite(self.student, self.best[2])
        for name, tensor in named_tensors(self.student).items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise TrainingError(
                    f"{name} holds NaN or infinity after the last update; the student is as it "
                    f"was before. Lower lr ({recipe.peak_lr})"
                )
        return RecoveryResult(tuple(self.history), self.before, kept, recipe)

    def _begin(self) -> None:
        """Goes on from a checkpoint, or measures what there is before the first update."""
        if self.checkpoints is not None and self.accelerator.num_processes > 1:
            raise InvalidArgumentError(
                f"checkpoint_dir: expected a run of one process, got one of "
                f"{self.accelerator.num_processes}; leave it out"
            )
        found = None if self.checkpoints is None else self.checkpoints.latest()
        if found is not None:
            put_back(self, found)
            return
        self.before = self._validate(0)
        if self._keeps():
            self._keep()  # a folder that can't be written shows now and not after an epoch

    def _keeps(self) -> bool:
        return self.checkpoints is not None and self.checkpoints.writes

    def _keep(self) -> None:
        """Writes a checkpoint, and ends the run if Ctrl-C was pressed."""
        if self.checkpoints is None or not self.checkpoints.writes:
            return
        path = self.checkpoints.write(self.at.update, *captured(self))
        if self.interruption.asked:
            raise RecoveryInterrupted(path, self.at.update, self.updates)

    def _epoch(self, epoch: int, bar: RecoveryProgress) -> EpochRecord:
        at = self.at
        started = time.perf_counter() - at.seconds
        self.pass_.choose(epoch)
        self.student.train()
        total = torch.tensor(at.loss_sum, device=self.device, dtype=torch.float64)
        for batch in self.pass_.batches(at.batches):
            at.lr = learning_rate(
                at.update, self.updates, self.warmup, self.recipe.peak_lr, self.hold
            )
            loss, size = self._step(batch, at.lr)
            total += loss.double() * size
            at.images += size
            at.update += 1
            at.batches += 1
            watched = self.device.type == "cpu" or at.update % LOSS_CHECK_INTERVAL == 0
            bar.step(epoch, self._finite(total, epoch) / at.images if watched else None, at.lr)
            if self._checkpoint_due():
                at.loss_sum = self._finite(total, epoch)
                at.seconds = time.perf_counter() - started
                self._keep()
        if at.images == 0:
            raise DataError(f"train: expected at least one batch, got none in epoch {epoch}")
        mean = self._finite(total, epoch) / at.images
        if epoch == self.recipe.epochs:
            self._settle(epoch)
        seconds = time.perf_counter() - started
        return EpochRecord(epoch, mean, at.lr, self._validate(epoch), seconds, at.images)

    def _checkpoint_due(self) -> bool:
        if self.checkpoints is None:
            return False
        every = self.checkpoints.every
        return self.interruption.asked or (every is not None and self.at.update % every == 0)

    def _settle(self, epoch: int) -> None:
        """Gives the student the average, and batch-norm statistics that go with it."""
        if self.average is not None:
            self.average.copy_to(self.student)
            self.average = None
        if self.recipe.bn_batches:
            self.pass_.choose(epoch + 1)
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
        done = self.at.update / self.updates
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
        if self.average is not None and (self.hold is None or self.at.update >= self.hold):
            self.average.update(self.student)
        return loss.detach(), size

    def _finite(self, total: Tensor, epoch: int) -> float:
        # A NaN or an infinity stays in the sum, so looking now and then misses none.
        value = total.item()
        if not math.isfinite(value):
            raise TrainingError(
                f"the training loss became {value} in epoch {epoch}, at or before update "
                f"{self.at.update} of {self.updates}; the student is as it was before. Lower lr "
                f"({self.recipe.peak_lr}) or max_grad_norm ({self.recipe.max_grad_norm}), and "
                "check the images for NaN"
            )
        return value

    def _validate(self, epoch: int) -> Evaluation | None:
        if self.val is None:
            return None
        average = self.average if self.hold is None or self.at.update > self.hold else None
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
        self._settle(epoch)
        return True

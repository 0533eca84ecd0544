"""The training loop: updates, schedule, validation after every epoch."""

from __future__ import annotations

import math
import time
import warnings
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..compensation.batch_norm import measured_batch_norms, reestimate
from ..compensation.ledger import Ledger
from ..errors import DataError, TrainingError
from .advice import folded_norms, out_of_memory, single_value, slow_precision, wait_hint
from .checkpoints import read_checkpoint
from .evaluation import Evaluation, correct_counts
from .interruption import RecoveryInterrupted
from .outputs import input_dtype, inputs_and_labels, moved
from .processes import require_gradients
from .progress import RecoveryProgress
from .result import EpochRecord, RecoveryResult
from .run import ACCELERATE_MARKS, Run
from .run_state import captured, put_back
from .scalar_log import ScalarLog
from .schedule import learning_rate
from .shares import OwnShare, in_step
from .weights import broken, copied, named_tensors, overwrite

if TYPE_CHECKING:
    from .checkpoints import Checkpoint
    from .ema import WeightAverage

__all__ = ["TrainingLoop"]

LOSS_CHECK_INTERVAL = 50  # updates between looks at the loss where looking stalls the device


class TrainingLoop(Run):
    """Trains the student of a run from where the run is to its end."""

    def run(self, progress: bool) -> RecoveryResult:
        """Trains to the end and leaves the weights asked for in the student."""
        recipe, at = self.recipe, self.at
        progress = progress and self.processes.first
        log = ScalarLog(None)
        try:
            self._begin()
            self._warn()
            log = ScalarLog(self.log_dir, at.update, write=self.processes.first)
            if at.update == 0:
                log.validation(0, self.before)
            bar = RecoveryProgress(recipe.epochs, self.updates, progress, at.update)
            with self.interruption if self._keeps() else nullcontext(), bar, self.objective:
                while at.epoch <= recipe.epochs:
                    record = self._epoch(at.epoch, bar, log)
                    self.history.append(record)
                    bar.epoch(record)
                    log.epoch(at.update, record)
                    bar.say(wait_hint(record, self.source))
                    at.next_epoch(recipe.epochs + 1 if self._stuck(at.epoch) else at.epoch + 1)
                    self._keep()
        finally:
            log.close()
            self._release()
        kept = len(self.history)
        if recipe.keep == "best" and self.best is not None:
            kept = self.best[1]
            overwrite(self.student, self.best[2])
        self._even_out()
        if not recipe.shard:
            self.processes.send(named_tensors(self.student))
        own = broken(self.student)
        # Of a divided network another process may hold the broken part.
        name = next(filter(None, self.processes.gathered(own) if recipe.shard else [own]), None)
        if name is not None:
            raise TrainingError(
                f"{name} holds NaN or infinity after the last update; the student is as it was "
                f"before. Lower lr ({self.peak_lr})"
            )
        return RecoveryResult(tuple(self.history), self.before, kept, recipe)

    def _release(self) -> None:
        """Takes from the student what accelerate and DistributedDataParallel have put on it."""
        # accelerate marks what it has prepared, and wraps its forward where the user has asked
        # accelerate for mixed precision; the student is handed back without either
        for mark in ACCELERATE_MARKS:
            self.student.__dict__.pop(mark, None)
        self.student.__dict__.update(self.marks)
        self.model = self.student
        if self.accelerator.use_distributed:
            self.accelerator.free_memory()  # with it go the hooks that wait for other processes

    def _begin(self) -> None:
        """Goes on from a checkpoint, or measures what there is before the first update."""
        found = self._found()
        if found is not None:
            put_back(self, found)
            return
        self.before = self._validate(0)
        if self._keeps():
            self._keep()  # a folder that can't be written shows now and not after an epoch

    def _found(self) -> Checkpoint | None:
        """The checkpoint to go on from; the first process chooses, all read it."""
        folder = self.checkpoints
        if folder is None:
            return None
        held: list[Checkpoint | None] = []

        def choose() -> Any:
            held.append(folder.latest(not self.recipe.shard))
            return held[0] and held[0].path

        path = self.processes.first_alone(choose)
        if held or path is None:
            return held[0] if held else None
        return read_checkpoint(path, not self.recipe.shard)

    def _keeps(self) -> bool:
        return self.checkpoints is not None and self.checkpoints.writes

    def _keep(self) -> None:
        """Writes a checkpoint, and ends the run if Ctrl-C was pressed."""
        checkpoints = self.checkpoints
        if checkpoints is None or not checkpoints.writes:
            return
        self._even_out()
        tensors, state = captured(self)
        path = self.processes.first_alone(lambda: checkpoints.write(self.at.update, tensors, state))
        if self._stopping():
            raise RecoveryInterrupted(path, self.at.update, self.updates)

    def _warn(self) -> None:
        # All processes ask, for looking at divided weights takes all of them; the first one tells.
        norms = None if self.recipe.freeze_batch_norm else folded_norms(self.student)
        for told in (norms, slow_precision(self.device, self.recipe)):
            if told is not None and self.at.update == 0 and self.processes.first:
                # of the line that calls recover: its frame, train_in_place and its two decorators
                warnings.warn(told, UserWarning, stacklevel=7)

    def _even_out(self) -> None:
        """Gives all processes the same running statistics, and whatever else is in buffers."""
        self.processes.even_out(self.student, dict(self.student.named_buffers()))
        if self.average is not None:
            self.processes.even_out(self.student, self.average.state)

    def _stopping(self) -> bool:
        return self.interruption.asked if self.processes.number == 1 else self.interrupted

    def _epoch(self, epoch: int, bar: RecoveryProgress, log: ScalarLog) -> EpochRecord:
        at = self.at
        started = time.perf_counter() - at.seconds
        self.pass_.choose(epoch)
        self.student.train()
        if self.recipe.freeze_batch_norm:
            for norm in measured_batch_norms(self.student):
                norm.training = False
        self.wait.seconds = at.data_seconds
        # What a checkpoint knows of the epoch is the sum over all; one process carries it on.
        loss_sum, images = (at.loss_sum, at.images) if self.processes.first else (0.0, 0)
        total = torch.tensor(loss_sum, device=self.device, dtype=torch.float64)
        for batch in self.wait.timed(self.pass_.batches(at.batches)):
            if self.own_share is not None:
                self.own_share.check()
            at.lr = learning_rate(at.update, self.updates, self.warmup, self.peak_lr, self.hold)
            loss, size = self._guarded_step(batch, at.lr)
            total += loss.double() * size
            images += size
            at.batches += 1
            if not self._completes(at.batches):
                continue
            at.update += 1
            mean, due = None, self._checkpoint_due()
            if due or self.device.type == "cpu" or at.update % LOSS_CHECK_INTERVAL == 0:
                mean = self._look(total, images, epoch)
                log.update(at.update, mean, at.lr)
            bar.step(epoch, mean, at.lr)
            if due or self.interrupted:
                at.seconds = time.perf_counter() - started
                self._keep()
        mean = self._look(total, images, epoch)
        if epoch == self.recipe.epochs:
            self._settle(epoch)
        seconds = time.perf_counter() - started
        share = min(1.0, at.data_seconds / seconds) if seconds else 0.0
        return EpochRecord(epoch, mean, at.lr, self._validate(epoch), seconds, at.images, share)

    def _completes(self, batches: int) -> bool:
        """Whether an update is made after so many batches of an epoch."""
        return batches % self.recipe.gradient_accumulation_steps == 0 or batches == self.steps

    def _checkpoint_due(self) -> bool:
        if self.checkpoints is None:
            return False
        every = self.checkpoints.every
        asked = self.processes.number == 1 and self.interruption.asked
        return asked or (every is not None and self.at.update % every == 0)

    def _look(self, total: Tensor, images: int, epoch: int) -> float:
        """Adds up what all processes have seen of an epoch; its mean loss.

        Raises:
            TrainingError: the loss is not finite. All processes raise it.
            DataError: there were no images.
        """
        at = self.at
        # A NaN or an infinity stays in the sum, so looking now and then misses none.
        own = total.item()
        self.wait.settle()
        at.loss_sum, seen, waited, asked = self.processes.sums(
            own, images, self.wait.seconds, self.interruption.asked
        )
        at.images, at.data_seconds = int(seen), waited / self.processes.number
        self.interrupted = asked > 0
        if not math.isfinite(at.loss_sum):
            raise TrainingError(
                f"the training loss became {at.loss_sum} in epoch {epoch}, at or before update "
                f"{at.update} of {self.updates}; the student is as it was before. Lower lr "
                f"({self.peak_lr}) or max_grad_norm ({self.recipe.max_grad_norm}), and "
                "check the images for NaN"
            )
        if at.images == 0:
            raise DataError(f"train: expected at least one batch, got none in epoch {epoch}")
        return at.loss_sum / at.images

    def _settle(self, epoch: int) -> None:
        """Gives the student the average, and batch-norm statistics that go with it."""
        if (average := self._begun_average()) is not None:
            average.copy_to(self.student)
        self.average = None
        if self.recipe.bn_batches:
            self.pass_.choose(epoch + 1)
            batches = (inputs_and_labels(batch)[0] for batch in self.loader)
            nhwc, dtype = self.recipe.channels_last, input_dtype(self.student)
            placed = (
                moved(inputs, self.device, channels_last=nhwc, dtype=dtype)
                for inputs in islice(batches, self.recipe.bn_batches)
            )
            reestimate(self.student, placed, Ledger())

    def _begun_average(self) -> WeightAverage | None:
        """The average, once an update went into it; until then it is what the student came with."""
        return self.average if self.average is not None and self.average.updates else None

    def _guarded_step(self, batch: Any, rate: float) -> tuple[Tensor, int]:
        try:
            return self._step(batch, rate)
        except torch.OutOfMemoryError as error:
            message = out_of_memory(error, batch, self.at.update, self.recipe)
            raise TrainingError(message) from error
        except ValueError as error:
            too_few = single_value(error, batch, self.at.batches + 1)
            if too_few is None:
                raise
            raise DataError(too_few) from error

    def _step(self, batch: Any, rate: float) -> tuple[Tensor, int]:
        """One batch forward and backward, and the update if it is the last one for it."""
        recipe, at = self.recipe, self.at
        inputs, labels = inputs_and_labels(batch)
        inputs = moved(inputs, self.device, channels_last=recipe.channels_last)
        begin = at.batches - at.batches % recipe.gradient_accumulation_steps
        parts = min(recipe.gradient_accumulation_steps, self.steps - begin)
        last = self._completes(at.batches + 1)
        done = at.update / self.updates
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            loss, size = self.objective(self.model, inputs, labels, done * recipe.epochs)
            whole = loss if self.penalty is None else loss + self.penalty(done)
            if at.batches == begin:
                self.optimizer.zero_grad(set_to_none=True)
            self.accelerator.backward(whole if parts <= 1 else whole / parts)
        if self.processes.number > 1 and not recipe.shard:
            require_gradients(self.student, self.optimizer)
        if last:
            self._update(rate)
        return whole.detach(), size

    def _update(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.recipe.max_grad_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer.optimizer)
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        self.optimizer.step()
        if self.average is not None and (self.hold is None or self.at.update >= self.hold):
            self.average.update(self.student)

    def _validate(self, epoch: int) -> Evaluation | None:
        if self.val is None:
            return None
        self._even_out()
        average = self._begun_average()
        with average.applied_to(self.student) if average is not None else nullcontext():
            share = in_step(self.val_share, self.processes) if self.recipe.shard else self.val_share
            counts = correct_counts(self.student, share, self.device, self.recipe.channels_last)
            if isinstance(self.val_share, OwnShare):
                self.val_share.check()
            found = Evaluation.of_sums(*self.processes.sums(*counts))
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

"""A recovery run as it stands: its networks, optimizer and data, and how far it has come."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InvalidArgumentError
from .data_wait import DataWait
from .ema import WeightAverage
from .interruption import Interruption
from .objective import Objective
from .optimizers import gradient_scaler, make_optimizer
from .position import Position
from .processes import Processes, prepared
from .resumable_pass import ResumablePass
from .shares import images_a_batch, training_share, validation_share

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping

    from accelerate import Accelerator

    from .checkpoints import CheckpointFolder
    from .evaluation import Evaluation
    from .recipe import Recipe
    from .result import EpochRecord

__all__ = ["ACCELERATE_MARKS", "Run"]

# What accelerate leaves on a network that it has prepared.
ACCELERATE_MARKS = ("_is_accelerate_prepared", "_original_forward", "forward")


class Run:
    """One run of :func:`chanprune_ext.recovery.recover`, whose arguments these are.

    Checkpoints are made from it and put back into it; :class:`.loop.TrainingLoop` moves it on.

    Args:
        student (nn.Module): trained in place, already on ``device``.
        teacher (nn.Module, optional): in evaluation mode, already on ``device``.
        loader (Iterable): sized, of batches ``(images, labels [N])``, or of images alone.
        val (Dataset or Iterable, optional): validation data.
        recipe (Recipe): settings.
        device (torch.device): where the batches go.
        accelerator (Accelerator): of :func:`make_accelerator`.
        penalty (Callable, optional): called with the share of the run that is done, 0 to 1; what it
            returns is added to the loss. Default: None.
        checkpoints (CheckpointFolder, optional): where the run is kept, and perhaps resumed from.
            Default: None.
        log_dir (str or PathLike, optional): folder for TensorBoard. Default: None.
        task (Mapping, optional): what else a checkpoint must agree on. Default: None.
        whole (tuple, optional): both networks before they were divided. Default: None, they aren't.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        loader: Iterable[Any],
        val: Any,
        recipe: Recipe,
        device: torch.device,
        accelerator: Accelerator,
        penalty: Callable[[float], Tensor] | None = None,
        checkpoints: CheckpointFolder | None = None,
        log_dir: str | os.PathLike[str] | None = None,
        task: Mapping[str, Any] | None = None,
        whole: tuple[nn.Module, nn.Module | None] | None = None,
    ) -> None:
        self.student = student
        self.whole = whole or (student, teacher)
        self.teacher = teacher
        self.val = val
        self.recipe = recipe
        self.device = device
        self.penalty = penalty
        self.checkpoints = checkpoints
        self.log_dir = log_dir
        self.task = dict(task or {})
        self.source = loader
        self.marks = {m: student.__dict__[m] for m in ACCELERATE_MARKS if m in student.__dict__}
        self.accelerator = accelerator
        self.processes = Processes(accelerator)
        self.val_share = validation_share(val, self.processes, recipe.workers)
        self.scaler = gradient_scaler(student, recipe, device, accelerator)
        self.objective = Objective(recipe, student, teacher, whole)
        if teacher is not None and not recipe.shard:
            self.processes.require_same("teacher", teacher)
        optimizer = make_optimizer(student, recipe)
        self.model, self.optimizer = prepared(accelerator, student, optimizer, recipe.shard)
        self.loader, self.own_share = training_share(loader, accelerator, self.processes)
        if recipe.compile:
            self.model = torch.compile(self.model)
            self.objective.compile_teacher()
        self.steps = len(self.loader)
        self.updates_an_epoch = math.ceil(self.steps / recipe.gradient_accumulation_steps)
        self.updates = self.updates_an_epoch * recipe.epochs
        self.warmup = min(round(self.updates_an_epoch * recipe.warmup), self.updates - 1)
        self.peak_lr = self._peak_lr()
        self.at = Position()
        self.before: Evaluation | None = None
        self.history: list[EpochRecord] = []
        self.pass_ = ResumablePass(
            self.loader, loader, device, checkpoints is not None, self.processes.number
        )
        self.wait = DataWait(device)
        self.interruption = Interruption()
        self.interrupted = False  # as all processes know of it
        self.hold = None
        self.average: WeightAverage | None = None
        if recipe.swa_start is not None:
            self.hold = min(max(round(self.updates * recipe.swa_start), 1), self.updates - 1)
        if recipe.ema_decay is not None or recipe.swa_start is not None:
            self.average = WeightAverage(student, recipe.ema_decay)
        self.best: tuple[float, int, dict[str, Tensor]] | None = None
        if self.processes.index:  # images differ between the processes, so shall what is drawn
            torch.manual_seed(recipe.seed + self.processes.index)

    def _peak_lr(self) -> float:
        recipe = self.recipe
        if recipe.lr_scale is None:
            return recipe.peak_lr
        size = images_a_batch(self.source)
        if size is None:
            raise InvalidArgumentError(
                "lr_scale: needs a dataset or a DataLoader with a batch size, to know how many "
                "images an update sees; leave it out and scale lr yourself"
            )
        return recipe.scaled_lr(size * self.processes.number * recipe.gradient_accumulation_steps)

"""Fine-tuning and distillation of a pruned network in one call."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from ..data import make_loader
from ..errors import DataError, InvalidArgumentError
from ..module_modes import evaluating
from .evaluation import device_of
from .loop import TrainingLoop
from .recipe import Recipe
from .rollback import Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from .result import RecoveryResult

__all__ = ["recover"]

DEFAULT_LR = {"sgd": 0.005, "adamw": 5e-4}


def recover(
    student: nn.Module,
    teacher: nn.Module | None = None,
    *,
    train: Dataset[Any] | Iterable[Any],
    val: Dataset[Any] | Iterable[Any] | None = None,
    epochs: int = 10,
    lr: float | None = None,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    warmup: float = 0.3,
    batch_size: int = 128,
    label_smoothing: float = 0.0,
    temperature: float = 4.0,
    distill_weight: float = 0.9,
    hard_weight: float = 0.1,
    max_grad_norm: float | None = 5.0,
    ema_decay: float | None = None,
    keep: str = "last",
    precision: str = "fp32",
    channels_last: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    workers: int = 0,
    progress: bool = True,
) -> RecoveryResult:
    """Trains ``student`` in place, on labels alone or towards the outputs of ``teacher``.

    The learning rate warms up linearly and falls to zero along half a cosine, update by update.
    The teacher sees the very images the student sees, augmentation included. If anything goes
    wrong, the student is put back into the state it came in. The global random state is left
    alone.

    Args:
        student (nn.Module): classifier returning logits ``[N, K]``; only parameters that require
            a gradient are trained.
        teacher (nn.Module, optional): classifier of the same classes, usually the network before
            pruning. It is run in evaluation mode and not changed. Default: None, labels alone.
        train (Dataset or Iterable): training data: a dataset, which is shuffled and cut into full
            batches here, or batches ``(images, labels [N])`` with a length, such as a
            ``DataLoader``.
        val (Dataset or Iterable, optional): likewise, for a measurement before the first and after
            every epoch. Default: None.
        epochs (int): passes over the training data. Default: 10.
        lr (float, optional): highest learning rate. Default: 0.005 for SGD, 0.0005 for AdamW, safe
            for a network that starts close to its teacher.
        optimizer (str): ``"sgd"`` (Nesterov momentum) or ``"adamw"``. Default: ``"sgd"``.
        momentum (float): of SGD. Default: 0.9.
        weight_decay (float): not applied to biases and normalisation layers. Default: 5e-4.
        warmup (float): epochs until the highest learning rate. Default: 0.3.
        batch_size (int): images an update, if ``train`` is a dataset. Default: 128.
        label_smoothing (float): share of a label spread over all classes. Default: 0.
        temperature (float): T of the distillation loss. Default: 4.
        distill_weight (float): weight of the distillation loss. Default: 0.9.
        hard_weight (float): weight of the labels' cross-entropy beside it; without a teacher the
            cross-entropy counts fully. Default: 0.1.
        max_grad_norm (float, optional): gradients are scaled down to this L2 norm. Default: 5.
        ema_decay (float, optional): train as usual, but measure and keep a running average of
            weights and batch-norm statistics with this decay. Default: None, no average.
        keep (str): which weights the student ends with: ``"last"``, or ``"best"`` on ``val``,
            the start included. The last ones give an unbiased figure where ``val`` is also the
            set reported on. Default: ``"last"``.
        precision (str): ``"fp32"``, or ``"bf16"`` for mixed precision: about twice as fast on
            hardware with bfloat16 arithmetic. Default: ``"fp32"``.
        channels_last (bool): feed images in NHWC layout, which most convolutions run faster on.
            The model must not call ``view`` on feature maps. Default: False.
        seed (int): of the order of the images, their augmentation and dropout. Default: 0.
        device (torch.device or str, optional): where to train; both networks return to where they
            were afterwards. Default: where the student is.
        workers (int): processes decoding images, if ``train`` is a dataset. Default: 0.
        progress (bool): draw a progress bar. Default: True.

    Returns:
        RecoveryResult: history, best and last epoch.

    Raises:
        InvalidArgumentError: a setting is outside its range, or the models do not fit together.
        DataError: the training data are empty or a label is outside the model's classes.
        TrainingError: the loss became NaN or infinite.
    """
    recipe = Recipe(
        epochs=epochs,
        lr=DEFAULT_LR.get(optimizer, 0.005) if lr is None else lr,
        optimizer=optimizer,
        momentum=momentum,
        weight_decay=weight_decay,
        warmup=warmup,
        batch_size=batch_size,
        label_smoothing=label_smoothing,
        temperature=temperature,
        distill_weight=distill_weight,
        hard_weight=hard_weight,
        max_grad_norm=max_grad_norm,
        ema_decay=ema_decay,
        keep=keep,
        precision=precision,
        channels_last=channels_last,
        seed=seed,
        workers=workers,
    )
    if keep == "best" and val is None:
        raise InvalidArgumentError("keep: 'best' needs validation data; pass val=...")
    if teacher is student:
        raise InvalidArgumentError("teacher: is the student itself; pass the unpruned network")
    loader = _training_loader(train, recipe)
    home = device_of(student)
    place = home if device is None else torch.device(device)
    snapshot = Snapshot(student)
    try:
        with ExitStack() as stack:
            stack.enter_context(
                torch.random.fork_rng(devices=[place] if place.type == "cuda" else [])
            )
            torch.manual_seed(seed)
            if teacher is not None:
                stack.callback(teacher.to, device_of(teacher))
                stack.enter_context(evaluating(teacher.to(place)))
            loop = TrainingLoop(student.to(place), teacher, loader, val, recipe, place)
            result = loop.run(progress)
    except BaseException:
        snapshot.restore()
        raise
    student.to(home)
    snapshot.restore_modes()
    student.zero_grad(set_to_none=True)
    return result


def _training_loader(train: Dataset[Any] | Iterable[Any], recipe: Recipe) -> Iterable[Any]:
    length = _length(train)
    if isinstance(train, Dataset):
        train = make_loader(
            train,
            recipe.batch_size,
            shuffle=True,
            # a small last batch would upset batch norm
            drop_last=length >= recipe.batch_size,
            seed=recipe.seed,
            workers=recipe.workers,
        )
    elif length == 0:
        raise DataError("train: expected at least one batch, got none")
    return train


def _length(train: Any) -> int:
    try:
        return len(train)
    except TypeError:
        raise InvalidArgumentError(
            f"train: expected a dataset or batches with a length, got {type(train).__name__}; the "
            "learning rate schedule needs to know how many updates there will be"
        ) from None

"""Fine-tuning and distillation of a pruned network in one call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from ..data import make_loader
from ..errors import DataError, InvalidArgumentError
from ..module_modes import evaluating
from .batch_norm_sync import synchronised_batch_norm
from .checkpoints import CheckpointFolder
from .evaluation import device_of
from .loop import TrainingLoop
from .processes import Processes, launched_processes, make_accelerator, running_statistics
from .recipe import Recipe
from .rollback import Snapshot
from .sharding import hand_back, sharded_copy
from .taps import plain_module

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor, nn

    from .result import RecoveryResult

__all__ = ["checkpoint_folder", "recover", "train_in_place"]


def recover(
    student: nn.Module,
    teacher: nn.Module | None = None,
    *,
    train: Dataset[Any] | Iterable[Any],
    val: Dataset[Any] | Iterable[Any] | None = None,
    recipe: Recipe | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    keep_checkpoints: int = 2,
    log_dir: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> RecoveryResult:
    """Trains ``student`` in place, on labels, or towards a teacher's outputs and features.

    The learning rate warms up linearly and falls to zero along half a cosine, update by update.
    The teacher sees the very images the student sees, augmentation included. If anything goes
    wrong, the student is put back into the state it came in. The global random state is left
    alone.

    Started by ``torchrun`` or ``accelerate launch``, every process calls this with the same
    student, teacher and data. They share the batches (docs/recovery.md says which data are split
    here and which are not), each takes ``batch_size`` images at once, and all end with the same
    weights and the same result. The first of them prints and writes.

    Args:
        student (nn.Module): classifier returning logits ``[N, K]``; only parameters that require
            a gradient are trained. Images are given to either network in the type of its weights,
            if they are all bfloat16, float16 or float64.
        teacher (nn.Module, optional): classifier of the same classes, usually the network before
            pruning. It is run in evaluation mode and not changed; it must not share with the
            student what is trained. Default: None, labels alone.
        train (Dataset or Iterable): training data: a dataset, which is shuffled and cut into full
            batches here, or batches with a length, such as a ``DataLoader``. A batch is a pair
            ``(images, labels [N])``, or images alone to learn from the teacher without labels.
        val (Dataset or Iterable, optional): labelled data for a measurement before the first and
            after every epoch, no generator, which lasts for one of them. Default: None.
        recipe (Recipe, optional): settings to start from, a result's ``recipe`` to repeat it, say.
            Default: the defaults of :class:`Recipe`.
        device (torch.device or str, optional): where to train; both networks return to where they
            were afterwards. Several processes take the GPU of their own each, or the CPU. Default:
            where the student is; with several processes, GPUs where there are any.
        progress (bool): draw a progress bar. Default: True.
        checkpoint_dir (str or PathLike, optional): folder for checkpoints of the run, made where it
            is missing. With it, Ctrl-C finishes the update at hand, writes a checkpoint and raises
            :class:`RecoveryInterrupted`; a second Ctrl-C stops at once. Default: None, none.
        resume (str or PathLike, optional): ``"auto"`` goes on from the newest whole checkpoint in
            ``checkpoint_dir``, or starts where there is none; a path is that of a checkpoint or of
            a folder of them. The run ends with the weights that it would have ended with
            uninterrupted, bit for bit on the CPU. Default: None, start anew.
        checkpoint_every (int, optional): updates between checkpoints; there is one after each epoch
            anyway. Default: None.
        keep_checkpoints (int): how many of the latest stay in the folder. Default: 2.
        log_dir (str or PathLike, optional): folder for TensorBoard: losses, learning rate, images a
            second, waiting for data, validation. Default: None, none.
        **settings: what differs from the recipe: any attribute of :class:`Recipe`, among them
            ``epochs``, ``lr``, ``losses={"kd": 0.9, "hard": 0.1, "features": 1.0}``, ``ema_decay``.

    Returns:
        RecoveryResult: history, best and last epoch, and the recipe.

    Raises:
        InvalidArgumentError: a setting is outside its range, or the models do not fit together.
        DataError: the training data are empty, have no labels where the losses need them, or a
            label is outside the model's classes.
        TrainingError: the loss became NaN or infinite, or the device ran out of memory.
        CheckpointError: the checkpoint is of another network, plan, recipe or amount of data; the
            message names the first difference. Or none can be read.
        OutputError: a checkpoint can't be written; those before it are intact.
        RecoveryInterrupted: Ctrl-C, see ``checkpoint_dir``; a ``KeyboardInterrupt``.

    Example:
        >>> recover(pruned, teacher=model, train=images, epochs=10, losses={"kd": 1, "features": 1})
    """
    recipe = Recipe.of(recipe, settings)
    checkpoints = checkpoint_folder(checkpoint_dir, resume, checkpoint_every, keep_checkpoints)
    return train_in_place(
        student,
        teacher,
        train,
        val,
        recipe,
        device,
        progress,
        checkpoints=checkpoints,
        log_dir=log_dir,
    )


def checkpoint_folder(
    folder: str | os.PathLike[str] | None,
    resume: str | os.PathLike[str] | None,
    every: int | None,
    keep: int,
) -> CheckpointFolder | None:
    """Where a run is kept; None where it is not. Arguments as for :class:`CheckpointFolder`."""
    if folder is not None or resume is not None:
        return CheckpointFolder(folder, resume, every, keep)
    if every is not None:
        raise InvalidArgumentError("checkpoint_every: needs a folder; pass checkpoint_dir=...")
    return None


@torch.inference_mode(False)
@torch.enable_grad()
def train_in_place(
    student: nn.Module,
    teacher: nn.Module | None,
    train: Dataset[Any] | Iterable[Any],
    val: Dataset[Any] | Iterable[Any] | None,
    recipe: Recipe,
    device: torch.device | str | None,
    progress: bool,
    penalty: Callable[[float], Tensor] | None = None,
    checkpoints: CheckpointFolder | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    task: Mapping[str, Any] | None = None,
) -> RecoveryResult:
    """:func:`recover` with a complete recipe, and perhaps a penalty on the student's weights.

    ``penalty``, ``checkpoints``, ``log_dir`` and ``task`` are as for :class:`.run.Run`, the rest
    as for :func:`recover`.
    """
    for name, used in (("keep", recipe.keep == "best"), ("patience", recipe.patience is not None)):
        if used and val is None:
            raise InvalidArgumentError(
                f"{name}: {getattr(recipe, name)!r} needs validation data; pass val=..."
            )
    if isinstance(val, Iterator) and not hasattr(val, "__len__"):
        raise InvalidArgumentError(
            f"val: expected data that can be gone through after every epoch, got a "
            f"{type(val).__name__}, which is used up by the first pass; pass list(val) or a "
            "DataLoader"
        )
    _check_networks(student, teacher, recipe)
    if recipe.shard:
        _check_shard(launched_processes(), penalty)
    home = device_of(student)
    place = _place(home, device)
    accelerator = make_accelerator(place)
    if accelerator.num_processes > 1:
        place = accelerator.device
    loader = _training_loader(train, recipe, accelerator.num_processes)
    # A divided student is a copy, and this one stays as it is until the end.
    snapshot = Snapshot(student) if not recipe.shard else None
    whole = (student, teacher)
    try:
        with ExitStack() as stack:
            stack.enter_context(
                torch.random.fork_rng(devices=[place] if place.type == "cuda" else [])
            )
            torch.manual_seed(recipe.seed)
            if recipe.shard:
                student, teacher = _divided(student, teacher, recipe, place, Processes(accelerator))
            elif teacher is not None:
                stack.callback(teacher.to, device_of(teacher))
                stack.enter_context(evaluating(teacher.to(place)))
            student.to(place)  # where a divided one is already
            if recipe.sync_batch_norm and accelerator.num_processes > 1:
                stack.enter_context(synchronised_batch_norm(student, place))
            loop = TrainingLoop(
                student,
                teacher,
                loader,
                val,
                recipe,
                place,
                accelerator,
                penalty,
                checkpoints,
                log_dir,
                task,
                whole if recipe.shard else None,
            )
            result = loop.run(progress)
    except BaseException:
        if snapshot is not None:
            snapshot.restore()
        raise
    if snapshot is None:
        hand_back(student, whole[0])
        student = whole[0]
    else:
        student.to(home)
        snapshot.restore_modes()
    student.zero_grad(set_to_none=True)
    return result


def _check_networks(student: nn.Module, teacher: nn.Module | None, recipe: Recipe) -> None:
    """Raises InvalidArgumentError where training the student can't be, or changes the teacher."""
    ours = [*student.named_parameters(), *student.named_buffers()]
    made = next((name for name, tensor in ours if tensor.is_inference()), None)
    if made is not None:
        raise InvalidArgumentError(
            f"student: '{made}' was made under torch.inference_mode and can't be trained; make or "
            "load the network outside of it, or pass copy.deepcopy(student), copied outside"
        )
    if teacher is None:
        return
    if plain_module(teacher) is plain_module(student):
        raise InvalidArgumentError("teacher: is the student itself; pass the unpruned network")
    theirs = {id(tensor) for tensor in (*teacher.parameters(), *teacher.buffers())}
    statistics = set() if recipe.freeze_batch_norm else set(running_statistics(student))
    for name, tensor in ours:
        if id(tensor) in theirs and (tensor.requires_grad or name in statistics):
            raise InvalidArgumentError(
                f"teacher: shares '{name}' with the student, whose training would change it; pass "
                "the unpruned network, or copy.deepcopy(teacher)"
            )


def _divided(
    student: nn.Module,
    teacher: nn.Module | None,
    recipe: Recipe,
    place: torch.device,
    processes: Processes,
) -> tuple[nn.Module, nn.Module | None]:
    """Both networks as copies of which each process holds its part."""
    student = sharded_copy("student", student, place, processes, recipe.precision)
    if teacher is not None:
        processes.require_same("teacher", teacher)
        precision = recipe.teacher_precision or recipe.precision
        teacher = sharded_copy("teacher", teacher, place, processes, precision)
        teacher.eval()  # in a line of its own: a model's own train() may return nothing
    return student, teacher


def _check_shard(processes: int, penalty: Callable[[float], Tensor] | None) -> None:
    if processes == 1:
        raise InvalidArgumentError(
            "shard: expected several processes to divide the student over, this is one alone; "
            "start the script with torchrun --nproc-per-node N, or leave shard out"
        )
    if penalty is not None:
        raise InvalidArgumentError(
            "shard: a penalty looks at all of the student's weights, and each process would hold "
            "a part of them; leave shard out"
        )


def _place(home: torch.device, device: torch.device | str | None) -> torch.device:
    """Where to train; of several processes, each has its own device of that kind."""
    if device is not None:
        return _usable(device)
    if launched_processes() > 1:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return home


def _usable(device: torch.device | str) -> torch.device:
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidArgumentError(f"device: expected 'cpu' or 'cuda:0', say; {reason}") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise InvalidArgumentError(
            f"device: {str(place)!r} is not there, torch sees {torch.cuda.device_count()} GPUs; "
            "use 'cpu', or leave device out"
        )
    return place


def _training_loader(
    train: Dataset[Any] | Iterable[Any], recipe: Recipe, processes: int
) -> Iterable[Any]:
    length = _length(train)
    if isinstance(train, Dataset):
        train = make_loader(
            train,
            recipe.batch_size,
            shuffle=True,
            # a small last batch would upset batch norm
            drop_last=length >= recipe.batch_size * processes,
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

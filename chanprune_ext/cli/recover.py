"""``chanprune recover``: fine-tuning or distillation of a pruned model."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from chanprune_ext.checkpoint import save
from chanprune_ext.cli.loading import load_model, place
from chanprune_ext.cli.options import (
    DATA_HELP,
    BatchSize,
    ClassFile,
    Device,
    ModelArguments,
    ModelSpec,
    OutFile,
    Seed,
)
from chanprune_ext.data import open_dataset
from chanprune_ext.quantities import format_accuracy
from chanprune_ext.recovery import recover as train_back
from chanprune_ext.report import make_folder

__all__ = ["recover"]


class Optimizer(str, Enum):
    """Optimizers that recovery knows."""

    SGD = "sgd"
    ADAMW = "adamw"


class Keep(str, Enum):
    """Which weights to end with."""

    LAST = "last"
    BEST = "best"


class Precision(str, Enum):
    """Arithmetic of the training."""

    FP32 = "fp32"
    BF16 = "bf16"


def recover(
    model: ModelSpec,
    weights: Annotated[
        Path, typer.Option(help="The pruned model, as 'prune' wrote it.", show_default=False)
    ],
    data: Annotated[str, typer.Option(help=DATA_HELP, show_default=False)],
    out: OutFile,
    teacher_weights: Annotated[
        Path | None,
        typer.Option(
            help="Weights of the original model, to distil from; without them labels alone count.",
            show_default=False,
        ),
    ] = None,
    model_arg: ModelArguments = None,
    class_file: ClassFile = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 10,
    lr: Annotated[
        float | None,
        typer.Option(help="Highest learning rate [default: 0.005 for SGD, 0.0005 for AdamW]"),
    ] = None,
    optimizer: Annotated[Optimizer, typer.Option(help="Optimizer.")] = Optimizer.SGD,
    batch_size: BatchSize = 128,
    temperature: Annotated[float, typer.Option(help="Of the distillation loss.")] = 4.0,
    label_smoothing: Annotated[float, typer.Option(help="Share of a label spread out.")] = 0.0,
    keep: Annotated[
        Keep,
        typer.Option(help="Weights to end with; 'best' chooses by the images it then reports on."),
    ] = Keep.LAST,
    precision: Annotated[Precision, typer.Option(help="Arithmetic.")] = Precision.FP32,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = 0,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Trains a pruned model back to accuracy and writes it to a new file."""
    student = load_model(model, model_arg, weights, device)
    teacher = None
    if teacher_weights is not None:
        teacher = load_model(model, model_arg, teacher_weights, device)
    training = open_dataset(data, "train", augment=True, class_file=class_file, seed=seed)
    make_folder(out.parent)  # a place that cannot be written shows now and not after the training
    result = train_back(
        student,
        teacher,
        train=training,
        val=open_dataset(data, "test", class_file=class_file),
        epochs=epochs,
        lr=lr,
        optimizer=optimizer.value,
        batch_size=batch_size,
        temperature=temperature,
        label_smoothing=label_smoothing,
        keep=keep.value,
        precision=precision.value,
        workers=workers,
        seed=seed,
        device=place(device),
    )
    save(student, out)
    console = Console()
    kept = result.before if result.kept_epoch == 0 else result.history[result.kept_epoch - 1].val
    for name, found in (("before", result.before), ("after", kept)):
        if found is not None:
            accuracy = format_accuracy(found.top1, found.standard_error)
            console.print(f"{name}: top-1 {accuracy} (n = {found.n:,})")
    console.print(f"model: {out}", soft_wrap=True)

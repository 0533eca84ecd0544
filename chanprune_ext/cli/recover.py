"""``chanprune recover``: fine-tuning or distillation of a pruned model."""

import contextlib
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from chanprune_ext.atomic_files import check_writable, make_folder
from chanprune_ext.checkpoint import save
from chanprune_ext.cli.image_options import (
    AutoAugmentation,
    CropModeName,
    ImageSize,
    Magnitude,
    PresetName,
    RandomErasing,
    Repeats,
    Resize,
    TestData,
    images_that_fit,
    open_images,
    open_training_images,
)
from chanprune_ext.cli.loading import load_model, model_arguments, place
from chanprune_ext.cli.options import (
    DATA_HELP,
    ClassFile,
    Device,
    ModelArguments,
    ModelSpec,
    OutFile,
    Precision,
)
from chanprune_ext.cli.run_printing import INTERRUPTED, command_line, print_interruption
from chanprune_ext.cli.saved_model import built_from
from chanprune_ext.cli.terminal import plain_console
from chanprune_ext.data import Augmentation
from chanprune_ext.data.opening import classes_of_test
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.jobs.recovery_report import recovery_report
from chanprune_ext.quantities import format_accuracy
from chanprune_ext.recovery import Recipe, RecoveryInterrupted, RecoveryResult
from chanprune_ext.recovery import recover as train_back
from chanprune_ext.recovery.processes import (
    is_first_process,
    launched_processes,
    leave_processes,
)
from chanprune_ext.recovery.recipe import LOSSES
from chanprune_ext.report import write_report

__all__ = ["recover"]


class Optimizer(str, Enum):
    """Optimizers that recovery knows."""

    SGD = "sgd"
    ADAMW = "adamw"


class Keep(str, Enum):
    """Which weights to end with."""

    LAST = "last"
    BEST = "best"


class LearningRateScale(str, Enum):
    """How the learning rate grows with the images of an update."""

    LINEAR = "linear"
    SQRT = "sqrt"


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
    test_data: TestData = None,
    preset: PresetName = None,
    image_size: ImageSize = None,
    resize: Resize = None,
    crop_mode: CropModeName = None,
    auto_augment: AutoAugmentation = None,
    magnitude: Magnitude = 9,
    random_erasing: RandomErasing = 0.0,
    repeats: Repeats = 1,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=WEIGHT",
            help=f"Weight of a loss ({', '.join(LOSSES)}); may be repeated.",
            show_default="kd=0.9 and hard=0.1; hard=1 without a teacher",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Settings of an earlier run, its .recipe.json; options given here override them. "
            "What the images are and how they are augmented is not among them: give that again.",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the training images", show_default="10")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Highest learning rate", show_default="0.005 for SGD, 0.0005 for AdamW"),
    ] = None,
    lr_scale: Annotated[
        LearningRateScale | None,
        typer.Option(
            help="Multiply the learning rate by the images of an update over --lr-base-size, or by "
            "the root of that.",
            show_default=False,
        ),
    ] = None,
    lr_base_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images an update that --lr is meant for", show_default="256"),
    ] = None,
    optimizer: Annotated[
        Optimizer | None, typer.Option(help="Optimizer", show_default="sgd")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images per batch, in each process", show_default="128"),
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Batches per update, in each process", show_default="1"),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the losses on logits", show_default="4")
    ] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(help="Share of a label spread out", show_default="0")
    ] = None,
    mixup: Annotated[
        float | None, typer.Option(help="Mix images, parameter of the Beta distribution.")
    ] = None,
    cutmix: Annotated[
        float | None, typer.Option(help="Paste parts of images, parameter likewise.")
    ] = None,
    teacher_flip: Annotated[
        bool | None,
        typer.Option(
            "--teacher-flip",
            help="Ask the teacher about mirror images too; not for writing.",
            show_default=False,
        ),
    ] = None,
    ema_decay: Annotated[
        float | None, typer.Option(help="Keep a running average of the weights.")
    ] = None,
    keep: Annotated[
        Keep | None,
        typer.Option(
            help="Weights to end with; 'best' chooses by the images it then reports on.",
            show_default="last",
        ),
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Arithmetic", show_default="fp32")
    ] = None,
    teacher_precision: Annotated[
        Precision | None,
        typer.Option(help="Of the teacher", show_default="as --precision"),
    ] = None,
    channels_last: Annotated[
        bool | None,
        typer.Option("--channels-last", help="Lay images out as NHWC.", show_default=False),
    ] = None,
    compile_: Annotated[
        bool | None,
        typer.Option("--compile", help="Run through torch.compile.", show_default=False),
    ] = None,
    freeze_batch_norm: Annotated[
        bool | None,
        typer.Option(
            "--freeze-batch-norm",
            help="Keep the running statistics; for a network close to its teacher.",
            show_default=False,
        ),
    ] = None,
    sync_batch_norm: Annotated[
        bool | None,
        typer.Option(
            "--sync-batch-norm",
            help="Let batch norm average over all processes; needs GPUs.",
            show_default=False,
        ),
    ] = None,
    shard: Annotated[
        bool | None,
        typer.Option(
            "--shard",
            help="Divide the networks over all processes (FSDP2); needs torchrun.",
            show_default=False,
        ),
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(
            help="Folder for checkpoints, one after every epoch; Ctrl-C writes one too.",
            show_default=False,
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Also after so many updates.", show_default=False)
    ] = None,
    keep_checkpoints: Annotated[
        int, typer.Option(min=1, help="How many of the latest checkpoints stay.")
    ] = 2,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|PATH",
            help="Go on from a checkpoint: 'auto' from the newest in the folder, or start where "
            "there is none.",
            show_default=False,
        ),
    ] = None,
    log_dir: Annotated[
        Path | None, typer.Option(help="Folder for TensorBoard.", show_default=False)
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Folder for an HTML report: accuracies, time, widths, curves of the training.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0, help="Processes that decode images, for each that trains", show_default="0"
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of everything that is drawn at random", show_default="0")
    ] = None,
    device: Device = "auto",
) -> None:
    """Trains a pruned model back to accuracy; writes it, and beside it the recipe of the run.

    On several GPUs: torchrun --nproc-per-node 8 -m chanprune_ext recover ...
    """
    given = {
        "losses": parse_losses(loss) if loss else None,
        "epochs": epochs,
        "lr": lr,
        "optimizer": None if optimizer is None else optimizer.value,
        "batch_size": batch_size,
        "temperature": temperature,
        "label_smoothing": label_smoothing,
        "mixup": mixup,
        "cutmix": cutmix,
        "teacher_flip": teacher_flip,
        "ema_decay": ema_decay,
        "keep": None if keep is None else keep.value,
        "precision": None if precision is None else precision.value,
        "teacher_precision": None if teacher_precision is None else teacher_precision.value,
        "lr_scale": None if lr_scale is None else lr_scale.value,
        "lr_base_size": lr_base_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "channels_last": channels_last,
        "compile": compile_,
        "freeze_batch_norm": freeze_batch_norm,
        "sync_batch_norm": sync_batch_norm,
        "shard": shard,
        "workers": workers,
        "seed": seed,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    start = Recipe() if recipe is None else Recipe.load(recipe)
    chosen = start.changed(**settings)
    several = launched_processes() > 1
    # Of several processes each finds its own GPU; until then its networks stay off all of them.
    home = "cpu" if several else device
    arguments = model_arguments(model, model_arg, weights)
    student = load_model(model, arguments, weights, home)
    teacher = None
    if teacher_weights is not None:
        teacher = load_model(model, arguments, teacher_weights, home)
    augmentation = Augmentation(
        None if auto_augment is None else auto_augment.value,
        magnitude=magnitude,
        erasing=random_erasing,
        repeats=repeats,
    )
    training = open_training_images(data, class_file, preset, image_size, augmentation, chosen.seed)
    # a place that cannot be written shows now and not after the training
    check_writable(out)
    check_writable(recipe_beside(out))
    if report is not None:
        make_folder(report)
    classes = classes_of_test(data, test_data, class_file)
    test = open_images(test_data or data, "test", classes, preset, image_size, resize, crop_mode)
    try:
        with contextlib.ExitStack() as fitting:
            if not several:  # one of several that fails must not wait for the others
                for images, place_of in ((training, data), (test, test_data or data)):
                    fitting.enter_context(images_that_fit(student, model, images, place_of))
            result = train_back(
                student,
                teacher,
                train=training,
                val=test,
                recipe=chosen,
                device=None if several and device == "auto" else place(device),
                checkpoint_dir=checkpoints,
                resume=resume,
                checkpoint_every=checkpoint_every,
                keep_checkpoints=keep_checkpoints,
                log_dir=log_dir,
            )
    except RecoveryInterrupted as interruption:
        if is_first_process():
            print_interruption(interruption, "--resume auto")
        leave_processes()
        raise typer.Exit(INTERRUPTED) from interruption
    first = is_first_process()
    leave_processes()
    if first:
        _finish(student, out, result, built_from(model, arguments))
        if report is not None:
            made = recovery_report(
                student.to(place(device)),
                None if teacher is None else teacher.to(place(device)),
                test,
                result,
                title=f"{model}: recovery",
                command=command_line(),
                file_bytes=out.stat().st_size,
            )
            plain_console().print(f"report: {write_report(made, report)}", soft_wrap=True)


def _finish(student: nn.Module, out: Path, result: RecoveryResult, origin: dict[str, Any]) -> None:
    """Writes the model, what it was built from and its recipe, and says what was reached."""
    save(student, out, built_from=origin)
    record = recipe_beside(out)
    result.recipe.save(record)
    console = plain_console()
    kept = result.before if result.kept_epoch == 0 else result.history[result.kept_epoch - 1].val
    for name, found in (("before", result.before), ("after", kept)):
        if found is not None:
            accuracy = format_accuracy(found.top1, found.standard_error)
            console.print(f"{name}: top-1 {accuracy} (n = {found.n:,})")
    console.print(f"model: {out}", soft_wrap=True)
    console.print(f"recipe: {record}", soft_wrap=True)


def recipe_beside(out: Path) -> Path:
    """Where the settings of a run are written."""
    return out.with_suffix(".recipe.json")


def parse_losses(texts: list[str]) -> dict[str, float]:
    """``name=weight`` pairs as a mapping.

    Raises:
        InvalidArgumentError: One of them is no such pair.
    """
    weights = {}
    for text in texts:
        name, _, weight = text.partition("=")
        try:
            weights[name] = float(weight)
        except ValueError as error:
            raise InvalidArgumentError(
                f"--loss: expected name=weight, such as features=1, got {text!r}"
            ) from error
    return weights

"""``chanprune sensitivity``: which layers can lose channels, measured one group at a time."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from chanprune_ext.atomic_files import check_writable, make_folder
from chanprune_ext.cli.calibration import (
    CriterionName,
    criterion_of,
    images_to_draw,
    labelled_batches,
    needs_images,
)
from chanprune_ext.cli.image_options import (
    CropModeName,
    ImageSize,
    PresetName,
    Resize,
    images_that_fit,
    open_images,
)
from chanprune_ext.cli.loading import load_model, model_arguments
from chanprune_ext.cli.options import (
    DATA_HELP,
    BatchSize,
    ClassFile,
    Device,
    ModelArguments,
    ModelSpec,
    Seed,
    Weights,
)
from chanprune_ext.cli.run_printing import command_line
from chanprune_ext.cli.terminal import plain_console
from chanprune_ext.data import calibration_batches
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.pruning import plan
from chanprune_ext.recovery import evaluate
from chanprune_ext.recovery.evaluation import device_of
from chanprune_ext.report import RunReport, Stage, environment, write_report
from chanprune_ext.sensitivity import Sensitivity, told_apart
from chanprune_ext.sensitivity import sensitivity as measure

__all__ = ["sensitivity"]


def sensitivity(
    model: ModelSpec,
    data: Annotated[str, typer.Option(help=DATA_HELP, show_default=False)],
    out: Annotated[Path, typer.Option(help="Where the curves go, as JSON.", show_default=False)],
    weights: Weights = None,
    model_arg: ModelArguments = None,
    class_file: ClassFile = None,
    preset: PresetName = None,
    image_size: ImageSize = None,
    resize: Resize = None,
    crop_mode: CropModeName = None,
    ratios: Annotated[
        str, typer.Option(metavar="R,R,...", help="Shares of a group to remove, rising.")
    ] = "0.25,0.5,0.75",
    criterion: Annotated[
        CriterionName,
        typer.Option(help="Orders the channels; from elimination on by training images."),
    ] = CriterionName.L1,
    images: Annotated[int, typer.Option(min=1, help="Test images to measure on.")] = 256,
    compensate: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Measure each point after compensation on N training images, too; takes one "
            "compensation a point.",
        ),
    ] = 0,
    report: Annotated[
        Path | None,
        typer.Option(help="Folder for a report with the curves drawn.", show_default=False),
    ] = None,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Measures how accuracy and outputs suffer when one group of channels alone is cut."""
    console = plain_console()
    arguments = model_arguments(model, model_arg, weights)
    network = load_model(model, arguments, weights, device)
    place = device_of(network)
    test = open_images(data, "test", class_file, preset, image_size, resize, crop_mode)
    check_writable(out)
    if report is not None:
        make_folder(report)
    training, drawn = None, 0
    if compensate or needs_images(criterion):
        training = open_images(
            data, "train", class_file, preset, image_size, resize, crop_mode, like=test.shape
        )
        drawn = images_to_draw(compensate or None, training, "--compensate")
    ranking = criterion_of(criterion, training, drawn, seed)
    calibration = None
    if training is not None and compensate:
        unlabelled = calibration_batches(training, drawn, seed=seed)
        calibration = [batch.to(place) for batch in unlabelled]
    chosen = labelled_batches(test, images, batch_size, seed)
    batches = [(inputs.to(place), labels) for inputs, labels in chosen]
    example = torch.zeros(1, *test.shape, device=place)
    with images_that_fit(network, model, test, data):
        found = measure(
            network,
            example,
            batches,
            ratios=parse_numbers(ratios),
            criterion=ranking,
            calibration=calibration,
            seed=seed,
        )
    found.save(out)
    console.print(curve_table(found))
    console.print(f"curves: {out}", soft_wrap=True)
    if report is not None:
        accuracy = evaluate(network, batches)
        sizes = plan(network, example, criterion="random")
        stage = Stage(
            name="original",
            accuracy=accuracy.top1,
            standard_error=accuracy.standard_error,
            samples=accuracy.n,
            params=sizes.params_before,
            macs=sizes.macs_before,
        )
        page = RunReport(
            title=f"Sensitivity of {model}",
            command=command_line(),
            created=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            stages=(stage,),
            versions=environment(),
            sensitivity=found.to_dict(),
        )
        console.print(f"report: {write_report(page, report)}", soft_wrap=True)


def parse_numbers(text: str) -> tuple[float, ...]:
    """Numbers between commas.

    Raises:
        InvalidArgumentError: One of them is no number.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InvalidArgumentError(
            f"--ratios: expected numbers between commas, like 0.25,0.5, got {text!r}"
        ) from error


def curve_table(found: Sensitivity) -> Table:
    """Accuracy in percent, or output error, at each ratio; compensated behind a slash."""
    labelled = found.accuracy is not None
    title = f"Accuracy in % ({100 * (found.accuracy or 0):.1f} uncut)" if labelled else "Error"
    table = Table(
        title=f"{title} with one group cut, {found.samples} images",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
    )
    table.add_column("group", no_wrap=True)
    table.add_column("width", justify="right")
    for ratio in found.ratios:
        table.add_column(f"-{100 * ratio:g} %", justify="right", no_wrap=True)
    names = told_apart([(curve.group, curve.kind) for curve in found.curves])
    for name, curve in zip(names, found.curves, strict=True):
        cells = []
        for point in range(len(found.ratios)):
            parts = [
                f"{100 * c.accuracy[point]:.1f}" if c.accuracy else f"{c.error[point]:.4f}"
                for c in (curve, curve.compensated)
                if c is not None
            ]
            cells.append(" / ".join(parts))
        table.add_row(name, str(curve.width), *cells)
    return table

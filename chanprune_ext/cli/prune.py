"""``chanprune prune``: a trained model in, a smaller one out."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from chanprune_ext.allocation import Budget
from chanprune_ext.atomic_files import make_folder
from chanprune_ext.checkpoint import save
from chanprune_ext.cli.image_options import PresetName, TestData, open_images
from chanprune_ext.cli.loading import load_model
from chanprune_ext.cli.model_spec import parse_arguments, parse_ratios, parse_shape
from chanprune_ext.cli.options import (
    ClassFile,
    Data,
    Device,
    InputShape,
    ModelArguments,
    ModelSpec,
    OutFile,
    Seed,
    Weights,
)
from chanprune_ext.compensation import compensate
from chanprune_ext.data import calibration_batches
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.pruning import plan
from chanprune_ext.quantities import format_accuracy
from chanprune_ext.recovery import evaluate

__all__ = ["prune"]


class CriterionName(str, Enum):
    """Criteria that need nothing but the weights."""

    L1 = "l1"
    L2 = "l2"
    LINF = "linf"
    BN_SCALE = "bn_scale"
    FPGM = "fpgm"
    RANDOM = "random"


class Scope(str, Enum):
    """Where channels compete with each other."""

    LOCAL = "local"
    GLOBAL = "global"


def prune(
    model: ModelSpec,
    out: OutFile,
    weights: Weights = None,
    model_arg: ModelArguments = None,
    ratio: Annotated[
        float | None, typer.Option(help="Share of every group's channels to remove, in [0, 1).")
    ] = None,
    ratios: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB=RATIO",
            help="Ratio of the groups that a module name matching GLOB produces; may be repeated. "
            "Other groups get --ratio, here 0 by default, or what a budget still asks for.",
            show_default=False,
        ),
    ] = None,
    criterion: Annotated[
        CriterionName, typer.Option(help="What makes a channel important.")
    ] = CriterionName.L1,
    scope: Annotated[
        Scope, typer.Option(help="Rank channels within each group, or all against all.")
    ] = Scope.LOCAL,
    macs: Annotated[
        float | None,
        typer.Option(help="Budget: share of the multiply-accumulates to keep.", show_default=False),
    ] = None,
    params: Annotated[
        float | None,
        typer.Option(help="Budget: share of the parameters to keep.", show_default=False),
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option(
            help="Budget: share of the measured time of a forward to keep, on this device with "
            "--input-shape as the shape that is timed.",
            show_default=False,
        ),
    ] = None,
    file_size: Annotated[
        float | None,
        typer.Option(help="Budget: share of the saved file's bytes to keep.", show_default=False),
    ] = None,
    round_to: Annotated[int, typer.Option(min=1, help="Keep widths multiples of this.")] = 1,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Modules whose channels all stay; may be repeated.",
            show_default=False,
        ),
    ] = None,
    input_shape: InputShape = None,
    data: Data = None,
    class_file: ClassFile = None,
    test_data: TestData = None,
    preset: PresetName = None,
    calibration_images: Annotated[
        int, typer.Option(min=0, help="Unlabelled images for compensation; 0 leaves it out.")
    ] = 512,
    plan_out: Annotated[
        Path | None, typer.Option(help="Also write the plan, as JSON.", show_default=False)
    ] = None,
    check_numbers: Annotated[
        bool,
        typer.Option("--check-numbers", help="Compare with the zeroed original in float64."),
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Removes channels; with --data also compensates, and measures accuracy before and after."""
    console = Console()
    network = load_model(model, model_arg, weights, device)
    place = next(network.parameters()).device
    images = None
    if test_data is not None or data is not None:
        images = open_images(test_data or data or "", "test", class_file, preset)
    if input_shape is not None:
        shape = parse_shape(input_shape)
    elif images is not None:
        shape = (1, *images.shape)
    else:
        raise InvalidArgumentError(
            "--input-shape: needed without --data; give the shape of one input, like 1,3,224,224"
        )
    fractions = (macs, params, latency, file_size)
    budget = None if fractions == (None,) * 4 else Budget(*fractions)
    for folder in {path.parent for path in (out, plan_out) if path is not None}:
        make_folder(folder)
    made = plan(
        network,
        torch.zeros(shape, device=place),
        0.0 if ratios and ratio is None and budget is None else ratio,
        ratios=parse_ratios(ratios or ()),
        criterion=criterion.value,
        scope=scope.value,
        budget=budget,
        round_to=round_to,
        ignore=ignore or (),
        seed=seed,
    )
    console.print(str(made), markup=False, highlight=False, soft_wrap=True)
    pruned = made.apply(network, verify="numeric" if check_numbers else "replay")
    if images is not None:
        console.print(f"original:    {measured(network, images)}")
        console.print(f"pruned:      {measured(pruned, images)}")
        if calibration_images and data is not None:
            training = open_images(data, "train", class_file, preset)
            batches = calibration_batches(training, calibration_images, seed=seed)
            compensate(pruned, network, [batch.to(place) for batch in batches])
            console.print(f"compensated: {measured(pruned, images)}")
    built_from = {"model": model, "arguments": parse_arguments(model_arg or ())}
    save(pruned, out, built_from=built_from)
    console.print(f"model: {out}", soft_wrap=True)
    if plan_out is not None:
        made.save(plan_out)
        console.print(f"plan: {plan_out}", soft_wrap=True)


def measured(model: torch.nn.Module, images: torch.utils.data.Dataset) -> str:  # type: ignore[type-arg]
    """Top-1 accuracy as people read it."""
    found = evaluate(model, images)
    return f"top-1 {format_accuracy(found.top1, found.standard_error)} (n = {found.n:,})"

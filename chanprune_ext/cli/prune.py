"""``chanprune prune``: a trained model in, a smaller one out."""

import contextlib
import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from chanprune_ext.allocation import Budget
from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.atomic_files import check_writable, write_text
from chanprune_ext.checkpoint import save
from chanprune_ext.cli.calibration import CriterionName, criterion_of, images_to_draw
from chanprune_ext.cli.example_inputs import example_inputs
from chanprune_ext.cli.image_options import (
    CropMode,
    CropModeName,
    ImageSize,
    PresetName,
    Resize,
    TestData,
    images_that_fit,
    open_images,
)
from chanprune_ext.cli.loading import load_model, model_arguments
from chanprune_ext.cli.model_spec import parse_channels, parse_ratios
from chanprune_ext.cli.options import (
    ClassFile,
    Data,
    Device,
    ExampleInputs,
    JsonOut,
    ModelArguments,
    ModelSpec,
    OutFile,
    Seed,
    Weights,
)
from chanprune_ext.cli.saved_model import built_from
from chanprune_ext.cli.terminal import plain_console
from chanprune_ext.compensation import compensate
from chanprune_ext.data import calibration_batches
from chanprune_ext.data.opening import classes_of_test
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.plan import PruningPlan
from chanprune_ext.pruning import plan
from chanprune_ext.quantities import format_accuracy
from chanprune_ext.recovery import Evaluation, evaluate
from chanprune_ext.recovery.evaluation import device_of
from chanprune_ext.report import environment

__all__ = ["prune"]


class Scope(str, Enum):
    """Where channels compete with each other."""

    LOCAL = "local"
    ISOMORPHIC = "isomorphic"
    GLOBAL = "global"


class Normalisation(str, Enum):
    """What makes scores of groups that compete comparable."""

    MEAN = "mean"
    MAX = "max"
    L2 = "l2"
    LAMP = "lamp"
    NONE = "none"


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
        CriterionName,
        typer.Option(
            help="What makes a channel important; from elimination on judged by the training "
            "images of --data."
        ),
    ] = CriterionName.L1,
    scope: Annotated[
        Scope,
        typer.Option(
            help="Rank channels within each group, with those of groups of the same build, or all "
            "against all."
        ),
    ] = Scope.LOCAL,
    normalise: Annotated[
        Normalisation | None,
        typer.Option(
            help="How scores of groups that compete are made comparable. Default: by their mean, "
            "and not at all after elimination.",
            show_default=False,
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Remove every channel whose score is below this, instead of a ratio or budget.",
            show_default=False,
        ),
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE=I,I,...",
            help="Remove just these output channels of a module, and what hangs together with "
            "them; may be repeated.",
            show_default=False,
        ),
    ] = None,
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
            "--input as the shape that is timed.",
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
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help="Prune only groups of this kind: heads, head_dim, residual, mlp or hidden; may be "
            "repeated.",
            show_default="all",
        ),
    ] = None,
    shapes: ExampleInputs = None,
    data: Data = None,
    class_file: ClassFile = None,
    test_data: TestData = None,
    preset: PresetName = None,
    image_size: ImageSize = None,
    resize: Resize = None,
    crop_mode: CropModeName = None,
    calibration_images: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Training images for compensation, unlabelled; 0 leaves it out.",
            show_default="512, or all there are",
        ),
    ] = None,
    plan_out: Annotated[
        Path | None, typer.Option(help="Also write the plan, as JSON.", show_default=False)
    ] = None,
    json_out: JsonOut = None,
    check_numbers: Annotated[
        bool,
        typer.Option("--check-numbers", help="Compare with the zeroed original in float64."),
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Removes channels; with --data also compensates, and measures accuracy before and after."""
    console = plain_console()
    arguments = model_arguments(model, model_arg, weights)
    network = load_model(model, arguments, weights, device)
    place = device_of(network)
    looks = (class_file, preset, image_size, resize, crop_mode)
    if data is None and test_data is None:
        _refuse_without_images(*looks)
    inputs = example_inputs(model, network, shapes) if shapes else None
    shape = None if inputs is None else tuple(tensors_in(inputs)[0].shape[1:])
    test = training = None
    if test_data is not None or data is not None:
        classes = classes_of_test(data, test_data, class_file)
        test = open_images(test_data or data or "", "test", classes, *looks[1:], like=shape)
        shape = test.shape
    drawn = 0
    if data is None and calibration_images:
        raise InvalidArgumentError("--calibration-images: needs --data to draw them from")
    if data is not None and calibration_images != 0:
        training = open_images(data, "train", *looks, like=shape)
        drawn = images_to_draw(calibration_images, training, "--calibration-images")
    if inputs is None and test is not None:
        inputs = torch.zeros(1, *test.shape, device=place)
    elif inputs is None:
        inputs = example_inputs(model, network, ())
    for path in (out, plan_out, json_out):
        if path is not None:
            check_writable(path)
    fractions = (macs, params, latency, file_size)
    budget = None if fractions == (None,) * 4 else Budget(*fractions)
    rest_stays = ratios and (ratio, threshold, budget) == (None,) * 3
    fitting: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if test is not None:
        fitting = images_that_fit(network, model, test, test_data or data or "")
    with fitting:
        made = plan(
            network,
            inputs,
            0.0 if rest_stays else ratio,
            ratios=parse_ratios(ratios or ()),
            criterion=criterion_of(criterion, training, drawn, seed),
            scope=scope.value,
            normalise=None if normalise is None else normalise.value,
            threshold=threshold,
            budget=budget,
            remove=parse_channels(remove) if remove else None,
            round_to=round_to,
            ignore=ignore or (),
            kinds=kinds,
            seed=seed,
        )
    console.print(str(made), highlight=False, soft_wrap=True)
    pruned = made.apply(network, verify="numeric" if check_numbers else "replay")
    found: dict[str, Evaluation] = {}
    if test is not None:
        found["original"] = measured("original", network, test)
        found["pruned"] = measured("pruned", pruned, test)
        if training is not None:
            batches = calibration_batches(training, drawn, seed=seed)
            compensate(pruned, network, [batch.to(place) for batch in batches])
            found["compensated"] = measured("compensated", pruned, test)
    save(pruned, out, built_from=built_from(model, arguments))
    console.print(f"model: {out}", soft_wrap=True)
    if plan_out is not None:
        made.save(plan_out)
        console.print(f"plan: {plan_out}", soft_wrap=True)
    if json_out is not None:
        facts = {"model": model, "file": out.name, "environment": environment()}
        text = json.dumps({**facts, **record(made, found)}, indent=1)
        write_text(json_out, text + "\n")
        console.print(f"json: {json_out}", soft_wrap=True)


def _refuse_without_images(
    class_file: Path | None,
    preset: str | None,
    image_size: int | None,
    resize: int | None,
    crop_mode: CropMode | None,
) -> None:
    """Says so where options tell how to read images, and there are none."""
    given = {
        "--preset": preset,
        "--image-size": image_size,
        "--resize": resize,
        "--crop-mode": crop_mode,
        "--class-file": class_file,
    }
    for option, value in given.items():
        if value is not None:
            raise InvalidArgumentError(
                f"{option}: says how to read the images of --data, which is not there; the shape "
                "that the model is analysed with is --input (1x3x224x224, say)"
            )


def measured(
    stage: str,
    model: torch.nn.Module,
    images: torch.utils.data.Dataset,  # type: ignore[type-arg]
) -> Evaluation:
    """Accuracy, and a line that tells it."""
    found = evaluate(model, images)
    top1 = format_accuracy(found.top1, found.standard_error)
    plain_console().print(f"{stage + ':':<12} top-1 {top1} (n = {found.n:,})")
    return found


def record(made: PruningPlan, found: dict[str, Evaluation]) -> dict[str, Any]:
    """What was removed, and the accuracy of every stage, as plain numbers."""
    return {
        "params": [made.params_before, made.params_after],
        "macs": [made.macs_before, made.macs_after],
        "criterion": made.criterion,
        "options": dict(made.options),
        "groups": [asdict(group) for group in made.groups],
        "accuracy": {
            stage: {**asdict(accuracy), "standard_error": accuracy.standard_error}
            for stage, accuracy in found.items()
        },
    }

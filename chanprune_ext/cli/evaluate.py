"""``chanprune evaluate``: accuracy of a model on labelled images."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from chanprune_ext.atomic_files import check_writable, write_text
from chanprune_ext.cli.image_options import (
    CropModeName,
    ImageSize,
    PresetName,
    Resize,
    images_that_fit,
    open_images,
    warn_of_missing_classes,
)
from chanprune_ext.cli.loading import load_model, model_arguments, place
from chanprune_ext.cli.options import (
    DATA_HELP,
    BatchSize,
    ClassFile,
    Device,
    JsonOut,
    ModelArguments,
    ModelSpec,
    Weights,
)
from chanprune_ext.cli.tables import facts_table
from chanprune_ext.cli.terminal import plain_console
from chanprune_ext.quantities import format_accuracy
from chanprune_ext.recovery import evaluate as measure
from chanprune_ext.report import environment

__all__ = ["evaluate"]


def evaluate(
    model: ModelSpec,
    data: Annotated[str, typer.Option(help=DATA_HELP, show_default=False)],
    weights: Weights = None,
    model_arg: ModelArguments = None,
    split: Annotated[str, typer.Option(help="Which images: test, val or train.")] = "test",
    class_file: ClassFile = None,
    preset: PresetName = None,
    image_size: ImageSize = None,
    resize: Resize = None,
    crop_mode: CropModeName = None,
    batch_size: BatchSize = 128,
    json_out: JsonOut = None,
    device: Device = "auto",
) -> None:
    """Measures top-1 and top-5 accuracy, with sample size and standard error."""
    console = plain_console()
    if json_out is not None:
        check_writable(json_out)
    arguments = model_arguments(model, model_arg, weights)
    network = load_model(model, arguments, weights, device)
    images = open_images(data, split, class_file, preset, image_size, resize, crop_mode)
    with images_that_fit(network, model, images, data):
        found = measure(network, images, batch_size=batch_size, device=place(device))
    warn_of_missing_classes(network, images, class_file)
    facts = {
        "top-1": format_accuracy(found.top1, found.standard_error),
        "top-5": format_accuracy(found.top5),
        "loss": f"{found.loss:.4f}",
        "images": f"{found.n:,}",
    }
    console.print(facts_table(facts))
    if json_out is not None:
        record = {
            "model": model,
            "weights": None if weights is None else weights.name,
            "data": data,
            "split": split,
            "environment": environment(),
            **asdict(found),
            "standard_error": found.standard_error,
        }
        write_text(json_out, json.dumps(record, indent=1) + "\n")
        console.print(f"json: {json_out}", soft_wrap=True)

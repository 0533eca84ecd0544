"""``chanprune evaluate``: accuracy of a model on labelled images."""

from typing import Annotated

import typer
from rich.console import Console

from chanprune_ext.cli.image_options import ImageSize, PresetName, Resize, open_images
from chanprune_ext.cli.loading import load_model, place
from chanprune_ext.cli.options import (
    DATA_HELP,
    BatchSize,
    ClassFile,
    Device,
    ModelArguments,
    ModelSpec,
    Weights,
)
from chanprune_ext.cli.tables import facts_table
from chanprune_ext.quantities import format_accuracy
from chanprune_ext.recovery import evaluate as measure

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
    batch_size: BatchSize = 128,
    device: Device = "auto",
) -> None:
    """Measures top-1 and top-5 accuracy, with sample size and standard error."""
    network = load_model(model, model_arg, weights, device)
    images = open_images(data, split, class_file, preset, image_size, resize)
    found = measure(network, images, batch_size=batch_size, device=place(device))
    facts = {
        "top-1": format_accuracy(found.top1, found.standard_error),
        "top-5": format_accuracy(found.top5),
        "loss": f"{found.loss:.4f}",
        "images": f"{found.n:,}",
    }
    Console().print(facts_table(facts))

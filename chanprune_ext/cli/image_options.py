"""Options of the commands that train on images: where the test images are, sizes, augmentation."""

from __future__ import annotations

import contextlib
import warnings
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from torch import nn

from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.cli.example_inputs import example_inputs
from chanprune_ext.data import Augmentation, Preset, open_dataset
from chanprune_ext.data.opening import takes_size
from chanprune_ext.errors import AnalysisError, ChanpruneError, InvalidArgumentError
from chanprune_ext.module_modes import evaluating
from chanprune_ext.plan import plans_of
from chanprune_ext.plan_inputs import inputs_from
from chanprune_ext.recovery.evaluation import device_of
from chanprune_ext.recovery.outputs import input_dtype, logits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from chanprune_ext.data import ImageDataset
    from chanprune_ext.data.class_names import ClassFile

__all__ = [
    "AutoAugment",
    "AutoAugmentation",
    "CropMode",
    "CropModeName",
    "ImageSize",
    "Magnitude",
    "PresetName",
    "RandomErasing",
    "Repeats",
    "Resize",
    "TestData",
    "images_that_fit",
    "open_images",
    "open_training_images",
    "warn_of_missing_classes",
]


class AutoAugment(str, Enum):
    """Automatic augmentations that torchvision has."""

    RANDAUGMENT = "randaugment"
    TRIVIALAUGMENT = "trivialaugment"


class CropMode(str, Enum):
    """How an oblong image becomes a square."""

    CENTER = "center"
    SQUASH = "squash"


TestData = Annotated[
    str | None,
    typer.Option(
        help="Test images, where --data holds none; in the same forms.", show_default=False
    ),
]
PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="WEIGHTS",
        help="Size, crop and normalisation of images as published weights expect them: "
        "ResNet50_Weights.IMAGENET1K_V2 or timm:<model>, say.",
        show_default="square images of up to 64 pixels as they are, else 224; ImageNet's mean and "
        "deviation (0.5 where there are not three channels, digits their own)",
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Edge of the images that the model sees; for folders, archives and shards.",
        show_default="as --preset says",
    ),
]
Resize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Shorter side of a test image before its centre is cut out.",
        show_default="as --preset says, or size x 256/224",
    ),
]
CropModeName = Annotated[
    CropMode | None,
    typer.Option(
        help="Of a test image keep the proportions and lose what is beside its centre, or squash "
        "it to a square.",
        show_default="as --preset says, or center",
    ),
]
AutoAugmentation = Annotated[
    AutoAugment | None,
    typer.Option("--auto-augment", help="Change colours, shear and so on.", show_default=False),
]
Magnitude = Annotated[int, typer.Option(min=0, max=30, help="Strength of RandAugment.")]
RandomErasing = Annotated[
    float,
    typer.Option(min=0, max=1, help="Share of images of which a rectangle is erased."),
]
Repeats = Annotated[
    int, typer.Option(min=1, help="Repeated augmentation: views of an image in a batch.")
]


def open_images(
    data: str,
    split: str,
    class_file: ClassFile | None,
    preset: str | None = None,
    size: int | None = None,
    resize: int | None = None,
    crop_mode: CropMode | None = None,
    *,
    like: tuple[int, ...] | None = None,
) -> ImageDataset:
    """An image set without augmentation, as the weights expect it.

    Args:
        data: The set.
        split: Which images.
        class_file: Names of the classes.
        preset: What the weights expect.
        size: Edge of the images.
        resize: Shorter side before the centre is cut out.
        crop_mode: How an oblong image becomes a square.
        like: Shape of one input that a model is analysed with, without the batch: images are
            scaled to it, where no size is asked for. Default: None, whatever the images are.

    Raises:
        InvalidArgumentError: The images have another shape than ``like``.
    """
    free = size is None and preset is None and takes_size(data)
    if like is not None and free and len(like) == 3 and like[1] == like[2]:
        size = like[1]
    looks = None if preset is None else Preset.of(preset)
    images = open_dataset(
        data,
        split,
        class_file=class_file,
        preset=looks,
        size=size,
        resize=resize,
        crop_mode=None if crop_mode is None else crop_mode.value,
    )
    if like is not None and images.shape != like:
        raise InvalidArgumentError(
            f"--data: expected images of {size_text(like)}, as --input or the test images have it, "
            f"but those of {data!r} are {size_text(images.shape)}; leave --input out, or let "
            "--image-size agree with it"
        )
    return images


def size_text(shape: Sequence[int]) -> str:
    """A shape as the options take it: ``3x224x224``."""
    return "x".join(map(str, shape))


@contextlib.contextmanager
def images_that_fit(model: nn.Module, spec: str, images: ImageDataset, data: str) -> Iterator[None]:
    """Where a model fails on images, says so if their size is the reason.

    Args:
        model: What runs on them.
        spec: What it was built from.
        images: The images.
        data: Where they come from.

    Raises:
        InvalidArgumentError: It does not run on a single one of them.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ChanpruneError) and not isinstance(error, AnalysisError):
            raise
        reason = _refusal(model, images.shape)
        if reason is None:
            raise  # of something else
        expected = _expected_size(model, spec)
        expected = None if expected == images.shape else expected
        advice = "--model-arg says what model it is"
        if takes_size(data):
            advice = f"--image-size scales images, {advice}"
        raise InvalidArgumentError(
            f"--data: the model does not run on images of {size_text(images.shape)}"
            + (f", expected {size_text(expected)}" if expected else "")
            + f" ({reason}); {advice}"
        ) from error


def _refusal(model: nn.Module, shape: tuple[int, ...]) -> str | None:
    """Why a model does not run on an image of a shape, in a line; None if it does."""
    sample = torch.zeros(1, *shape, dtype=input_dtype(model), device=device_of(model))
    try:
        with evaluating(model), torch.no_grad():
            model(sample)
    except Exception as error:  # noqa: BLE001 - whatever a model raises
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


def _expected_size(model: nn.Module, spec: str) -> tuple[int, ...] | None:
    """The images that a model was pruned with, or that are usual for it; None where unknown."""
    plans = plans_of(model)
    try:
        inputs = inputs_from(plans[0].inputs) if plans else example_inputs(spec, model, ())
    except InvalidArgumentError:
        return None
    shape = tuple(tensors_in(inputs)[0].shape[1:])
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    return (layers[0].in_channels, *shape[1:]) if layers and len(shape) == 3 else None


def warn_of_missing_classes(
    model: nn.Module, images: ImageDataset, class_file: Path | None
) -> None:
    """Warns where folders gave fewer labels than a model has classes: some may be shifted."""
    numbered = images.class_names == tuple(str(label) for label in range(images.num_classes))
    if class_file is not None or numbered:
        return
    sample = torch.zeros(1, *images.shape, dtype=input_dtype(model), device=device_of(model))
    with evaluating(model), torch.no_grad():
        outputs = logits(model, sample).shape[1]
    if images.num_classes < outputs:
        warnings.warn(
            f"the model has {outputs} classes, the images {images.num_classes}: labels follow the "
            "sorted names of the classes that are there, so those behind a missing one are wrong; "
            "name all of the model's with --class-file",
            stacklevel=2,
        )


def open_training_images(
    data: str,
    class_file: Path | None,
    preset: str | None,
    size: int | None,
    augmentation: Augmentation,
    seed: int,
) -> ImageDataset:
    """The training images of a set, augmented."""
    looks = None if preset is None else Preset.of(preset)
    return open_dataset(
        data,
        "train",
        augment=augmentation,
        class_file=class_file,
        preset=looks,
        size=size,
        seed=seed,
    )

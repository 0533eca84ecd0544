"""Options of the commands that train on images: where the test images are, sizes, augmentation."""

from __future__ import annotations

import warnings
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from chanprune_ext.data import Augmentation, Preset, open_dataset
from chanprune_ext.data.opening import class_folders, takes_size
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.module_modes import evaluating
from chanprune_ext.recovery.evaluation import device_of
from chanprune_ext.recovery.outputs import input_dtype, logits

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from chanprune_ext.data import ImageDataset
    from chanprune_ext.data.class_names import ClassFile

__all__ = [
    "AutoAugment",
    "AutoAugmentation",
    "ImageSize",
    "Magnitude",
    "PresetName",
    "RandomErasing",
    "Repeats",
    "Resize",
    "TestData",
    "classes_of_test",
    "open_images",
    "open_images_like",
    "open_training_images",
    "warn_of_missing_classes",
]


class AutoAugment(str, Enum):
    """Automatic augmentations that torchvision has."""

    RANDAUGMENT = "randaugment"
    TRIVIALAUGMENT = "trivialaugment"


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


def classes_of_test(
    data: str | None, test_data: str | None, class_file: Path | None
) -> ClassFile | None:
    """What names the classes of the test images: the class file, or the training images' folders.

    Test images elsewhere may lack a class, and would be labelled without it.
    """
    if class_file is not None or data is None or test_data is None or not takes_size(test_data):
        return class_file
    return class_folders(data)


def open_images(
    data: str,
    split: str,
    class_file: ClassFile | None,
    preset: str | None = None,
    size: int | None = None,
    resize: int | None = None,
) -> ImageDataset:
    """An image set without augmentation, as the weights expect it."""
    looks = None if preset is None else Preset.of(preset)
    return open_dataset(data, split, class_file=class_file, preset=looks, size=size, resize=resize)


def open_images_like(
    shape: tuple[int, ...] | None,
    data: str,
    split: str,
    class_file: ClassFile | None,
    preset: str | None = None,
    size: int | None = None,
    resize: int | None = None,
) -> ImageDataset:
    """An image set of what a model is analysed with: scaled to it, where no size is asked for.

    Args:
        shape: Of one input, without the batch; None for whatever the images are.
        data: The set, and all that follows, as for :func:`open_images`.
        split: Which images.
        class_file: Names of the classes.
        preset: What the weights expect.
        size: Edge of the images.
        resize: Shorter side before the centre is cut out.

    Raises:
        InvalidArgumentError: The images have another shape.
    """
    free = size is None and preset is None and takes_size(data)
    if shape is not None and free and len(shape) == 3 and shape[1] == shape[2]:
        size = shape[1]
    images = open_images(data, split, class_file, preset, size, resize)
    if shape is not None and images.shape != shape:
        found, expected = ("x".join(map(str, numbers)) for numbers in (images.shape, shape))
        raise InvalidArgumentError(
            f"--data: expected images of {expected}, as --input or the test images have it, but "
            f"those of {data!r} are {found}; leave --input out, or let --image-size agree with it"
        )
    return images


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

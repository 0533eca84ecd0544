"""Options of the commands that train on images: where the test images are, sizes, augmentation."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from chanprune_ext.data import Augmentation, Preset, open_dataset

if TYPE_CHECKING:
    from pathlib import Path

    from chanprune_ext.data import ImageDataset

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
    "open_images",
    "open_training_images",
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
        show_default="224 pixels and ImageNet's",
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        min=1, help="Edge of the images that the model sees.", show_default="as --preset says"
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


def open_images(
    data: str,
    split: str,
    class_file: Path | None,
    preset: str | None = None,
    size: int | None = None,
    resize: int | None = None,
) -> ImageDataset:
    """An image set without augmentation, as the weights expect it."""
    looks = None if preset is None else Preset.of(preset)
    return open_dataset(data, split, class_file=class_file, preset=looks, size=size, resize=resize)


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

"""Arguments and options that several commands share, each written once."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "BatchSize",
    "ClassFile",
    "Data",
    "Device",
    "ExampleInputs",
    "InputShapes",
    "JsonOut",
    "ModelArguments",
    "ModelSpec",
    "OutFile",
    "OutFolder",
    "PlainModel",
    "Precision",
    "SavedFile",
    "Seed",
    "Weights",
]

DATA_HELP = (
    "A .npz file, a folder or tar archive of images in one folder a class, tar shards "
    "('train-{0000..0127}.tar', or a folder of them), 'cifar10:<root>', or 'digits'."
)


class Precision(str, Enum):
    """Arithmetic of the training."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


ModelSpec = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="resnet20 to resnet110 (CIFAR), torchvision:<name>, timm:<name>, hf:<type or "
        "repository>, or <module>:<callable>.",
        show_default=False,
    ),
]
ModelArguments = Annotated[
    list[str] | None,
    typer.Option(
        "--model-arg",
        metavar="NAME=VALUE",
        help="Argument of the model's constructor; may be repeated.",
        show_default="as a file of the same model says",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="Trained weights: a state dict as .safetensors or .pt, or a file that 'prune' wrote.",
        show_default=False,
    ),
]
Data = Annotated[str | None, typer.Option(help=DATA_HELP, show_default=False)]
ExampleInputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        "--input-shape",
        metavar="SHAPE[:DTYPE]",
        help="Shape of an input, like 1x3x224x224 or 1x16:int64; once for each input. Default: "
        "that of the images of --data, or what is usual for a model named by a package.",
        show_default=False,
    ),
]
InputShapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE[:DTYPE]",
        help="Shape of an input, like 1x3x224x224 or 1x16:int64; once for each input. Default: "
        "what the plan in the file was made with.",
        show_default=False,
    ),
]
JsonOut = Annotated[
    Path | None,
    typer.Option("--json", help="Also write the findings, as JSON.", show_default=False),
]
PlainModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="What FILE was pruned from: resnet56, torchvision:<name>, timm:<name>, hf:<type>, or "
        "<module>:<callable>. Default: as the file says.",
        show_default=False,
    ),
]
SavedFile = Annotated[
    Path,
    typer.Argument(metavar="FILE", help="A model as 'prune' wrote it.", show_default=False),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per batch.")]
Device = Annotated[
    str, typer.Option(help="Where to run: 'cpu', 'cuda', 'cuda:1', or 'auto' for a GPU if any.")
]
ClassFile = Annotated[
    Path | None,
    typer.Option(
        help="Text file with one class folder name a line, in label order; 'imagenet' for the "
        "1,000 ids of ILSVRC 2012.",
        show_default=False,
    ),
]
OutFolder = Annotated[Path, typer.Option(help="Folder for the results; made where missing.")]
OutFile = Annotated[
    Path,
    typer.Option(help="Where the model goes, as one .safetensors file.", show_default=False),
]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn at random.")]

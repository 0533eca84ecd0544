"""``chanprune reproduce``: measures a published result again."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from chanprune_ext.cli.options import DATA_HELP, Seed
from chanprune_ext.cli.run_printing import run_and_print

__all__ = ["reproduce"]


class Result(str, Enum):
    """Results that can be measured again."""

    CIFAR10_RESNET56 = "cifar10-resnet56"


def reproduce(
    result: Annotated[Result, typer.Argument(help="Which result.", show_default=False)],
    weights: Annotated[Path, typer.Option(help="Trained weights.", show_default=False)],
    data: Annotated[str, typer.Option(help=DATA_HELP, show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results [default: runs/<result>]")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of distillation.")] = 10,
    calibration_images: Annotated[int, typer.Option(min=1, help="Unlabelled images.")] = 512,
    seed: Seed = 0,
) -> None:
    """Prunes, compensates and distils a published network, and prints every step's accuracy."""
    from chanprune_ext.demo import cifar10_resnet56_job

    job = cifar10_resnet56_job(
        weights,
        data,
        recover_epochs=epochs,
        calibration_images=calibration_images,
        seed=seed,
    )
    run_and_print(job, out or Path("runs") / result.value)

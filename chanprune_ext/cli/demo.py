"""``chanprune demo``: the whole way on a small network and real images, in a few minutes."""

from pathlib import Path
from typing import Annotated

import typer

from chanprune_ext.cli.options import OutFolder, Seed
from chanprune_ext.cli.run_printing import run_and_print, say

__all__ = ["demo"]


def demo(
    out: OutFolder = Path("runs/demo"),
    train_epochs: Annotated[int, typer.Option(min=1, help="Epochs of training first.")] = 20,
    recover_epochs: Annotated[int, typer.Option(min=1, help="Epochs of distillation.")] = 10,
    seed: Seed = 0,
) -> None:
    """Trains a ResNet-20 on handwritten digits, halves it, and gives the accuracy back."""
    import torch

    from chanprune_ext.jobs.demo import digits_job

    # Images of 8x8 pixels keep one core busy at most; on a machine that does other work too, more
    # threads wait for each other and take many times as long.
    torch.set_num_threads(1)
    say(f"training a ResNet-20 on handwritten digits, {train_epochs} epochs")
    job = digits_job(train_epochs=train_epochs, recover_epochs=recover_epochs, seed=seed)
    run_and_print(job, out)

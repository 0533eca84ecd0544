"""The job of the demo: half of a small network, trained on the digits of scikit-learn."""

from __future__ import annotations

from typing import Any

import torch

from chanprune_ext.data import calibration_batches, open_dataset
from chanprune_ext.models import resnet20
from chanprune_ext.recovery import recover

from .pipeline import Job

__all__ = ["digits_job"]


def digits_job(
    *, train_epochs: int = 20, recover_epochs: int = 10, seed: int = 0, progress: bool = True
) -> Job:
    """Trains a ResNet-20 on scikit-learn's handwritten digits; returns the job of halving it.

    Args:
        train_epochs: Epochs of training from scratch.
        recover_epochs: Epochs of distillation after pruning.
        seed: Seed of weights, order, augmentation and calibration images.
        progress: Draw progress bars.
    """
    train = open_dataset("digits", "train", augment=True, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = resnet20(in_channels=train.shape[0])
    common: dict[str, Any] = {"batch_size": 64, "seed": seed, "progress": progress}
    warmup = min(1.0, train_epochs / 2)  # of a single epoch, half
    recover(model, train=train, epochs=train_epochs, lr=0.1, warmup=warmup, **common)
    return Job(
        title="ResNet-20 on handwritten digits, half of all channels",
        model=model,
        built_from={"model": "resnet20", "arguments": {"in_channels": train.shape[0]}},
        train=train,
        test=open_dataset("digits", "test"),
        calibration=calibration_batches(train, 512, seed=seed),
        plan_options={"ratio": 0.5, "criterion": "l1"},
        recover_options={"epochs": recover_epochs, "lr": 0.02, **common},
        stage_notes=(
            f"trained here, {train_epochs} epochs on {len(train):,} images",
            "half of every group's channels, those of least L1 norm, and nothing else",
            "least squares on 512 unlabelled training images, no gradient step",
            f"{recover_epochs} epochs of distillation from the original",
        ),
        notes=(
            (
                "The digits are the 1,797 images of 8x8 pixels that come with scikit-learn; every "
                "fifth is for the test. They show that each step works, not how hard it is: "
                "see the README for results on CIFAR-10."
            ),
            "Test images are only reported on; no weights and no epoch are chosen by them.",
        ),
    )

"""The jobs that come with the package: the demo on digits, and the published CIFAR-10 result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from chanprune_ext.checkpoint import load_weights
from chanprune_ext.data import calibration_batches, open_dataset
from chanprune_ext.models import resnet20, resnet56
from chanprune_ext.pipeline import Job
from chanprune_ext.published import inner_channels_within
from chanprune_ext.recovery import recover
from chanprune_ext.references import RESNET56_CIFAR10
from chanprune_ext.selection import Budget

if TYPE_CHECKING:
    import os

__all__ = ["cifar10_resnet56_job", "digits_job"]


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
    recover(model, train=train, epochs=train_epochs, lr=0.1, warmup=1.0, **common)
    return Job(
        title="ResNet-20 on handwritten digits, half of all channels",
        model=model,
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


def cifar10_resnet56_job(
    weights: str | os.PathLike[str],
    data: str,
    *,
    recover_epochs: int = 10,
    calibration_images: int = 512,
    seed: int = 0,
    progress: bool = True,
) -> Job:
    """The published result: a ResNet-56 with half of its multiply-accumulates.

    Inner channels of the blocks go by elimination, from all blocks by what they cost and save; the
    rest is compensated, then fine-tuned on the labels, and distilled without them. Batch norms keep
    their statistics meanwhile: the compensated network is close to the original already.

    Args:
        weights: State dict of a ResNet-56 trained on CIFAR-10.
        data: CIFAR-10 as :func:`chanprune_ext.data.open_dataset` takes it, raw pixels.
        recover_epochs: Epochs of fine-tuning and of distillation on all training images there.
        calibration_images: Unlabelled training images for elimination and compensation; as many
            blends of two of them are added.
        seed: Seed of order, augmentation and calibration images.
        progress: Draw progress bars.
    """
    model = resnet56()
    load_weights(model, weights)
    train = open_dataset(data, "train", augment=True, seed=seed)
    calibration = calibration_batches(train, calibration_images, seed=seed, mixed=True)
    recovery: dict[str, Any] = {
        "epochs": recover_epochs,
        "lr": 0.001,
        "freeze_batch_norm": True,
        "channels_last": True,  # a fifth less time on CPUs
        "seed": seed,
        "progress": progress,
    }
    return Job(
        title="ResNet-56 on CIFAR-10, half of the multiply-accumulates",
        model=model,
        train=train,
        test=open_dataset(data, "test"),
        calibration=calibration,
        plan_options=inner_channels_within(calibration, Budget(macs=0.5)),
        fine_tune_options=recovery,
        # At a higher temperature the small logits count, which are noise on images the teacher was
        # trained on.
        recover_options={**recovery, "losses": {"kd": 1.0}, "temperature": 1.0},
        stage_notes=(
            "the published weights",
            "inner channels of the blocks, by elimination within the budget, and nothing else",
            f"{calibration_images} unlabelled training images and their blends, no gradient step",
            f"{recover_epochs} epochs on the labels of {len(train):,} images, no teacher",
            f"{recover_epochs} epochs of distillation on {len(train):,} images, no labels",
        ),
        notes=("Test images are only reported on; no weights and no epoch are chosen by them.",),
        references=RESNET56_CIFAR10,
    )

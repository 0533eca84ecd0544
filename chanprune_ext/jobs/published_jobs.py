"""Published results measured again with training: one whole job each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanprune_ext.allocation import Budget
from chanprune_ext.checkpoint import load_weights
from chanprune_ext.data import calibration_batches, open_dataset
from chanprune_ext.elimination import elimination
from chanprune_ext.models import resnet56

from .pipeline import Job
from .published import (
    MILD_CROPS,
    ImageNetImages,
    hidden_channels,
    inner_channels_within,
    trained_mobilenet_v2,
)
from .references import MOBILENETV2_IMAGENET, RESNET56_CIFAR10

if TYPE_CHECKING:
    import os

__all__ = ["cifar10_resnet56_job", "imagenet_mobilenetv2_job"]

# From so many training images on a set counts as whole; CIFAR-10 has 50,000.
_WHOLE_TRAINING_SET = 20_000
# How ResNet-56 is trained on a whole set, and on a part of one. There a higher temperature would
# count the small logits, which are noise on images the teacher was trained on.
_ON_ALL: dict[str, Any] = {"lr": 0.02}
_ON_FEW: dict[str, Any] = {"lr": 0.001, "freeze_batch_norm": True}
_DISTILLED_ON_ALL: dict[str, Any] = {
    "losses": {"kd": 0.9, "hard": 0.1},
    "temperature": 4.0,
    "teacher_flip": True,  # worth 0.3 points, see README.md
}
_DISTILLED_ON_FEW: dict[str, Any] = {"losses": {"kd": 1.0}, "temperature": 1.0}
# Options of :func:`chanprune_ext.recover` for a MobileNetV2 that is close to its teacher already,
# and a thousand images without labels. Twelve epochs at twice the rate, with small crops, end where
# they began.
_MOBILENETV2_DISTILLATION: dict[str, Any] = {
    "epochs": 4,
    "losses": {"kd": 1.0},
    "temperature": 1.0,
    "optimizer": "adamw",
    "lr": 1e-4,
    "weight_decay": 0.0,
    "batch_size": 32,
    "freeze_batch_norm": True,
    "channels_last": True,
}


def cifar10_resnet56_job(
    weights: str | os.PathLike[str],
    data: str,
    *,
    recover_epochs: int = 10,
    calibration_images: int = 512,
    precision: str = "fp32",
    compiled: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Job:
    """The published result: a ResNet-56 with half of its multiply-accumulates.

    Inner channels of the blocks go by elimination, from all blocks by what they cost and save; the
    rest is compensated, then fine-tuned on the labels, and distilled. How depends on the images:
    a whole training set is trained on as usual, with labels beside the teacher, who is asked about
    mirror images too; on a part of one, batch norms keep their statistics, the learning rate is low
    and the teacher speaks alone, for the compensated network is close to it already.

    Args:
        weights: State dict of a ResNet-56 trained on these images.
        data: CIFAR-10 as :func:`chanprune_ext.data.open_dataset` takes it.
        recover_epochs: Epochs of fine-tuning and of distillation on all training images there.
        calibration_images: Unlabelled training images for elimination and compensation; as many
            blends of two of them are added.
        precision: Arithmetic of the training, as in :class:`chanprune_ext.recovery.Recipe`.
        compiled: Run the networks through ``torch.compile`` in the training.
        seed: Seed of order, augmentation and calibration images.
        progress: Draw progress bars.
    """
    model = resnet56()
    load_weights(model, weights)
    train = open_dataset(data, "train", augment=True, seed=seed)
    calibration = calibration_batches(train, calibration_images, seed=seed, mixed=True)
    whole = len(train) >= _WHOLE_TRAINING_SET
    training: dict[str, Any] = {
        **(_ON_ALL if whole else _ON_FEW),
        "epochs": recover_epochs,
        "precision": precision,
        "compile": compiled,
        "channels_last": True,  # a fifth less time on CPUs
        "seed": seed,
        "progress": progress,
    }
    return Job(
        title="ResNet-56 on CIFAR-10, half of the multiply-accumulates",
        model=model,
        built_from={"model": "resnet56", "arguments": {}},
        train=train,
        test=open_dataset(data, "test"),
        calibration=calibration,
        plan_options=inner_channels_within(calibration, Budget(macs=0.5)),
        fine_tune_options=training,
        recover_options={**training, **(_DISTILLED_ON_ALL if whole else _DISTILLED_ON_FEW)},
        stage_notes=(
            "the weights given",
            "inner channels of the blocks, by elimination within the budget, and nothing else",
            f"{calibration_images} unlabelled training images and their blends, no gradient step",
            f"{recover_epochs} epochs on the labels of {len(train):,} images, no teacher",
            f"{recover_epochs} epochs of distillation on {len(train):,} images, "
            + ("labels beside the teacher" if whole else "no labels"),
        ),
        notes=("Test images are only reported on; no weights and no epoch are chosen by them.",),
        references=RESNET56_CIFAR10,
    )


def imagenet_mobilenetv2_job(
    weights: str | os.PathLike[str],
    data: str,
    test_data: str | None,
    class_file: str | os.PathLike[str] | None,
    *,
    recover_epochs: int = 10,
    calibration_images: int = 1000,
    precision: str = "fp32",
    compiled: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Job:
    """The published result: a MobileNetV2 with 30 % fewer hidden channels.

    They go by elimination; the rest is compensated, then fine-tuned on the labels, and distilled
    without them. Batch norms keep their statistics meanwhile.

    Args:
        weights: State dict in torchvision's layout, for images normalised to [-1, 1].
        data: Folder or archive with training images.
        test_data: Folder or archive with validation images. Default: the split of ``data``.
        class_file: Class folder names in label order.
        recover_epochs: Epochs of fine-tuning and of distillation on all training images there.
        calibration_images: Unlabelled training images for everything before.
        precision: Arithmetic of the training, as in :class:`chanprune_ext.recovery.Recipe`.
        compiled: Run the networks through ``torch.compile`` in the training.
        seed: Seed of order, augmentation and calibration images.
        progress: Draw progress bars.
    """
    images = ImageNetImages(data, test_data, class_file)
    train = images.training(augment=MILD_CROPS, seed=seed)
    calibration = calibration_batches(images.training(), calibration_images, seed=seed)
    distillation = {
        **_MOBILENETV2_DISTILLATION,
        "epochs": recover_epochs,
        "precision": precision,
        "compile": compiled,
        "seed": seed,
        "progress": progress,
    }
    return Job(
        title="MobileNetV2 on ImageNet, hidden channels -30 %",
        model=trained_mobilenet_v2(weights),
        built_from={"model": "torchvision:mobilenet_v2", "arguments": {}},
        train=train,
        test=images.test(),
        calibration=calibration,
        plan_options=hidden_channels(0.3, elimination(calibration)),
        fine_tune_options={**distillation, "losses": {"hard": 1.0}},
        recover_options=distillation,
        stage_notes=(
            "the published weights",
            "hidden channels of every block, by elimination, and nothing else",
            f"{calibration_images} unlabelled training images, no gradient step",
            f"{recover_epochs} epochs on the labels of {len(train):,} images, no teacher",
            f"{recover_epochs} epochs of distillation on {len(train):,} images, no labels",
        ),
        notes=("Test images are only reported on; no weights and no epoch are chosen by them.",),
        references=MOBILENETV2_IMAGENET,
        latency_batch=16,
    )

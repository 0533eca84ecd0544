"""Published results measured again: networks, images, and ways of pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from chanprune_ext.allocation import Budget
from chanprune_ext.checkpoint import load_weights
from chanprune_ext.criteria import magnitude
from chanprune_ext.data import Augmentation, calibration_batches, open_dataset
from chanprune_ext.data.opening import classes_of_test
from chanprune_ext.data.transforms import training_transform
from chanprune_ext.elimination import elimination
from chanprune_ext.models import resnet56
from chanprune_ext.precision import AUTOCAST_DTYPES
from chanprune_ext.reconstruction import reconstruct

from .references import MOBILENETV2_IMAGENET, RESNET56_CIFAR10
from .trials import Further, Trial

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from torch import Tensor, nn

    from chanprune_ext.criteria import Criterion
    from chanprune_ext.data import ImageDataset
    from chanprune_ext.reconstruction import ReconstructionReport
    from chanprune_ext.report import Reference

__all__ = [
    "MILD_CROPS",
    "ImageNetImages",
    "TrialSet",
    "cifar10_resnet56_set",
    "hidden_channels",
    "imagenet_mobilenetv2_set",
    "inner_channels_within",
    "trained_mobilenet_v2",
    "tune_blocks_on_small_images",
]

MILD_CROPS = Augmentation(scale=(0.35, 1.0))
# Every pixel of an image is a sample for a block; for the end of the network the image is one.
_BLOCK_TUNING: dict[str, Any] = {"tune_outputs": False, "views": 3, "epochs": 3}
_END_TUNING: dict[str, Any] = {"tune_blocks": False, "views": 8}
# Of small images, and blends of them, which stand for images that were not trained on.
_SMALL_BLOCK_TUNING: dict[str, Any] = {
    "views": 2,
    "epochs": 2,
    "batch_size": 128,
    "held_back": 0.05,
}
_MOST_TUNED_ON = 10_000
# The expansions of MobileNetV2's blocks: the first block has none.
_EXPANSIONS = tuple(f"features.{block}.conv.0.0" for block in range(2, 18))


@dataclass(frozen=True)
class TrialSet:
    """What :func:`chanprune_ext.trials.run_trials` needs.

    Attributes:
        title: Heading of the table.
        model: The trained network.
        test: Labelled images to report on.
        trials: Ways of pruning it.
        calibration: Seed -> unlabelled batches.
        references: Results from elsewhere for the same network and data.
    """

    title: str
    model: nn.Module
    test: ImageDataset
    trials: tuple[Trial, ...]
    calibration: Callable[[int], list[Tensor]]
    references: tuple[Reference, ...] = ()


def cifar10_resnet56_set(
    weights: str | os.PathLike[str], data: str, images: int, precision: str = "fp32"
) -> TrialSet:
    """ResNet-56 on CIFAR-10.

    Args:
        weights: State dict of a ResNet-56 trained on CIFAR-10.
        data: CIFAR-10 as :func:`chanprune_ext.data.open_dataset` takes it, raw pixels.
        images: Unlabelled training images for choosing and compensating; as many blends of two of
            them are added. Blocks are tuned on more of them.
        precision: Arithmetic of gradient steps, as in :class:`chanprune_ext.recovery.Recipe`.
    """
    model = resnet56()
    load_weights(model, weights)
    train = open_dataset(data, "train")
    halves: dict[str, Any] = {"ratio": 0.0, "ratios": {"layer*.conv1": 0.5}}
    tuned_on = min(len(train), _MOST_TUNED_ON)

    def tune_blocks(pruned: nn.Module, original: nn.Module, _: list[Tensor]) -> None:
        tune_blocks_on_small_images(pruned, original, train, tuned_on, precision=precision)

    return TrialSet(
        title="ResNet-56 on CIFAR-10",
        model=model.eval(),
        test=open_dataset(data, "test"),
        trials=(
            Trial(
                "blocks halved, plain L1",
                lambda _: {**halves, "criterion": magnitude(members="makers")},
                after=None,
                published="article: drop 3.87; measured elsewhere: 65",
            ),
            Trial(
                "blocks halved",
                lambda batches: {**halves, "criterion": elimination(batches)},
                published="article: drop 3.87; He et al. 2017: 2.0",
            ),
            Trial(
                "MACs x0.50",
                lambda batches: inner_channels_within(batches, Budget(macs=0.5)),
                published="article: drop 3.87; He et al. 2017: 2.0",
                further=(
                    Further(
                        f"blocks tuned on {tuned_on:,} images",
                        tune_blocks,
                        published="article: 10 epochs of distillation, above by 0.1",
                    ),
                ),
            ),
            Trial("MACs x0.40", lambda batches: inner_channels_within(batches, Budget(macs=0.4))),
            Trial(
                "every group halved",
                lambda batches: {"ratio": 0.5, "criterion": elimination(batches)},
            ),
        ),
        calibration=lambda seed: calibration_batches(train, images, seed=seed, mixed=True),
        references=RESNET56_CIFAR10,
    )


def tune_blocks_on_small_images(
    pruned: nn.Module,
    original: nn.Module,
    train: ImageDataset,
    images: int,
    *,
    mixed: bool = True,
    precision: str = "fp32",
) -> ReconstructionReport:
    """Goes on from a compensated ResNet-56: its blocks by gradient, then its end.

    Args:
        pruned: The compensated network; changed in place.
        original: The network it was made from.
        train: Where to draw unlabelled images from.
        images: How many.
        mixed: Tune on as many blends of two of them besides.
        precision: Arithmetic of gradient steps, as in :class:`chanprune_ext.recovery.Recipe`.
    """
    batches = calibration_batches(train, images, mixed=mixed)
    amp = AUTOCAST_DTYPES[precision]
    return reconstruct(pruned, original, batches, augment=_shifts, amp=amp, **_SMALL_BLOCK_TUNING)


class ImageNetImages:
    """ImageNet as MobileNetV2's weights expect it, normalised to [-1, 1].

    Args:
        data: Folder or archive with training images.
        test_data: Folder or archive with validation images. Default: the split of ``data``.
        class_file: Class folder names in label order. Default: the sorted folders of ``data``, for
            ``test_data`` too, which may lack some.
    """

    def __init__(
        self,
        data: str,
        test_data: str | None = None,
        class_file: str | os.PathLike[str] | None = None,
    ) -> None:
        self._data = data
        self._test_data = test_data or data
        self._looks: dict[str, Any] = {
            "mean": (0.5,) * 3,
            "std": (0.5,) * 3,
        }
        self._class_file = class_file
        self._test_classes = classes_of_test(data, test_data, class_file)

    def training(self, *, augment: bool | Augmentation = False, seed: int = 0) -> ImageDataset:
        """The training images, changed at random or as they are."""
        return open_dataset(
            self._data,
            "train",
            augment=augment,
            seed=seed,
            class_file=self._class_file,
            **self._looks,
        )

    def test(self) -> ImageDataset:
        """The validation images."""
        return open_dataset(
            self._test_data, "val", resize=227, class_file=self._test_classes, **self._looks
        )


def trained_mobilenet_v2(weights: str | os.PathLike[str]) -> nn.Module:
    """A MobileNetV2 with weights in torchvision's layout, in eval mode."""
    from torchvision.models import mobilenet_v2

    model = mobilenet_v2()
    load_weights(model, weights)
    return model.eval()


def imagenet_mobilenetv2_set(
    weights: str | os.PathLike[str],
    data: str,
    test_data: str | None,
    class_file: str | os.PathLike[str] | None,
    images: int,
    precision: str = "fp32",
) -> TrialSet:
    """MobileNetV2 on ImageNet, normalised to [-1, 1].

    Args:
        weights: State dict in torchvision's layout.
        data: Folder or archive with training images.
        test_data: Folder or archive with validation images. Default: the split of ``data``.
        class_file: Class folder names in label order.
        images: Unlabelled training images.
        precision: Arithmetic of gradient steps, as in :class:`chanprune_ext.recovery.Recipe`.
    """
    found = ImageNetImages(data, test_data, class_file)
    train = found.training()

    tuning: dict[str, Any] = {
        "augment": _mild_crops,
        "held_back": 0,  # compensation has seen them all: they would speak for what is there
        "amp": AUTOCAST_DTYPES[precision],
    }

    def tune_blocks(pruned: nn.Module, original: nn.Module, batches: list[Tensor]) -> None:
        reconstruct(pruned, original, batches, **_BLOCK_TUNING, **tuning)

    def tune_end(pruned: nn.Module, original: nn.Module, batches: list[Tensor]) -> None:
        reconstruct(pruned, original, batches, **_END_TUNING, **tuning)

    reconstructed = (
        Further("blocks tuned", tune_blocks, published="article: drop 3.6"),
        Further("blocks and end tuned", tune_end, published="article: drop 3.6"),
    )
    return TrialSet(
        title="MobileNetV2 on ImageNet",
        model=trained_mobilenet_v2(weights),
        test=found.test(),
        trials=(
            Trial(
                "hidden -30 %, plain L1",
                lambda _: hidden_channels(0.3, magnitude(members="makers")),
                after=None,
                published="article: drop 3.6",
            ),
            Trial(
                "hidden -10 %",
                lambda batches: hidden_channels(0.1, elimination(batches)),
                published="LBYL, no data: drop 18.5",
            ),
            Trial(
                "hidden -30 %",
                lambda batches: hidden_channels(0.3, elimination(batches)),
                published="article: drop 3.6",
                further=reconstructed,
            ),
            Trial(
                "MACs x0.74",  # as many as with every hidden width at 0.7, but free to choose
                lambda batches: inner_channels_within(batches, Budget(macs=0.742)),
                published="article: drop 3.6",
                further=reconstructed,
            ),
            Trial(
                "params x0.65",
                lambda batches: inner_channels_within(batches, Budget(params=0.65)),
                published="article: drop 3.6",
                further=reconstructed,
            ),
        ),
        calibration=lambda seed: calibration_batches(train, images, seed=seed),
        references=MOBILENETV2_IMAGENET,
    )


def _mild_crops(batch: Tensor) -> Tensor:
    """Another view of every image of a batch, square ones, in the shape that it has."""
    return _each(training_transform(batch.shape[-1], MILD_CROPS), batch)


def _shifts(batch: Tensor) -> Tensor:
    """Every image of a batch moved by up to an eighth of its size, half of them mirrored."""
    from torchvision.transforms import v2

    size = batch.shape[-1]
    return _each(
        v2.Compose([v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip()]), batch
    )


def _each(view: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """A batch of views, every one with random numbers of its own."""
    return torch.stack([view(image) for image in batch])


def hidden_channels(ratio: float, criterion: Criterion) -> dict[str, Any]:
    """Options of :func:`chanprune_ext.plan`: a share of every hidden width of MobileNetV2 goes."""
    return {
        "ratio": 0.0,
        "ratios": dict.fromkeys(_EXPANSIONS, ratio),
        "criterion": criterion,
    }


def inner_channels_within(batches: list[Tensor], budget: Budget) -> dict[str, Any]:
    """Options of :func:`chanprune_ext.plan`: inner channels of all blocks go by elimination.

    Args:
        batches: Calibration batches.
        budget: What the network may cost in the end.
    """
    return {
        "budget": budget,
        "criterion": elimination(batches),
        "scope": "global",
        "kinds": ("hidden",),
    }

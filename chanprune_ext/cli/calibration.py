"""Training images for the commands: for compensation, and for the criteria that need data."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

from chanprune_ext.criteria import activation, fluctuation, hessian, taylor
from chanprune_ext.data import calibration_batches, make_loader
from chanprune_ext.elimination import elimination
from chanprune_ext.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from chanprune_ext.criteria import Criterion
    from chanprune_ext.data import ImageDataset

__all__ = ["CriterionName", "criterion_of", "images_to_draw", "labelled_batches", "needs_images"]

IMAGES = 512  # where nobody says how many
_BATCH = 64


class CriterionName(str, Enum):
    """Criteria: those that need nothing but the weights, then those that are made of images."""

    L1 = "l1"
    L2 = "l2"
    LINF = "linf"
    BN_SCALE = "bn_scale"
    FPGM = "fpgm"
    RANDOM = "random"
    ELIMINATION = "elimination"
    ACTIVATION = "activation"
    FLUCTUATION = "fluctuation"
    TAYLOR = "taylor"
    HESSIAN = "hessian"


_OF_IMAGES: dict[CriterionName, Callable[[Any], Criterion]] = {
    CriterionName.ELIMINATION: elimination,
    CriterionName.ACTIVATION: activation,
    CriterionName.FLUCTUATION: fluctuation,
}
_OF_LABELS: dict[CriterionName, Callable[[Any], Criterion]] = {
    CriterionName.TAYLOR: taylor,
    CriterionName.HESSIAN: hessian,
}


def needs_images(name: CriterionName) -> bool:
    """Whether a criterion is made of training images."""
    return name in _OF_IMAGES or name in _OF_LABELS


def images_to_draw(asked: int | None, training: ImageDataset, option: str) -> int:
    """How many training images to draw: as asked, else 512 or all there are.

    Raises:
        InvalidArgumentError: There are fewer than were asked for.
    """
    if asked is None:
        return min(IMAGES, len(training))
    if asked > len(training):
        raise InvalidArgumentError(
            f"{option}: expected at most {len(training)}, the training images there are, got "
            f"{asked}"
        )
    return asked


def criterion_of(
    name: CriterionName, training: ImageDataset | None, count: int, seed: int
) -> str | Criterion:
    """What :func:`chanprune_ext.plan` takes as its criterion.

    Args:
        name: Which.
        training: Images for the criteria that need them.
        count: How many of them.
        seed: Of the draw.

    Raises:
        InvalidArgumentError: It needs images, and there are none.
    """
    if not needs_images(name):
        return name.value
    if training is None or count == 0:
        raise InvalidArgumentError(
            f"--criterion: {name.value!r} is made of training images; give --data, and leave "
            "--calibration-images above 0"
        )
    if name in _OF_LABELS:
        return _OF_LABELS[name](labelled_batches(training, count, _BATCH, seed))
    return _OF_IMAGES[name](calibration_batches(training, count, seed=seed))


def labelled_batches(
    images: ImageDataset, count: int, batch_size: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """The first ``count`` images and labels, or all there are, in a random order."""
    batches: list[tuple[Tensor, Tensor]] = []
    for inputs, labels in make_loader(images, batch_size, shuffle=True, seed=seed):
        left = count - sum(len(y) for _, y in batches)
        if left <= 0:
            break
        batches.append((inputs[:left], labels[:left]))
    return batches

"""Accuracy of a classifier on labelled images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..data import ImageDataset, make_loader
from ..errors import DataError
from ..module_modes import evaluating
from ..quantities import accuracy_error
from .outputs import check_count, check_labels, input_dtype, logits, moved, split_batch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..data.loader import ImageLoader
    from ..data.shards import ShardLoader

__all__ = [
    "Evaluation",
    "SpareBatch",
    "correct_counts",
    "device_of",
    "evaluate",
    "validation_loader",
]


@dataclass(frozen=True)
class Evaluation:
    """How well a model did on ``n`` labelled images.

    Attributes:
        top1 (float): share of images whose class has the highest logit, 0 to 1.
        top5 (float): share of images whose class is among the five highest, 0 to 1.
        loss (float): mean cross-entropy in nats.
        n (int): number of images.
    """

    top1: float
    top5: float
    loss: float
    n: int

    @classmethod
    def of_sums(cls, loss: float, top1: float, top5: float, n: float) -> Evaluation:
        """From what :func:`correct_counts` found, perhaps added up over processes.

        Raises:
            DataError: there was no image.
        """
        if n == 0:
            raise DataError("data: expected at least one batch, got none")
        return cls(top1 / n, top5 / n, loss / n, int(n))

    @property
    def standard_error(self) -> float:
        """Of ``top1``, as a share: ``sqrt(p (1 - p) / n)``."""
        return accuracy_error(self.top1, self.n)

    def __str__(self) -> str:
        return (
            f"top-1 {100 * self.top1:.2f} % (s.e. {100 * self.standard_error:.2f}), "
            f"top-5 {100 * self.top5:.2f} %, loss {self.loss:.4f}, n = {self.n}"
        )


class SpareBatch(NamedTuple):
    """A batch that is run and not counted, for other processes that wait for this one."""

    batch: Any


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer is; the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def evaluate(
    model: nn.Module,
    data: Dataset[Any] | Iterable[Any],
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    channels_last: bool = False,
    workers: int = 0,
) -> Evaluation:
    """Measures accuracy and cross-entropy without changing the model.

    Args:
        model (nn.Module): classifier returning logits ``[N, K]``.
        data (Dataset or Iterable): a dataset (augmentation is left out), or batches
            ``(images, labels [N])``, for example a ``DataLoader``. Images are given to a network
            whose weights are all bfloat16, float16 or float64 in that type.
        batch_size (int): images a batch, if ``data`` is a dataset. Default: 256.
        device (torch.device or str, optional): where the images go; the model must be there.
            Default: where the model is.
        channels_last (bool): feed images in NHWC layout. Default: False.
        workers (int): decoding processes, if ``data`` is a dataset. Default: 0.

    Returns:
        Evaluation: over all images.

    Raises:
        DataError: there is no image, a label is outside the model's classes, or a batch has not as
            many labels as images.
        InvalidArgumentError: the model does not return logits.
    """
    if isinstance(data, Dataset) and not isinstance(data, DataLoader):
        data = validation_loader(data, batch_size, workers)
    target = device_of(model) if device is None else torch.device(device)
    return Evaluation.of_sums(*correct_counts(model, data, target, channels_last))


def validation_loader(
    data: Dataset[Any], batch_size: int, workers: int
) -> ImageLoader | ShardLoader:
    """Batches of a dataset in its order, without augmentation."""
    if isinstance(data, ImageDataset):
        data = data.without_augmentation()
    return make_loader(data, batch_size, workers=workers)


@torch.no_grad()
def correct_counts(
    model: nn.Module, batches: Iterable[Any], device: torch.device, channels_last: bool
) -> tuple[float, float, float, int]:
    """Sums over all images: cross-entropy, right at once, right among five; and how many images.

    Arguments as for :func:`evaluate`.
    """
    loss = top1 = top5 = 0.0
    n = 0
    dtype = input_dtype(model)
    with evaluating(model):
        for batch in batches:
            spare = isinstance(batch, SpareBatch)
            images, labels = split_batch(batch.batch if spare else batch)
            images = moved(images, device, channels_last=channels_last, dtype=dtype)
            scores = logits(model, images).float()
            if spare:
                continue
            check_count(labels, scores)
            check_labels(labels, scores.shape[1])
            labels = labels.to(scores.device)
            loss += F.cross_entropy(scores, labels, reduction="sum").item()
            best = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
            top1 += best[:, 0].sum().item()
            top5 += best.sum().item()
            n += len(labels)
    return loss, top1, top5, n

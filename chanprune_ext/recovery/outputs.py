"""What goes into a classifier and what comes out, checked before any kernel sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, InvalidArgumentError

__all__ = [
    "check_count",
    "check_labels",
    "input_dtype",
    "inputs_and_labels",
    "logits",
    "moved",
    "split_batch",
]


def input_dtype(model: nn.Module) -> torch.dtype | None:
    """What floating-point inputs must be for a network whose weights are all of one other type.

    Returns:
        torch.dtype or None: such as bfloat16; None where inputs are right as they are: for float32,
        the type that data have anyway, and for several types, between which the network converts
        itself.
    """
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return found.pop() if len(found) == 1 and torch.float32 not in found else None


def moved(
    inputs: Any,
    device: torch.device,
    *,
    channels_last: bool = False,
    dtype: torch.dtype | None = None,
) -> Any:
    """A model's inputs (tensor, tuple, list or dict of tensors) on ``device``.

    Args:
        inputs (Any): what one batch feeds to the model.
        device (torch.device): where it goes.
        channels_last (bool): also lay four-dimensional tensors out as NHWC. Default: False.
        dtype (torch.dtype, optional): what floating-point tensors become, see :func:`input_dtype`.
            Default: None, they stay what they are.

    Raises:
        DataError: there is something else than tensors in it.
    """
    if isinstance(inputs, Tensor):
        wanted = dtype if inputs.is_floating_point() else None
        inputs = inputs.to(device, wanted, non_blocking=True)
        nhwc = channels_last and inputs.ndim == 4
        return inputs.contiguous(memory_format=torch.channels_last) if nhwc else inputs
    if isinstance(inputs, Mapping):
        return {
            k: moved(v, device, channels_last=channels_last, dtype=dtype) for k, v in inputs.items()
        }
    if isinstance(inputs, tuple | list):
        return tuple(moved(v, device, channels_last=channels_last, dtype=dtype) for v in inputs)
    raise DataError(f"images: expected tensors in a batch, got {type(inputs).__name__}")


def logits(model: nn.Module, inputs: Any) -> Tensor:
    """Runs ``model`` on a tensor, on positional (tuple) or on keyword (dict) inputs.

    Returns:
        Tensor[N, K]: what :func:`logits_of` finds in the output.
    """
    if isinstance(inputs, Mapping):
        return logits_of(model(**inputs))
    return logits_of(model(*inputs) if isinstance(inputs, tuple) else model(inputs))


def logits_of(output: Any) -> Tensor:
    """The logits ``[N, K]`` in a model's output.

    Args:
        output (Any): a tensor, or an object or mapping with ``logits`` (Hugging Face, and
            torchvision's networks with auxiliary heads while training).

    Raises:
        InvalidArgumentError: the output holds no two-dimensional floating-point tensor there.
    """
    if isinstance(output, Mapping):
        output = output.get("logits", output)
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise InvalidArgumentError(
            f"model: expected it to return logits [N, classes], got {type(output).__name__}"
        )
    if output.ndim != 2 or not output.is_floating_point():
        raise InvalidArgumentError(
            f"model: expected floating-point logits [N, classes], got {output.dtype} "
            f"{list(output.shape)}"
        )
    return output


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """Takes an ``(images, labels)`` pair apart.

    Raises:
        DataError: the batch is no pair, is empty, or its labels are no integers ``[N]``.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise DataError(
            f"batch: expected a pair (images, labels), got {type(batch).__name__}"
            + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
        )
    images, labels = batch
    labels = torch.as_tensor(labels)
    if labels.ndim != 1 or labels.is_floating_point() or labels.numel() == 0:
        raise DataError(
            f"labels: expected integers [N] with N > 0, got {labels.dtype} {list(labels.shape)}"
        )
    return images, labels.long()


def inputs_and_labels(batch: Any) -> tuple[Any, Tensor | None]:
    """Takes a training batch apart, which may have no labels.

    Args:
        batch (Any): a pair (inputs, integer labels ``[N]``); or inputs alone: a tensor, a dict of
            keyword inputs, or either in a list or tuple of one.

    Returns:
        tuple: the inputs, and the labels or None.

    Raises:
        DataError: as for :func:`split_batch`.
    """
    if isinstance(batch, tuple | list) and len(batch) == 1:
        batch = batch[0]
    if isinstance(batch, Tensor | Mapping):
        return batch, None
    return split_batch(batch)


def check_count(labels: Tensor, scores: Tensor) -> None:
    """Raises DataError unless there are as many ``labels [N]`` as logits ``scores [N, K]``."""
    if len(labels) != len(scores):
        raise DataError(
            f"labels: expected one for each image, got {len(labels)} labels and logits of "
            f"{len(scores)} images in one batch"
        )


def check_labels(labels: Tensor, classes: int) -> None:
    """Raises DataError unless every one of the integer ``labels [N]`` is in ``[0, classes)``."""
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high >= classes:
        raise DataError(
            f"labels: expected 0 to {classes - 1} for a model with {classes} outputs, got "
            f"{low if low < 0 else high}; use the model's own class order, or a class file"
        )

"""What a run says about its speed and its memory, with the settings to change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..compensation.batch_norm import measured_batch_norms
from ..compensation.batches import sample_count
from ..precision import AUTOCAST_DTYPES, in_software
from .outputs import inputs_and_labels
from .processes import launched_processes

if TYPE_CHECKING:
    from torch import nn

    from .recipe import Recipe
    from .result import EpochRecord

__all__ = ["folded_norms", "out_of_memory", "single_value", "slow_precision", "wait_hint"]

WAIT_SHARE = 0.2  # of an epoch spent waiting for data, worth a word ...
WAIT_SECONDS = 10.0  # ... where the epoch is long enough for that to mean anything


def wait_hint(record: EpochRecord, loader: Any) -> str | None:
    """A sentence where the device waited much for its data in an epoch; otherwise None.

    Args:
        record (EpochRecord): the epoch.
        loader (Any): what the data come from.
    """
    if record.data_wait < WAIT_SHARE or record.seconds < WAIT_SECONDS:
        return None
    workers = getattr(loader, "num_workers", None)
    more = "a faster loader" if workers is None else f"more workers than {workers}"
    return (
        f"epoch {record.epoch}: {100 * record.data_wait:.0f} % of the time went into waiting for "
        f"data; {more}, or images stored in the size they are trained in, would make it faster"
    )


def folded_norms(student: nn.Module) -> str | None:
    """A sentence where batch norms hold no statistics, but have learned; otherwise None.

    So they are left by a conversion that has folded them into the convolutions, from a quantised
    model, say. With the statistics of a batch the network would compute something else altogether.

    Args:
        student (nn.Module): as it begins the training.
    """
    norms = measured_batch_norms(student)
    folded = 0
    for norm in norms:
        variance, weight, bias = norm.running_var, norm.weight, norm.bias
        if variance is None or weight is None or bias is None or not bool(bias.any()):
            continue
        ones = torch.ones_like(weight)
        folded += torch.allclose(variance.to(ones), ones, atol=1e-3) and torch.equal(weight, ones)
    if 2 * folded <= len(norms):
        return None
    return (
        f"{folded} of {len(norms)} batch norms have the variances and scales of fresh ones, but "
        "shifts that were trained: they seem to be folded into the layers before them, and "
        "training with the statistics of batches changes what the network computes. Use "
        "freeze_batch_norm=True (--freeze-batch-norm)"
    )


def slow_precision(device: torch.device, recipe: Recipe) -> str | None:
    """A sentence where the device has no arithmetic for the precision asked for; otherwise None.

    Args:
        device (torch.device): where student and teacher run.
        recipe (Recipe): settings of the run.
    """
    names = recipe.precision, recipe.teacher_precision or "fp32"
    slow = in_software(device.type, *(AUTOCAST_DTYPES[name] for name in names))
    return None if slow is None else f"{slow}; use precision='fp32' (--precision fp32)"


def out_of_memory(error: BaseException, batch: Any, update: int, recipe: Recipe) -> str:
    """A sentence with the numbers to change.

    Args:
        error (BaseException): what torch has raised.
        batch (Any): the batch that did not fit.
        update (int): updates made until then.
        recipe (Recipe): settings of the run.
    """
    size = sample_count(inputs_and_labels(batch)[0])
    steps = recipe.gradient_accumulation_steps
    half = max(1, size // 2)
    advice = [f"take batches of {half} (batch_size) with gradient_accumulation_steps={2 * steps}"]
    if recipe.precision == "fp32":
        advice.append("precision='bf16'")
    if launched_processes() > 1 and not recipe.shard:
        advice.append("shard=True, which divides the network over the processes")
    if recipe.ema_decay is not None or recipe.swa_start is not None:
        advice.append("leave the running average out")
    if recipe.keep == "best":
        advice.append("keep='last'")
    return (
        f"the device ran out of memory in update {update + 1}, with {size} images at once; the "
        f"student is as it was before. Try in this order: {', '.join(advice)}. torch says: "
        f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
    )


def single_value(error: ValueError, batch: Any, number: int) -> str | None:
    """A sentence where batch norm was left with one value a channel; otherwise None.

    Args:
        error (ValueError): what torch has raised.
        batch (Any): the batch it was raised at.
        number (int): which one of the epoch, from 1.
    """
    if "more than 1 value per channel" not in str(error):
        return None
    size = sample_count(inputs_and_labels(batch)[0])
    return (
        f"train: batch {number} of the epoch has {size} {'image' if size == 1 else 'images'}, too "
        "few for batch norm, which needs two values a channel; the student is as it was before. "
        "Leave small batches out (drop_last=True of the DataLoader, another batch_size), or use "
        "freeze_batch_norm=True (--freeze-batch-norm)"
    )

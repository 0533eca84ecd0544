"""The gradient steps of one block: Adam on the relative error, the best epoch kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..precision import autocast

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from .weights import TunedWeights

__all__ = ["DivergedError", "Options", "Schedule", "Tuned", "tune"]

_WARM_UP = 0.05  # share of the steps
_LEAST_GAIN = 1e-4  # relative; less is round-off


class DivergedError(Exception):
    """Loss or error is no finite number any more."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        epochs: Passes over the samples.
        lr: Peak step in units of a weight's usual size; linear warm-up, then cosine to zero.
    """

    epochs: int
    lr: float


@dataclass(frozen=True)
class Options:
    """How blocks are tuned.

    Attributes:
        schedule: Epochs and learning rate.
        amp: Type that convolutions and products are computed in while gradients are taken.
        device: Where the networks are.
        generator: Draws the order of batches.
    """

    schedule: Schedule
    amp: torch.dtype | None
    device: torch.device
    generator: torch.Generator

    def autocast(self) -> torch.autocast:
        """Context of the forwards that gradients are taken of."""
        return autocast(self.device.type, self.amp)

    def scaler(self) -> torch.amp.GradScaler:
        """Keeps gradients in float16 from vanishing: a block's loss is a mean over millions."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp is torch.float16)


@dataclass(frozen=True)
class Tuned:
    """Result of :func:`tune`.

    Attributes:
        error_before: By the judge, before the first step.
        error_after: With the weights that were kept.
        epoch: Epoch they come from; 0: none was better than the start.
        steps: Steps made.
    """

    error_before: float
    error_after: float
    epoch: int
    steps: int


def tune(
    weights: TunedWeights,
    batches: int,
    loss_of: Callable[[int], Tensor],
    judge: Callable[[], float],
    options: Options,
) -> Tuned:
    """Minimises a loss over batches and leaves ``weights`` at the best epoch.

    Args:
        weights: What is tuned.
        batches: How many there are.
        loss_of: Loss of the batch at a position, with its graph.
        judge: Error on held-back samples with the present weights.
        options: How.

    Raises:
        DivergedError: A loss or an error is not finite.
    """
    schedule, scaler = options.schedule, options.scaler()
    before = best = judge()
    if not math.isfinite(before):
        raise DivergedError("its error is not finite before the first step")
    kept, chosen, steps = weights.values(), 0, 0
    # The second moment forgets within a few hundred steps, for there are not many more.
    optimizer = torch.optim.Adam(weights.offsets, lr=schedule.lr, betas=(0.9, 0.99))
    total = schedule.epochs * batches
    for epoch in range(1, schedule.epochs + 1):
        running = 0.0
        for index in torch.randperm(batches, generator=options.generator, device="cpu").tolist():
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr * _rate(steps, total)
            with torch.enable_grad():
                loss = loss_of(index)
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            weights.take_gradients()
            scaler.step(optimizer)
            scaler.update()
            weights.apply()
            running += float(loss.detach())
            steps += 1
        error = judge()
        if not math.isfinite(running) or not math.isfinite(error):
            raise DivergedError(f"its error is not finite any more after epoch {epoch}")
        if error < best * (1 - _LEAST_GAIN):
            best, kept, chosen = error, weights.values(), epoch
    weights.set(kept)
    return Tuned(before, best, chosen, steps)


def _rate(step: int, total: int) -> float:
    warm_up = max(1.0, _WARM_UP * total)
    cosine = 0.5 * (1 + math.cos(math.pi * step / total))
    return min(1.0, (step + 1) / warm_up) * cosine

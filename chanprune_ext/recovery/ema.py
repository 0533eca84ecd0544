"""A running average of a model's weights, often better than the weights themselves."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .weights import copied, named_tensors, overwrite

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["WeightAverage"]


class WeightAverage:
    """Moving average of parameters and floating-point buffers.

    After update ``t`` (from 1) ``average <- d * average + (1 - d) * model``. With a ``decay``,
    ``d = min(decay, (1 + t) / (10 + t))``, so that the first steps are forgotten quickly; without,
    ``d = (t - 1) / t``, the mean of all updates (SWA: Izmailov et al. 2018). The statistics of
    batch norm are averaged with the same weights as the parameters they were gathered under;
    integer buffers are taken over as they are.

    Args:
        model (nn.Module): the model to follow; its present weights are the first average.
        decay (float, optional): upper limit of ``d``, between 0 and 1; None averages equally.
    """

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self.decay = decay
        self.updates = 0
        self.state = copied(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes the model's present weights into the average."""
        self.updates += 1
        if self.decay is None:
            decay = (self.updates - 1) / self.updates
        else:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, values = [], []
        for name, tensor in named_tensors(model).items():
            if tensor.is_floating_point():
                averages.append(self.state[name])
                values.append(tensor)
            else:
                self.state[name].copy_(tensor)
        torch._foreach_lerp_(averages, values, 1 - decay)

    def copy_to(self, model: nn.Module) -> None:
        """Overwrites the model's weights with the average."""
        overwrite(model, self.state)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Lends the average to ``model`` for a while."""
        own = copied(model)
        self.copy_to(model)
        try:
            yield
        finally:
            overwrite(model, own)

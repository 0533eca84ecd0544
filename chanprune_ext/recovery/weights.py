"""Reading and overwriting all weights of a model at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

__all__ = ["copied", "named_tensors", "overwrite"]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, shared ones once, also those that a state dict leaves out."""
    return dict([*model.named_parameters(), *model.named_buffers()])


def copied(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what :func:`named_tensors` lists."""
    return {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}


@torch.no_grad()
def overwrite(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copies ``values``, named as in :func:`named_tensors`, into the model."""
    for name, tensor in named_tensors(model).items():
        tensor.copy_(values[name])

"""Reading and overwriting all weights of a model at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..soundness import is_sound

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

__all__ = ["broken", "copied", "named_tensors", "overwrite", "own_slice"]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, shared ones once, also those that a state dict leaves out.

    Of a network that is divided over several processes these are the slices of this one, with the
    memory of the parameters.
    """
    return {
        name: own_slice(tensor)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }


def own_slice(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: a view of its slice, or a plain tensor as it is."""
    if not hasattr(tensor, "to_local"):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def broken(model: nn.Module) -> str | None:
    """The first of them with values that nothing can be computed with."""
    parameters = {name for name, _ in model.named_parameters()}
    for name, tensor in named_tensors(model).items():
        if not is_sound(name, tensor, parameter=name in parameters):
            return name
    return None


def copied(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what :func:`named_tensors` lists."""
    return {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}


@torch.no_grad()
def overwrite(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copies ``values``, named as in :func:`named_tensors`, into the model."""
    for name, tensor in named_tensors(model).items():
        tensor.copy_(values[name])

"""Weight lists with the shapes of real models."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet50

from chanprune_ext.models import resnet56

_MODELS = {"resnet56": resnet56, "resnet50": resnet50, "mobilenet_v2": mobilenet_v2}
MODELS = tuple(_MODELS)


def matrices(model: str, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random weights of all convolutions and linear layers of a model, in order."""
    with torch.device("meta"):
        modules = _MODELS[model]().modules()
        shapes = [m.weight.shape for m in modules if isinstance(m, nn.Conv2d | nn.Linear)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def total_bytes(tensors: list[Tensor]) -> int:
    """Bytes of all elements."""
    return sum(t.numel() * t.element_size() for t in tensors)

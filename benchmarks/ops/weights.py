"""Weight lists with the shapes of real models."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet50

from chanprune_ext.models import resnet56

_MODELS = {"resnet56": resnet56, "mobilenet_v2": mobilenet_v2, "resnet50": resnet50}
_LAYERS = {
    # One of the 32 encoder layers of ViT-H/14: attention in and out, MLP.
    "vit_h_14_layer": [(3840, 1280), (1280, 1280), (5120, 1280), (1280, 5120)],
    # One of the 32 decoder layers of a 7-billion-parameter Llama: q, k, v, o; gate, up, down.
    "llama_7b_layer": [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)],
}
MODELS = (*_MODELS, *_LAYERS)


def _shapes(model: str) -> list[torch.Size]:
    if model in _LAYERS:
        return [torch.Size(shape) for shape in _LAYERS[model]]
    with torch.device("meta"):
        modules = _MODELS[model]().modules()
        return [m.weight.shape for m in modules if isinstance(m, nn.Conv2d | nn.Linear)]


def matrices(model: str, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random weights of all convolutions and linear layers of a model, in order."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(shape, generator=generator, device=device, dtype=dtype)
        for shape in _shapes(model)
    ]


def total_bytes(tensors: list[Tensor]) -> int:
    """Bytes of all elements."""
    return sum(t.numel() * t.element_size() for t in tensors)

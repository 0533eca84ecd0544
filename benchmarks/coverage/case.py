"""One model of a suite, and how its starting weights are made unforgiving."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Case", "built", "called", "images", "unforgiving"]


@dataclass(frozen=True)
class Case:
    """A model to be pruned.

    Attributes:
        name: What people know it by.
        build: Makes the model with random weights.
        inputs: Makes a batch of two examples from torch's global generator: a tensor, a tuple of
            positional inputs or a dict of keyword inputs.
        dynamic: Output shapes depend on values (detections), so another batch has others.
        huge: So large that only one copy beside the pruned model fits: fewer checks, more time.
        family: Heading in the rendered table.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    dynamic: bool = False
    huge: bool = False
    family: str = ""


def images(*shape: int) -> Callable[[], Tensor]:
    """Makes random images (or volumes, or whatever has this shape)."""
    return lambda: torch.randn(*shape)


def built(case: Case, seed: int = 0) -> nn.Module:
    """The model of ``case``, in eval mode, the same on every call."""
    torch.manual_seed(seed)
    return unforgiving(case.build(), seed)


def called(model: nn.Module, inputs: Any) -> Any:
    """``model`` on a tuple of positional inputs, a dict of keyword inputs, or one input."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def unforgiving(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` in eval mode, changed in place, with no value left that would hide a mistake.

    A fresh network is full of neutral values: ones and zeros in norms, zeros in biases, layer
    scales, position tables and last layers. All of them get random values, distinct within each
    vector; weights keep their size.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor, low: float, high: float) -> None:
        n = max(tensor.numel(), 1)
        places = torch.randperm(n, generator=generator, dtype=torch.int64).double()
        steps = (places + torch.rand(1, generator=generator, dtype=torch.float64)) / n
        tensor.copy_((low + (high - low) * steps).reshape(tensor.shape).to(tensor.dtype))

    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
                continue
            if tensor.numel() == 1 or (tensor.dim() == 1 and name.endswith("weight")):
                draw(tensor, 0.5, 1.5)
            elif tensor.dim() == 1 or bool((tensor == tensor.flatten()[0]).all()):
                draw(tensor, -0.5, 0.5)
        for module in model.modules():
            mean, var = (getattr(module, f"running_{name}", None) for name in ("mean", "var"))
            if isinstance(mean, Tensor) and isinstance(var, Tensor) and not mean.is_meta:
                draw(mean, -0.5, 0.5)
                draw(var, 0.5, 1.5)
    return model.eval()

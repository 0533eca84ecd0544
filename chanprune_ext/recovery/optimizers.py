"""Optimizers with weight decay where it belongs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import InvalidArgumentError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .recipe import Recipe

__all__ = ["gradient_scaler", "make_optimizer", "parameter_groups"]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Splits the trainable parameters into those with weight decay and those without.

    Vectors and scalars (biases, the scales of normalisation layers, PReLU slopes) get none: decay
    would pull them to zero without making the function any simpler (He et al. 2019, "Bag of
    Tricks", section 3.1).

    Raises:
        InvalidArgumentError: no parameter requires a gradient.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise InvalidArgumentError(
            "student: none of its parameters requires a gradient; call student.requires_grad_()"
        )
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW, over the trainable parameters of ``model``."""
    groups = parameter_groups(model, recipe.weight_decay)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.peak_lr)
    nesterov = recipe.momentum > 0
    return torch.optim.SGD(groups, lr=recipe.peak_lr, momentum=recipe.momentum, nesterov=nesterov)


def gradient_scaler(
    model: nn.Module, recipe: Recipe, device: torch.device, accelerator: Accelerator
) -> torch.amp.GradScaler | None:
    """Gives accelerate a scaler for training in float16; None where it has one or needs none.

    accelerate's own is a setting of the whole program, and can't change between two runs.

    Raises:
        InvalidArgumentError: the weights themselves are float16.
    """
    if recipe.precision != "fp16" or accelerator.scaler is not None:
        return None
    if any(p.dtype == torch.float16 for p in model.parameters() if p.requires_grad):
        raise InvalidArgumentError(
            "precision: 'fp16' computes in float16 and updates float32 weights, the student's are "
            "float16; call student.float() first"
        )
    accelerator.scaler = torch.amp.GradScaler(device.type)
    return accelerator.scaler

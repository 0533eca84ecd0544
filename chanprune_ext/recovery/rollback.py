"""Puts a model back into the state it was in when something goes wrong."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["Snapshot"]


class Snapshot:
    """A model at one moment: parameters, buffers, gradients, training flags and device.

    Args:
        model (nn.Module): the model to remember.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]
        self._parameters = [(p, p.detach().clone(), p.grad) for p in model.parameters()]
        self._buffers = [
            (module, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Undoes every change made since, in place."""
        for parameter, value, gradient in self._parameters:
            if parameter.device != value.device:
                parameter.data = parameter.data.to(value.device)
            parameter.copy_(value)
            parameter.grad = gradient
        for module, name, buffer, value in self._buffers:
            buffer.copy_(value)
            setattr(module, name, buffer)  # moving to another device had put a new tensor there
        self.restore_modes()

    def restore_modes(self) -> None:
        """Puts every module back into training or evaluation mode, and nothing else."""
        for module, mode in self._modes:
            module.training = mode

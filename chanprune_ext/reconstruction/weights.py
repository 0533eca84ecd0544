"""Weights that are being tuned, each measured in units of its own filter's size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..copying import copied

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor, nn

__all__ = ["TunedWeights", "master_copies"]

_HALF = (torch.float16, torch.bfloat16)
_LEAST_FILTER = 0.1  # of the tensor's mean size: so that a filter of zeros can still move


class TunedWeights:
    """Parameters ``p = p0 + s * d``, of which an optimiser sees ``d`` only.

    ``s`` is the root mean square of each filter (of the whole tensor for biases and the like). So a
    step of 0.001 changes every weight by a thousandth of what is usual in its filter, whether batch
    norm was folded into the filters, which leaves them of all sizes, or not.

    Args:
        parameters: Pairs of the parameter to tune and the norm-giving weight beside it, which
            stands in where the parameter is all zero (a fresh bias).
    """

    def __init__(self, parameters: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        pairs = list(parameters)
        self._parameters = [parameter for parameter, _ in pairs]
        self._start = [parameter.detach().clone() for parameter in self._parameters]
        self._scale = [_scale(parameter.detach(), beside) for parameter, beside in pairs]
        self.offsets = [torch.zeros_like(parameter) for parameter in self._start]
        for offset in self.offsets:
            offset.grad = torch.zeros_like(offset)

    @property
    def count(self) -> int:
        """How many numbers are tuned."""
        return sum(parameter.numel() for parameter in self._parameters)

    def take_gradients(self) -> None:
        """Moves the parameters' gradients to the offsets."""
        for parameter, offset, scale in zip(
            self._parameters, self.offsets, self._scale, strict=True
        ):
            if parameter.grad is None:
                offset.grad.zero_()  # type: ignore[union-attr]
            else:
                torch.mul(parameter.grad, scale, out=offset.grad)
                parameter.grad = None

    @torch.no_grad()
    def apply(self) -> None:
        """Sets the parameters from the offsets."""
        for parameter, start, offset, scale in zip(
            self._parameters, self._start, self.offsets, self._scale, strict=True
        ):
            torch.addcmul(start, offset, scale, out=parameter.data)

    def values(self) -> list[Tensor]:
        """Copies of the parameters as they are."""
        return [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def set(self, values: Sequence[Tensor]) -> None:
        """Gives the parameters other values."""
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)


def _scale(parameter: Tensor, beside: Tensor | None) -> Tensor:
    size = parameter.square().mean().sqrt()
    if parameter.dim() > 1 and size > 0:
        filters = parameter.square().mean(tuple(range(1, parameter.dim())), keepdim=True).sqrt()
        return filters.clamp(min=float(_LEAST_FILTER * size))
    if size == 0:
        size = parameter.new_tensor(1.0) if beside is None else beside.flatten(1).norm(dim=1).mean()
    return size.reshape([1] * parameter.dim())


def master_copies(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Copies of modules to be tuned, with half-precision weights in float32."""
    from torch import nn

    copies = copied(nn.ModuleList(modules))
    if any(p.dtype in _HALF for p in copies.parameters()):
        copies.float()
    return list(copies.children())


def tunable(
    real: Sequence[nn.Module], copies: Sequence[nn.Module], wanted: Callable[[Tensor], bool]
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Parameters to tune: the network's own, the copy's, and the copy's weight beside it.

    All other parameters of the copies stop requiring gradients.
    """
    found: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
    for ours, theirs in zip(real, copies, strict=True):
        for mine, other in zip(ours.modules(), theirs.modules(), strict=True):
            own = dict(other.named_parameters(recurse=False))
            beside = next((p.detach() for p in own.values() if p.dim() > 1), None)
            for name, parameter in mine.named_parameters(recurse=False):
                own[name].requires_grad_(wanted(parameter))
                if wanted(parameter):
                    found.setdefault(id(parameter), (parameter, own[name], beside))
    return list(found.values())

"""The widths that are left, and those that torch's own layers tell as attributes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from chanprune_ext.module_modes import evaluating
from chanprune_ext.module_tree import modules_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence, Sized

__all__ = ["WIDTH_NAMES", "restore_widths", "set_widths", "shape_after"]

WIDTH_NAMES = frozenset(
    {
        *("in_channels", "out_channels", "in_features", "out_features", "num_features"),
        *("num_channels", "normalized_shape", "num_parameters", "embedding_dim"),
    }
)

Changes = list[tuple[nn.Module, str, Any]]


def shape_after(shape: Sequence[int], kept: Mapping[int, Sized]) -> list[int]:
    """The shape of a tensor of which only some indices are kept, given by dim."""
    left = list(shape)
    for dim, indices in kept.items():
        left[dim] = len(indices)
    return left


def set_widths(model: nn.Module) -> Changes:
    """Let layers tell the widths of the tensors they hold, all of them or none.

    Returns:
        Each attribute that was another, with the value it had: for :func:`restore_widths`.
    """
    changes: Changes = []
    # In training mode, spectral norm would move on when looked at. Where the model is followed on
    # stand-ins, looking is no step of its forward.
    try:
        with torch._C.DisableTorchFunction(), evaluating(model), torch.no_grad():  # noqa: SLF001
            for _, module in modules_of(model):
                for name, width in _widths(module).items():
                    old = getattr(module, name, None)
                    if old != width:
                        changes.append((module, name, old))
                        setattr(module, name, width)
    except BaseException:
        restore_widths(changes)
        raise
    return changes


def restore_widths(changes: Changes) -> None:
    """Put back what :func:`set_widths` has changed."""
    for module, name, old in reversed(changes):
        setattr(module, name, old)


def _weight(module: nn.Module) -> Tensor | None:
    weight = module._parameters.get("weight")  # noqa: SLF001 - a parametrised one is no parameter
    found = getattr(module, "weight", None) if weight is None else weight
    return found if isinstance(found, Tensor) else None


def _widths(module: nn.Module) -> dict[str, Any]:
    if not isinstance(module, _LAYERS):
        return {}
    weight = _weight(module)
    if isinstance(module, nn.modules.conv._ConvNd):
        first, second = weight.shape[:2] if weight is not None else (0, 0)
        if module.transposed:
            return {"in_channels": first, "out_channels": second * module.groups}
        return {"out_channels": first, "in_channels": second * module.groups}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        vector = weight if weight is not None else module.running_mean
        return {} if vector is None else {"num_features": vector.shape[0]}
    if weight is None:
        return {}
    if isinstance(module, nn.Linear):
        return {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": weight.shape[0]}
    if isinstance(module, nn.LayerNorm):
        return {"normalized_shape": tuple(weight.shape)}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": weight.shape[0]}
    return {"embedding_dim": weight.shape[1]}


_LAYERS = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    *(nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.PReLU, nn.Embedding),
)

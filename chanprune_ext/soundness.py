"""Which tensors of a model hold numbers that nothing can be computed with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["is_sound"]

_STATISTICS = frozenset(("running_mean", "running_var"))


def is_sound(name: str, tensor: Tensor, *, parameter: bool | None = None) -> bool:
    """Whether all values are finite, or infinite where that is meant.

    A mask of attention, for example, is a buffer, or a parameter, of zeros and -inf; a bound that
    nothing has been measured for yet is a buffer of one number, inf.

    Args:
        name: Name in the model.
        tensor: Values of any dtype.
        parameter: Whether it is one. Default: whether it is an ``nn.Parameter``.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    values = tensor.detach()
    if values.dtype.itemsize == 1:  # float8 has no isfinite
        values = values.float()
    if bool(torch.isfinite(values).all()):
        return True
    if parameter is None:
        parameter = isinstance(tensor, nn.Parameter)
    if tensor.is_complex() or name.rpartition(".")[2] in _STATISTICS:
        return False
    if parameter:
        zero = values == 0
        return bool(zero.any() and (zero | values.isneginf()).all())
    if not values.dim() and bool(values.isposinf()):
        return True
    return not bool((values.isnan() | values.isposinf()).any())

"""Copies of models that lose nothing: what ``copy.deepcopy`` drops is carried over."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

__all__ = ["copied"]


def copied(model: nn.Module, replacements: Mapping[int, Tensor] | None = None) -> nn.Module:
    """A deep copy of ``model``, with gradients and attributes of its parameters.

    Tensors that a forward or a hook computes (older weight norm) and stores as plain attributes,
    alone or in a list, have a history that cannot be copied; the copy gets their values.

    Args:
        model: The model; left untouched.
        replacements: ``id`` of a tensor of ``model`` -> the tensor that takes its place wherever it
            occurs.

    Raises:
        InvalidArgumentError: Something the model holds cannot be copied.
    """
    memo: dict[int, Any] = dict(replacements or {})
    for module in model.modules():
        for tensor in tensors_in(list(module.__dict__.values())):
            if not tensor.is_leaf:
                memo.setdefault(id(tensor), tensor.detach().clone())
    given = frozenset(memo)
    try:
        result = copy.deepcopy(model, memo)
    except Exception as error:
        raise InvalidArgumentError(
            f"the model cannot be copied ({type(error).__name__}: {error}); prune it with "
            f"inplace=True, or remove what cannot be copied from it first"
        ) from error
    for parameter in model.parameters():
        if id(parameter) not in given:
            carry_over(parameter, memo[id(parameter)], memo)
            if parameter.grad is not None:
                memo[id(parameter)].grad = parameter.grad.clone()
    return result


def carry_over(old: Tensor, new: Tensor, memo: dict[int, Any]) -> None:
    """Give ``new`` the attributes that were set on ``old``."""
    if old.__dict__:
        new.__dict__.update(copy.deepcopy(old.__dict__, memo))

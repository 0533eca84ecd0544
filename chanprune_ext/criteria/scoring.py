"""Scores of all groups by one criterion, checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from chanprune_ext.analysis.stand_ins import tensors_of
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.soundness import is_sound

from .geometric import fpgm
from .magnitude import bn_scale, l1, l2, linf, random
from .members import Scores

if TYPE_CHECKING:
    from chanprune_ext.analysis import CouplingGroup

__all__ = ["CRITERIA", "DATA_CRITERIA", "Criterion", "score_groups"]

Criterion = Callable[[nn.Module, "Sequence[CouplingGroup]", int], Scores]

CRITERIA: dict[str, Criterion] = {
    "l1": l1,
    "l2": l2,
    "linf": linf,
    "bn_scale": bn_scale,
    "fpgm": fpgm,
    "random": random,
}
"""Criteria that need nothing but the weights, by name."""

DATA_CRITERIA = ("activation", "fluctuation", "taylor", "hessian")
"""Functions of this package that make a criterion out of data."""


def score_groups(
    model: nn.Module, groups: Sequence[CouplingGroup], criterion: str | Criterion, seed: int = 0
) -> Scores:
    """Score every unit of every group.

    Args:
        model: The model the groups were found in.
        groups: Coupling groups.
        criterion: A name of :data:`CRITERIA`, or a function ``(model, groups, seed)`` that returns
            one array of ``group.units`` finite numbers for each group.
        seed: Seed of criteria that draw numbers.

    Raises:
        InvalidArgumentError: Unknown name, non-finite weights, weights without values (meta), or a
            function that returns something else.
    """
    if isinstance(criterion, str) and criterion in DATA_CRITERIA:
        raise InvalidArgumentError(
            f"criterion {criterion!r} needs data: give "
            f"criterion=chanprune_ext.criteria.{criterion}(batches)"
        )
    if isinstance(criterion, str) and criterion not in CRITERIA:
        raise InvalidArgumentError(
            f"criterion must be one of {', '.join(CRITERIA)} or a function, got {criterion!r}"
        )
    if criterion != "random":
        _check_values(model)
    function = CRITERIA[criterion] if isinstance(criterion, str) else criterion
    _check_made(function)
    scores = [np.asarray(s, dtype=np.float64) for s in function(model, groups, seed)]
    if len(scores) != len(groups):
        raise InvalidArgumentError(
            f"criterion gave scores for {len(scores)} of {len(groups)} groups; expected one array "
            f"for each"
        )
    for group, score in zip(groups, scores, strict=True):
        if score.shape != (group.units,) or not np.isfinite(score).all():
            raise InvalidArgumentError(
                f"criterion gave scores of shape {score.shape} for group '{group.name}', or not "
                f"all finite; expected {group.units} finite numbers"
            )
    return scores


def _check_made(function: Callable[..., object]) -> None:
    """Refuses what can't be called as a criterion: a function that makes one, say."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # it does not tell
    try:
        signature.bind(*[None] * 3)
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise InvalidArgumentError(
            f"criterion: '{name}' can't be called with (model, groups, seed): {error}; if it makes "
            f"a criterion out of data, give criterion={name}(batches)"
        ) from None


def _check_values(model: nn.Module) -> None:
    tensors = {
        n: torch.view_as_real(t.detach().resolve_conj()) if t.is_complex() else t
        for n, t in tensors_of(model).items()
        if t.is_meta or _holds_numbers(t)
    }
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise InvalidArgumentError(
                f"'{name}' is on the meta device and has no values to score; load the weights, or "
                f"use criterion='random'"
            )
    # One vectorised pass over each without a temporary, which NaN and Inf come through.
    with torch.no_grad():
        extremes = [bound for t in tensors.values() for bound in torch.aminmax(t)]
        kinds = {(t.dtype, t.device) for t in tensors.values()}
        if all(
            bool(
                torch.isfinite(torch.stack([e for e in extremes if (e.dtype, e.device) == k])).all()
            )
            for k in kinds
        ):
            return
    for name, tensor in tensors_of(model).items():
        if not is_sound(name, tensor):
            raise InvalidArgumentError(
                f"'{name}' contains NaN or Inf; channels of such a model cannot be ranked"
            )


def _holds_numbers(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel() > 0

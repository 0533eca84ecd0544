"""How important is a channel: one score per unit of each coupling group, high = keep.

A unit's score aggregates all members that make its channels: the norm of everything a removal
would delete on the producing side. Criteria work on many groups at once, so that all weights of a
model are read in one call of the native op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from chanprune_ext.analysis.stand_ins import tensors_of
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.ops import channel_norms

if TYPE_CHECKING:
    from chanprune_ext.analysis import CouplingGroup

__all__ = ["CRITERIA", "Criterion", "score_groups"]

Scores = list[np.ndarray]
Criterion = Callable[[nn.Module, "Sequence[CouplingGroup]", int], Scores]


def _norms(
    model: nn.Module, groups: Sequence[CouplingGroup], p: float, wanted: Callable[..., bool]
) -> Scores:
    """Lp norm of all slices that ``wanted(member, tensor)`` selects, taken together per unit."""
    tensors = tensors_of(model)
    keys: dict[tuple[str, int], int] = {}
    for group in groups:
        for member in group.members:
            if wanted(member, tensors[member.entry]):
                keys.setdefault((member.entry, member.dim), len(keys))
    weights = [tensors[entry].detach() for entry, _ in keys]
    norms = [n.cpu().double().numpy() for n in channel_norms(weights, [dim for _, dim in keys], p)]
    scores = []
    for group in groups:
        parts = [
            norms[keys[m.entry, m.dim]][m.indices]
            for m in group.members
            if wanted(m, tensors[m.entry])
        ]
        scores.append(_combined(parts, p, group.units))
    return scores


def _combined(parts: list[np.ndarray], p: float, units: int) -> np.ndarray:
    if not parts:
        return np.zeros(units)
    joined = np.concatenate(parts, axis=1)
    if p == 1:
        return np.asarray(joined.sum(axis=1))
    if p == 2:
        return np.sqrt(np.square(joined).sum(axis=1))
    return np.asarray(joined.max(axis=1))


def _makes_channels(member: Any, tensor: Tensor) -> bool:
    return bool(member.role == "out" and tensor.dim() > 1)


def _scales_channels(member: Any, tensor: Tensor) -> bool:
    return bool(
        member.role == "with" and tensor.dim() == 1 and member.entry.rpartition(".")[2] == "weight"
    )


def l1(model: nn.Module, groups: Sequence[CouplingGroup], seed: int) -> Scores:
    """Sum of absolute weights (Li et al., Pruning Filters for Efficient ConvNets)."""
    return _norms(model, groups, 1.0, _makes_channels)


def l2(model: nn.Module, groups: Sequence[CouplingGroup], seed: int) -> Scores:
    """Euclidean norm of the filters (He et al., Soft Filter Pruning)."""
    return _norms(model, groups, 2.0, _makes_channels)


def linf(model: nn.Module, groups: Sequence[CouplingGroup], seed: int) -> Scores:
    """Largest absolute weight of the filters."""
    return _norms(model, groups, float("inf"), _makes_channels)


def bn_scale(model: nn.Module, groups: Sequence[CouplingGroup], seed: int) -> Scores:
    """Absolute scale of the normalisation layers (Liu et al., Network Slimming).

    A group without any scale is ranked by the L1 norm of its filters.
    """
    scales = _norms(model, groups, 1.0, _scales_channels)
    filters = l1(model, groups, seed)
    tensors = tensors_of(model)
    return [
        scale if any(_scales_channels(m, tensors[m.entry]) for m in group.members) else norm
        for group, scale, norm in zip(groups, scales, filters, strict=True)
    ]


def random(model: nn.Module, groups: Sequence[CouplingGroup], seed: int) -> Scores:
    """Uniform noise: the control that every criterion has to beat."""
    generator = np.random.default_rng(seed)
    return [generator.random(group.units) for group in groups]


CRITERIA: dict[str, Criterion] = {
    "l1": l1,
    "l2": l2,
    "linf": linf,
    "bn_scale": bn_scale,
    "random": random,
}


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
    if isinstance(criterion, str) and criterion not in CRITERIA:
        raise InvalidArgumentError(
            f"criterion must be one of {', '.join(CRITERIA)} or a function, got {criterion!r}"
        )
    if criterion != "random":
        _check_values(model)
    function = CRITERIA[criterion] if isinstance(criterion, str) else criterion
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


def _check_values(model: nn.Module) -> None:
    for name, tensor in tensors_of(model).items():
        if tensor.is_meta:
            raise InvalidArgumentError(
                f"'{name}' is on the meta device and has no values to score; load the weights, or "
                f"use criterion='random'"
            )
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # One vectorised pass without a temporary, which NaN and Inf come through.
        if not bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all()):
            raise InvalidArgumentError(
                f"'{name}' contains NaN or Inf; channels of such a model cannot be ranked"
            )

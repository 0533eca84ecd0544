"""Criteria on the weights alone: norms, the scale of batch norms, and chance as the control."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chanprune_ext.analysis.stand_ins import tensors_of
from chanprune_ext.devices import by_device
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.ops import channel_norms
from chanprune_ext.ops.accumulation import widened

from .members import Scores, chosen_members, joined, normalised

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from chanprune_ext.analysis import CouplingGroup
    from chanprune_ext.analysis.groups import Member

MEMBERS = ("makers", "readers", "both")

__all__ = ["bn_scale", "l1", "l2", "linf", "magnitude", "random"]


def magnitude(
    p: float = 1.0, *, members: str = "both", reduction: str = "mean", normalise: bool = True
) -> Callable[[nn.Module, Sequence[CouplingGroup], int], Scores]:
    """A criterion: Lp norm of the weights that belong to a unit; complex ones by their moduli.

    Args:
        p: 1, 2 or ``math.inf``.
        members: ``"makers"`` (the filters that make the channel), ``"readers"`` (the weights that
            the next layers read it with) or ``"both"``: the geometric mean of the two. Default:
            both. What a filter's norm is worth is up to the batch norm behind it, and to how that
            was folded; the readers' norm is what the network makes of the channel, and ranks best
            where compensation follows.
        reduction: How members are joined: ``"sum"``, ``"mean"`` or ``"max"``. Default: mean.
        normalise: Divide each member's norms by their mean first, so that large layers do not
            drown small ones. Default: True.

    Returns:
        A function for the ``criterion`` argument of :func:`chanprune_ext.plan`.

    Raises:
        InvalidArgumentError: An argument is not as described.
    """
    if p not in (1, 2, np.inf):
        raise InvalidArgumentError(f"p must be 1, 2 or math.inf, got {p!r}")
    joined([], reduction, 0)
    if members not in MEMBERS:
        raise InvalidArgumentError(f"members must be one of {', '.join(MEMBERS)}, got {members!r}")

    def criterion(model: nn.Module, groups: Sequence[CouplingGroup], seed: int) -> Scores:
        return _norms(model, groups, p, members, reduction, normalise)

    criterion.__name__ = f"magnitude(p={p:g}, {members}, {reduction})"
    return criterion


def _norms(
    model: nn.Module,
    groups: Sequence[CouplingGroup],
    p: float,
    members: str,
    reduction: str,
    normalise: bool,
) -> Scores:
    """All weights of the model are read in one call of the native operator for each device."""
    tensors = tensors_of(model)
    sides = ("makers", "readers") if members == "both" else (members,)
    chosen = [[chosen_members(group, tensors, side) for side in sides] for group in groups]
    keys: dict[tuple[str, int], int] = {}
    for member in (m for found in chosen for side in found for m in side):
        keys.setdefault((member.entry, member.dim), len(keys))
    weights = [_measurable(tensors[entry].detach()) for entry, _ in keys]
    norms = _norms_of(weights, [dim for _, dim in keys], p)
    scores = []
    for group, found in zip(groups, chosen, strict=True):
        parts = []
        for side in found:
            of_members = [_of_units(norms[keys[m.entry, m.dim]][m.indices], p) for m in side]
            if normalise:
                of_members = [normalised(part) for part in of_members]
            parts.append(joined(of_members, reduction, group.units))
        # The geometric mean: a factor moved from a filter to its readers changes nothing, and a
        # channel that nothing makes, or nothing reads, is worth nothing.
        scores.append(np.prod(parts, axis=0) ** (1 / len(parts)))
    return scores


def _norms_of(weights: Sequence[Tensor], dims: Sequence[int], p: float) -> list[np.ndarray]:
    norms: dict[int, np.ndarray] = {}
    for here in by_device(weights):
        found = channel_norms([weights[i] for i in here], [dims[i] for i in here], p)
        norms |= {i: n.cpu().double().numpy() for i, n in zip(here, found, strict=True)}
    return [norms[i] for i in range(len(weights))]


def _measurable(weight: Tensor) -> Tensor:
    """Numbers of the same size in a dtype that the native operator takes."""
    if weight.is_complex():
        return weight.abs()
    return weight if weight.is_floating_point() else widened(weight)


def _of_units(norms: np.ndarray, p: float) -> np.ndarray:
    """Norms of units out of the norms (units, m) of their slices."""
    if p == 1:
        return np.asarray(norms.sum(axis=1))
    if p == 2:
        return np.sqrt(np.square(norms).sum(axis=1))
    return np.asarray(norms.max(axis=1))


def l1(model: nn.Module, groups: Sequence[CouplingGroup], seed: int) -> Scores:
    """Sum of the absolute weights that make a channel, times that of those that read it.

    Each layer's mean over its channels counts as 1, several makers (readers) are averaged, and the
    root of the product of both is the score: the path norm through the channel. Li et al. 2017,
    "Pruning Filters for Efficient ConvNets", sum the filter that makes the channel alone;
    ``magnitude(members="makers")`` does.
    """
    return _norms(model, groups, 1.0, "both", "mean", normalise=True)


def l2(model: nn.Module, groups: Sequence[CouplingGroup], seed: int) -> Scores:
    """As :func:`l1`, with the Euclidean norm (He et al. 2018, Soft Filter Pruning)."""
    return _norms(model, groups, 2.0, "both", "mean", normalise=True)


def linf(model: nn.Module, groups: Sequence[CouplingGroup], seed: int) -> Scores:
    """As :func:`l1`, with the largest absolute weight."""
    return _norms(model, groups, float("inf"), "both", "mean", normalise=True)


def bn_scale(model: nn.Module, groups: Sequence[CouplingGroup], seed: int) -> Scores:
    """Absolute scale of the normalisation layers (Liu et al. 2017, Network Slimming).

    Several are added up. A group without any scale is ranked by :func:`l1`.
    """
    tensors = tensors_of(model)
    scores = []
    for group, norm in zip(groups, l1(model, groups, seed), strict=True):
        scales = [
            tensors[m.entry].detach().abs().cpu().double().numpy()[m.indices].sum(axis=1)
            for m in group.members
            if _is_scale(m, tensors[m.entry].dim())
        ]
        scores.append(joined(scales, "sum", group.units) if scales else norm)
    return scores


def _is_scale(member: Member, dims: int) -> bool:
    return member.role == "with" and dims == 1 and member.entry.rpartition(".")[2] == "weight"


def random(model: nn.Module, groups: Sequence[CouplingGroup], seed: int) -> Scores:
    """Uniform noise: the control that every criterion has to beat."""
    generator = np.random.default_rng(seed)
    return [generator.random(group.units) for group in groups]

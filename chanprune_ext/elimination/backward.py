"""Backward elimination: which inputs a linear layer misses least, once refitted to the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

__all__ = ["Elimination", "Problem", "eliminate"]

# Units that go in one round, as a share of those left. One at a time for narrow layers; for wide
# ones a hundredth at a time, which chooses as well and is a hundred times cheaper.
_ROUND = 1 / 96


@dataclass
class Problem:
    """One least-squares problem: ``rows ~ weights @ columns``, with columns about to go.

    Attributes:
        inverse: ``(G + l I)^-1`` of the columns, ``[n, n]``, float64; overwritten.
        weights: The solution with all columns left, ``[rows, n]``, float64; overwritten.
        columns: Columns that each unit takes with it, ``[units, m]``; -1 fills up.
        scale: What a unit of squared error counts.
    """

    inverse: Tensor
    weights: Tensor
    columns: Tensor
    scale: float

    def costs(self, units: Tensor) -> Tensor:
        """Increase of the weighted squared error if each of ``units`` went alone."""
        columns = self.columns[units]
        absent = columns < 0
        columns = columns.clamp(min=0)
        block = self.inverse[columns.unsqueeze(2), columns.unsqueeze(1)]
        part = self.weights[:, columns].permute(1, 2, 0).contiguous()  # units, m, rows
        if bool(absent.any()):
            part[absent] = 0
            gap = absent.unsqueeze(1) | absent.unsqueeze(2)
            block = torch.where(
                gap, torch.eye(block.shape[-1], dtype=block.dtype, device=block.device), block
            )
        half = torch.linalg.solve_triangular(_lower(block), part, upper=False)
        return half.square().sum((1, 2)) * self.scale

    def remove(self, units: Tensor) -> None:
        """Takes the columns of ``units`` out and refits the rest."""
        gone = self.columns[units].flatten()
        gone = gone[gone >= 0]
        if not len(gone):
            return
        factor = _lower(self.inverse[gone][:, gone])
        cross = torch.linalg.solve_triangular(factor, self.inverse[gone], upper=False)
        part = torch.linalg.solve_triangular(factor, self.weights[:, gone].mT, upper=False)
        self.weights.addmm_(part.mT, cross, alpha=-1)
        self.inverse.addmm_(cross.mT, cross, alpha=-1)
        # What is left of the removed columns is round-off.
        self.weights[:, gone] = 0
        self.inverse[gone] = 0
        self.inverse[:, gone] = 0


def _lower(blocks: Tensor) -> Tensor:
    """Cholesky factors; where round-off has eaten a block's last digits, of a block nearby."""
    factors, failed = torch.linalg.cholesky_ex(blocks)
    strength = 1e-12
    while bool(failed.any()) and strength < 1:
        diagonal = blocks.diagonal(dim1=-2, dim2=-1).abs().mean(-1)[..., None, None]
        eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
        factors, failed = torch.linalg.cholesky_ex(blocks + strength * diagonal * eye)
        strength *= 100
    return factors


@dataclass(frozen=True)
class Elimination:
    """The order in which units went.

    Attributes:
        order: All units, the first to go first.
        increase: What each of them added to the weighted squared error.
        states: The weights of all problems after so many units had gone, for each stop.
    """

    order: Tensor
    increase: Tensor
    states: dict[int, list[Tensor]]


def eliminate(problems: Sequence[Problem], units: int, stops: Collection[int] = ()) -> Elimination:
    """Removes one unit after the other, always those that cost least.

    With ``P = (G + l I)^-1`` and ``W = C P``, removing the columns ``c`` raises the squared error
    by ``tr(W_c (P_cc)^-1 W_c^T)``; then ``W -= W_c (P_cc)^-1 P_c:`` and
    ``P -= P_:c (P_cc)^-1 P_c:`` (the optimal brain surgeon of Hassibi and Stork, 1993, for blocks
    of columns and the least-squares objective).

    Args:
        problems: What reads the units; overwritten.
        units: How many units there are.
        stops: Numbers of removed units at which to note the weights; where several units go at a
            time, the weights are those of the next number met.
    """
    left = torch.arange(units, device=problems[0].columns.device)
    order: list[Tensor] = []
    increase: list[Tensor] = []
    states: dict[int, list[Tensor]] = {}
    pending = sorted(stops)
    while len(left):
        costs = torch.stack([problem.costs(left) for problem in problems]).sum(0)
        count = max(1, int(len(left) * _ROUND))
        cheapest, positions = costs.topk(count, largest=False)
        order.append(left[positions])
        increase.append(cheapest.clamp(min=0))
        for problem in problems:
            problem.remove(left[positions])
        keep = torch.ones_like(left, dtype=torch.bool)
        keep[positions] = False
        left = left[keep]
        while pending and units - len(left) >= pending[0]:
            states[pending.pop(0)] = [problem.weights.clone() for problem in problems]
    return Elimination(torch.cat(order), torch.cat(increase), states)

"""The ridge systems behind every fit, solved in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InvalidArgumentError

if TYPE_CHECKING:
    from .moments import Moments

__all__ = ["Solution", "Solver", "quadratic_loss"]

# Below this fraction of its mean diagonal a float64 Gram matrix has no digits left to factorise.
_ROUND_OFF = 1e-14
# Up to this many unknowns the effective rank is computed exactly, above it is estimated.
_EXACT_TRACE = 1024


@dataclass(frozen=True)
class Solution:
    """A change of weights.

    Attributes:
        weight: ``[groups, rows, columns]``, float64.
        intercept: ``[groups, rows]``, float64; None where the layer cannot hold one.
    """

    weight: Tensor
    intercept: Tensor | None

    def __add__(self, other: Solution) -> Solution:
        """Both changes, one after the other."""
        if self.intercept is None or other.intercept is None:
            return Solution(self.weight + other.weight, None)
        return Solution(self.weight + other.weight, self.intercept + other.intercept)

    def applied(self, columns: Tensor) -> Tensor:
        """What the change adds to the rows, ``[groups, rows, samples]``, in ``columns``' dtype."""
        added = self.weight.to(columns.dtype) @ columns
        if self.intercept is not None:
            added += self.intercept.to(columns.dtype).unsqueeze(-1)
        return added


class Solver:
    """Factorises ``G + lambda I`` once and solves for any right-hand side.

    With an intercept the moments are centred first, so that the intercept carries no penalty.
    ``lambda`` is ``ridge`` times the mean of the diagonal of ``G``, group by group; where the
    factorisation fails, it is raised tenfold until it succeeds.

    Args:
        moments: Moments of the columns.
        ridge: Strength of the ridge, relative to the mean energy of a column.
        intercept: Whether the layer can hold an intercept.

    Attributes:
        ridge: The strength that was used.
        condition: Estimated condition number of the factorised matrix, the worst group's.
        rank: Effective number of unknowns per row, ``tr G (G + lambda I)^-1``, of all groups.
    """

    def __init__(self, moments: Moments, ridge: float, *, intercept: bool) -> None:
        if not bool(torch.isfinite(moments.gram).all()):
            raise InvalidArgumentError(
                "batches: the activations they cause in the pruned network are not finite"
            )
        samples = max(1, moments.samples)
        gram = moments.gram / samples
        energy = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        self._mean = moments.column_sum / samples if intercept else None
        if self._mean is not None:
            gram = gram - self._mean.unsqueeze(-1) * self._mean.unsqueeze(-2)
        size = gram.shape[-1]
        floor = torch.where(energy > 0, energy, torch.ones_like(energy))
        self.ridge = max(ridge, _ROUND_OFF)
        while True:
            self._lambda = (self.ridge * floor).reshape(-1, 1, 1)
            shifted = gram + self._lambda * torch.eye(size, dtype=gram.dtype, device=gram.device)
            self._factor, failed = torch.linalg.cholesky_ex(shifted)
            if not bool(failed.any()):
                break
            self.ridge *= 10
        self._shifted = shifted
        self.rank, self.condition = self._spectrum(size)

    def _spectrum(self, size: int) -> tuple[float, float]:
        groups = self._factor.shape[0]
        if size <= _EXACT_TRACE:
            probes = torch.eye(size, dtype=self._factor.dtype, device=self._factor.device)
            probes = probes.expand(groups, size, size)
            share = 1.0
        else:  # Random signs estimate a trace without the inverse of a large matrix.
            generator = torch.Generator("cpu").manual_seed(0)
            signs = (
                torch.randint(2, (groups, size, 32), generator=generator, device="cpu") * 2.0 - 1.0
            )
            probes = signs.to(self._factor)
            share = 1 / 32
        half = torch.linalg.solve_triangular(self._factor, probes, upper=False)
        lost = self._lambda.flatten() * half.square().sum((-2, -1)) * share
        # A few power iterations on the matrix and on its inverse: enough digits for a report.
        largest = smallest = torch.ones_like(self._shifted[..., :1])
        top = bottom = torch.ones_like(largest[..., :1, :])
        for _ in range(8):
            largest, top = _normalised(self._shifted @ largest)
            smallest, bottom = _normalised(torch.cholesky_solve(smallest, self._factor))
        return float((size - lost).sum()), float((top * bottom).max())

    def solve(self, moments: Moments, made: Solution | None = None) -> Solution:
        """The change of weights that explains the residual best.

        Minimises ``E|r - D x - d|^2 + lambda |M + D|^2`` over ``D`` and the intercept ``d``.

        Args:
            moments: Moments of the residual, and the columns this solver was made from.
            made: The change ``M`` made already: the ridge pulls towards the weights without it.
        """
        samples = max(1, moments.samples)
        cross = moments.cross / samples
        mean_row = moments.row_sum / samples
        if self._mean is not None:
            cross = cross - mean_row.unsqueeze(-1) * self._mean.unsqueeze(-2)
        if made is not None:
            cross = cross - self._lambda * made.weight
        weight = torch.cholesky_solve(cross.mT, self._factor).mT
        if self._mean is None:
            return Solution(weight, None)
        return Solution(weight, mean_row - (weight @ self._mean.unsqueeze(-1)).squeeze(-1))


def quadratic_loss(moments: Moments, change: Solution) -> Tensor:
    """Mean squared residual left by a change of the weights, ``[groups, rows]``, from moments."""
    samples = max(1, moments.samples)
    w = change.weight
    loss = moments.row_energy - 2 * (w * moments.cross).sum(-1)
    loss = loss + ((w @ moments.gram) * w).sum(-1)
    if change.intercept is not None:
        d = change.intercept
        explained = (w @ moments.column_sum.unsqueeze(-1)).squeeze(-1)
        loss = loss + 2 * d * (explained - moments.row_sum) + d.square() * moments.samples
    return loss / samples


def _normalised(vectors: Tensor) -> tuple[Tensor, Tensor]:
    lengths = vectors.norm(dim=-2, keepdim=True)
    return vectors / lengths, lengths

"""Least squares from second moments, for more samples than unknowns."""

from __future__ import annotations

import torch
from torch import Tensor

from .ridge import Change, Factor, penalised_energy

__all__ = ["Moments"]


class Moments:
    """Sums over samples of ``x x^T``, ``r x^T``, ``x``, ``r`` and ``r^2``, in float64.

    Products are formed in the precision of the data over pieces of bounded size and added up in
    float64, so the unfolded input never exists as a whole.

    Args:
        groups: Number of separate systems.
        rows: Output channels per group.
        columns: Unknowns per output channel.
        device: Where the sums live.

    Attributes:
        samples: Number of samples added, or the sum of their weights.
        gram: Sum of ``x x^T``, ``[groups, columns, columns]``.
        cross: Sum of ``r x^T``, ``[groups, rows, columns]``.
        column_sum: Sum of ``x``, ``[groups, columns]``.
        row_sum: Sum of ``r``, ``[groups, rows]``.
        row_energy: Sum of ``r^2``, ``[groups, rows]``.
    """

    def __init__(self, groups: int, rows: int, columns: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64, device=device)

        self.samples = 0.0
        self.gram = zeros(columns, columns)
        self.cross = zeros(rows, columns)
        self.column_sum = zeros(columns)
        self.row_sum = zeros(rows)
        self.row_energy = zeros(rows)

    def add(self, columns: Tensor, residual: Tensor, weight: float = 1.0) -> None:
        """Adds a piece: ``[groups, columns, samples]`` and ``[groups, rows, samples]``.

        Args:
            columns: What the weights multiply.
            residual: What they should add.
            weight: How often each sample counts.
        """
        self.samples += weight * columns.shape[-1]
        self.gram += weight * (columns @ columns.mT)
        self.column_sum += weight * columns.sum(-1)
        self.add_residual(columns, residual, weight)

    def add_residual(self, columns: Tensor, residual: Tensor, weight: float = 1.0) -> None:
        """Adds a residual on columns that were added before."""
        self.cross += weight * (residual @ columns.mT)
        self.row_sum += weight * residual.sum(-1)
        self.row_energy += weight * residual.square().sum(-1)

    def clear_residual(self) -> None:
        """Forgets the residual and keeps what is known of the columns."""
        for total in (self.cross, self.row_sum, self.row_energy):
            total.zero_()

    def solver(self, ridge: float, *, intercept: bool) -> MomentSolver:
        """Factorises the moments of the columns."""
        return MomentSolver(self, ridge, intercept=intercept)

    def loss(self, change: Change | None) -> float:
        """Mean squared residual left by a change, summed over rows."""
        loss = self.row_energy
        if change is not None:
            w = change.weight
            loss = loss - 2 * (w * self.cross).sum(-1) + ((w @ self.gram) * w).sum(-1)
            if change.intercept is not None:
                d = change.intercept
                explained = (w @ self.column_sum.unsqueeze(-1)).squeeze(-1)
                loss = loss + 2 * d * (explained - self.row_sum) + d.square() * self.samples
        return float(loss.sum()) / self.samples


class MomentSolver:
    """Solves ``D = (C - lambda M) (G + lambda I)^-1`` with ``G = E[x x^T]``, ``C = E[r x^T]``.

    With an intercept the moments are centred first, so that the intercept carries no penalty.

    Args:
        moments: Moments of the columns; their residual may change later.
        ridge: Strength of the ridge, relative to the mean energy of a column.
        intercept: Whether the layer can hold an intercept.
    """

    def __init__(self, moments: Moments, ridge: float, *, intercept: bool) -> None:
        self._moments = moments
        gram = moments.gram / moments.samples
        energy = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        self._mean = moments.column_sum / moments.samples if intercept else None
        if self._mean is not None:
            gram = gram - self._mean.unsqueeze(-1) * self._mean.unsqueeze(-2)
            energy = penalised_energy(energy, gram.diagonal(dim1=-2, dim2=-1).mean(-1))
        self._columns = gram.shape[-1]
        self._factor = Factor(gram, energy, ridge)
        self.ridge = self._factor.ridge

    def solve(self, made: Change | None = None) -> Change:
        """The change that explains the moments' present residual best."""
        cross = self._moments.cross / self._moments.samples
        mean_row = self._moments.row_sum / self._moments.samples
        if self._mean is not None:
            cross = cross - mean_row.unsqueeze(-1) * self._mean.unsqueeze(-2)
        if made is not None:
            cross = cross - self._factor.penalty * made.weight
        weight = self._factor.solve(cross.mT).mT
        if self._mean is None:
            return Change(weight, None)
        return Change(weight, mean_row - (weight @ self._mean.unsqueeze(-1)).squeeze(-1))

    def spectrum(self) -> tuple[float, float]:
        """Effective number of unknowns and condition number."""
        top, bottom = self._factor.extremes()
        return float((self._columns - self._factor.lost()).sum()), float((top / bottom).max())

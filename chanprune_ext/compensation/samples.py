"""Least squares from the samples themselves, for fewer samples than unknowns."""

from __future__ import annotations

import torch
from torch import Tensor

from .ridge import Change, Factor, penalised_energy

__all__ = ["Samples"]


class Samples:
    """All columns and residuals, kept as they are.

    A linear layer behind a large feature map has tens of thousands of unknowns per row, and a few
    hundred samples: its columns are much smaller than their Gram matrix.
    """

    def __init__(self) -> None:
        self._columns: list[Tensor] = []
        self._residuals: list[Tensor] = []

    @property
    def samples(self) -> int:
        """Number of samples added."""
        return sum(piece.shape[-1] for piece in self._columns)

    @property
    def columns(self) -> Tensor:
        """``[groups, columns, samples]``, float64."""
        return torch.cat(self._columns, -1).double()

    @property
    def residual(self) -> Tensor:
        """``[groups, rows, samples]``, float64."""
        return torch.cat(self._residuals, -1).double()

    def add(self, columns: Tensor, residual: Tensor, weight: float = 1.0) -> None:
        """Adds a piece: ``[groups, columns, samples]`` and ``[groups, rows, samples]``."""
        assert weight == 1.0, "all samples count alike here"
        self._columns.append(columns.clone())
        self._residuals.append(residual.clone())

    def add_residual(self, _: Tensor, residual: Tensor, weight: float = 1.0) -> None:
        """Adds a residual on columns that were added before, in the same order."""
        assert weight == 1.0, "all samples count alike here"
        self._residuals.append(residual.clone())

    def clear_residual(self) -> None:
        """Forgets the residual and keeps the columns."""
        self._residuals = []

    def solver(self, ridge: float, *, intercept: bool) -> SampleSolver:
        """Factorises the products of the samples with each other."""
        return SampleSolver(self, ridge, intercept=intercept)

    def loss(self, change: Change | None) -> float:
        """Mean squared residual left by a change, summed over rows."""
        total = 0.0
        for columns, residual in zip(self._columns, self._residuals, strict=True):
            left = residual if change is None else residual - change.applied(columns)
            total += float(left.square().sum())
        return total / self.samples


class SampleSolver:
    """The same ridge solution as from moments, by a system of one unknown a sample.

    ``(G + lambda I)^-1 X = X (X^T X / n + lambda I)^-1``, so with ``N = M + D``, the change in all,
    ``N = (R + M X) (X^T X / n + lambda I)^-1 X^T / n``. Centred where there is an intercept.

    Args:
        samples: Columns ``X`` and residual ``R``; the residual may change later.
        ridge: Strength of the ridge, relative to the mean energy of a column.
        intercept: Whether the layer can hold an intercept.
    """

    def __init__(self, samples: Samples, ridge: float, *, intercept: bool) -> None:
        self._samples = samples
        self._columns = samples.columns
        energy = self._columns.square().mean((-2, -1))
        self._mean = self._columns.mean(-1, keepdim=True) if intercept else None
        if self._mean is not None:
            self._columns = self._columns - self._mean
            energy = penalised_energy(energy, self._columns.square().mean((-2, -1)))
        self._count = self._columns.shape[-1]
        self._factor = Factor(self._columns.mT @ self._columns / self._count, energy, ridge)
        self.ridge = self._factor.ridge

    def solve(self, made: Change | None = None) -> Change:
        """The change that explains the samples' present residual best."""
        residual = self._samples.residual
        mean_row = residual.mean(-1, keepdim=True)
        centred = residual if self._mean is None else residual - mean_row
        if made is not None:
            centred = centred + made.weight @ self._columns
        weight = self._factor.solve(centred.mT).mT @ self._columns.mT / self._count
        if made is not None:
            weight = weight - made.weight
        if self._mean is None:
            return Change(weight, None)
        return Change(weight, (mean_row - weight @ self._mean).squeeze(-1))

    def spectrum(self) -> tuple[float, float]:
        """Effective number of unknowns and condition number."""
        top, bottom = self._factor.extremes()
        # Directions that no sample has are left to the ridge alone.
        if self._columns.shape[-2] > self._count:
            bottom = torch.minimum(bottom, self._factor.penalty.flatten())
        return float((self._count - self._factor.lost()).sum()), float((top / bottom).max())

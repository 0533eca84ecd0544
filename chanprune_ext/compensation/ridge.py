"""Changes of weights, and the factorised ridge systems they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import InvalidArgumentError

__all__ = ["Change", "Evidence", "Factor", "Solver", "penalised_energy"]

# Below this fraction of its mean diagonal a float64 Gram matrix has no digits left to factorise.
_ROUND_OFF = 1e-14
# Up to this size the trace of an inverse is computed exactly, above it is estimated.
_EXACT_TRACE = 1024
_PROBES = 32
# What features behind a ReLU have of energy, in variances, is less than this.
_MOST_ENERGY = 4


@dataclass(frozen=True)
class Change:
    """A change of weights.

    Attributes:
        weight: ``[groups, rows, columns]``, float64.
        intercept: ``[groups, rows]``, float64; None where the layer cannot hold one.
    """

    weight: Tensor
    intercept: Tensor | None

    def __add__(self, other: Change) -> Change:
        """Both changes, one after the other."""
        if self.intercept is None or other.intercept is None:
            return Change(self.weight + other.weight, None)
        return Change(self.weight + other.weight, self.intercept + other.intercept)

    def applied(self, columns: Tensor) -> Tensor:
        """What the change adds to the rows, ``[groups, rows, samples]``, in ``columns``' dtype."""
        added = self.weight.to(columns.dtype) @ columns
        if self.intercept is not None:
            added += self.intercept.to(columns.dtype).unsqueeze(-1)
        return added


def penalised_energy(energy: Tensor, variance: Tensor) -> Tensor:
    """The mean energy of a column that a ridge is relative to, where there is an intercept.

    An offset of the columns, which the intercept takes up, counts to some extent only: a large one
    would stiffen the fit of all that varies.
    """
    return torch.minimum(energy, _MOST_ENERGY * variance)


class Solver(Protocol):
    """A factorised system that finds the best change for any residual.

    Attributes:
        ridge: Strength of the ridge that was used, relative to the mean energy of a column.
    """

    ridge: float

    def solve(self, made: Change | None = None) -> Change:
        """The change that explains the present residual best.

        Minimises ``E|r - D x - d|^2 + lambda |M + D|^2`` over ``D`` and the intercept ``d``.

        Args:
            made: The change ``M`` made already: the ridge pulls towards the weights without it.
        """

    def spectrum(self) -> tuple[float, float]:
        """Effective number of unknowns, ``tr G (G + lambda I)^-1``, and condition number.

        Unknowns are counted per output channel and summed over groups; the condition number is an
        estimate, and the worst group's.
        """


class Evidence(Protocol):
    """What is known of columns and residual: moments, or the samples themselves."""

    @property
    def samples(self) -> float:
        """Number of samples added, or the sum of their weights."""

    def add(self, columns: Tensor, residual: Tensor, weight: float = 1.0) -> None:
        """Adds a piece: ``[groups, columns, samples]`` and ``[groups, rows, samples]``."""

    def add_residual(self, columns: Tensor, residual: Tensor, weight: float = 1.0) -> None:
        """Adds a residual on columns that were added before, in the same order."""

    def clear_residual(self) -> None:
        """Forgets the residual and keeps what is known of the columns."""

    def solver(self, ridge: float, *, intercept: bool) -> Solver:
        """A solver for this evidence."""

    def loss(self, change: Change | None) -> float:
        """Mean squared residual left by a change, summed over rows."""


class Factor:
    """The Cholesky factor of ``A + lambda I``, group by group.

    ``lambda`` is ``ridge`` times ``energy``; where the factorisation fails for round-off, ``ridge``
    is raised tenfold until it succeeds.

    Args:
        matrix: ``A``, positive semi-definite, ``[groups, n, n]``.
        energy: Mean energy of a column, ``[groups]``.
        ridge: Strength of the ridge.

    Attributes:
        ridge: The strength that was used.
        penalty: ``lambda``, ``[groups, 1, 1]``.
    """

    def __init__(self, matrix: Tensor, energy: Tensor, ridge: float) -> None:
        if not bool(torch.isfinite(matrix).all()):
            raise InvalidArgumentError(
                "batches: the activations they cause in the pruned network are not finite"
            )
        unit = torch.where(energy > 0, energy, torch.ones_like(energy)).reshape(-1, 1, 1)
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        self.ridge = max(ridge, _ROUND_OFF)
        while True:
            self.penalty = self.ridge * unit
            self._matrix = matrix + self.penalty * eye
            self._factor, failed = torch.linalg.cholesky_ex(self._matrix)
            if not bool(failed.any()):
                break
            self.ridge *= 10

    @property
    def lower(self) -> Tensor:
        """The factor itself, ``[groups, n, n]``."""
        return self._factor

    @property
    def matrix(self) -> Tensor:
        """``A + lambda I``, ``[groups, n, n]``."""
        return self._matrix

    def solve(self, right: Tensor) -> Tensor:
        """``(A + lambda I)^-1 right``, for ``right`` of ``[groups, n, k]``."""
        return torch.cholesky_solve(right, self._factor)

    def lost(self) -> Tensor:
        """``lambda tr (A + lambda I)^-1``, ``[groups]``: directions that the ridge has taken."""
        groups, size = self._matrix.shape[:2]
        if size <= _EXACT_TRACE:
            eye = torch.eye(size, dtype=self._factor.dtype, device=self._factor.device)
            probes, share = eye.expand(groups, size, size), 1.0
        else:  # Random signs estimate a trace without the inverse of a large matrix.
            generator = torch.Generator("cpu").manual_seed(0)
            coins = torch.randint(2, (groups, size, _PROBES), generator=generator, device="cpu")
            probes, share = (2.0 * coins - 1.0).to(self._factor), 1 / _PROBES
        half = torch.linalg.solve_triangular(self._factor, probes, upper=False)
        return self.penalty.flatten() * half.square().sum((-2, -1)) * share

    def extremes(self) -> tuple[Tensor, Tensor]:
        """Largest and smallest eigenvalue of ``A + lambda I``, estimated, ``[groups]`` each."""
        largest = smallest = torch.ones_like(self._matrix[..., :1])
        top = bottom = torch.ones_like(largest[..., :1, :])
        for _ in range(8):  # power iterations: enough digits for a report
            largest, top = _normalised(self._matrix @ largest)
            smallest, bottom = _normalised(self.solve(smallest))
        return top.flatten(), 1 / bottom.flatten()


def _normalised(vectors: Tensor) -> tuple[Tensor, Tensor]:
    lengths = vectors.norm(dim=-2, keepdim=True)
    return vectors / lengths, lengths

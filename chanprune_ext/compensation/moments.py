"""Second moments of a layer's columns and of what they should explain, piece by piece."""

from __future__ import annotations

import torch
from torch import Tensor

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
        samples: Number of samples added.
        gram: Sum of ``x x^T``, ``[groups, columns, columns]``.
        cross: Sum of ``r x^T``, ``[groups, rows, columns]``.
        column_sum: Sum of ``x``, ``[groups, columns]``.
        row_sum: Sum of ``r``, ``[groups, rows]``.
        row_energy: Sum of ``r^2``, ``[groups, rows]``.
    """

    def __init__(self, groups: int, rows: int, columns: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64, device=device)

        self.samples = 0
        self.gram = zeros(columns, columns)
        self.cross = zeros(rows, columns)
        self.column_sum = zeros(columns)
        self.row_sum = zeros(rows)
        self.row_energy = zeros(rows)

    def add(self, columns: Tensor, residual: Tensor) -> None:
        """Adds the samples of one piece.

        Args:
            columns: ``[groups, columns, samples]``.
            residual: What a change of the weights should add, ``[groups, rows, samples]``.
        """
        self.samples += columns.shape[-1]
        self.gram += columns @ columns.mT
        self.column_sum += columns.sum(-1)
        self.add_residual(columns, residual)

    def add_residual(self, columns: Tensor, residual: Tensor) -> None:
        """Adds a residual on columns that were added before."""
        self.cross += residual @ columns.mT
        self.row_sum += residual.sum(-1)
        self.row_energy += residual.square().sum(-1)

    def clear_residual(self) -> None:
        """Forgets the residual and keeps what is known of the columns."""
        for total in (self.cross, self.row_sum, self.row_energy):
            total.zero_()

"""Second moments of a layer's columns and of what they should explain, piece by piece."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear_maps import LinearMap

__all__ = ["Moments"]


class Moments:
    """Sums over samples of ``x x^T``, ``r x^T``, ``x``, ``r`` and ``r^2``, in float64.

    Products are formed in the precision of the data (at least float32) over pieces of bounded size
    and added up in float64, so the unfolded input never exists as a whole.

    Args:
        geometry: The layer.
        columns: Columns per group.
        rows: Output channels per group.
        device: Where the sums live.
        piece: Most elements of one unfolded piece.
    """

    def __init__(
        self, geometry: LinearMap, columns: int, rows: int, device: torch.device, piece: int
    ) -> None:
        groups = geometry.groups
        self.geometry = geometry
        self.piece = piece
        self.samples = 0

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64, device=device)

        self.gram = zeros(columns, columns)
        self.cross = zeros(rows, columns)
        self.column_sum = zeros(columns)
        self.row_sum = zeros(rows)
        self.row_energy = zeros(rows)

    def clear_rows(self) -> None:
        """Forgets the residual and keeps what is known of the columns."""
        for total in (self.cross, self.row_sum, self.row_energy):
            total.zero_()

    def add(self, x: Tensor, residual: Tensor, *, gram: bool = True) -> None:
        """Adds the samples of one batch.

        Args:
            x: Input of the layer's call.
            residual: What a change of the weights should add to the call's output.
            gram: Also add to ``gram`` and ``column_sum``; False when they are known already.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        for x_piece, r_piece in self.geometry.chunks(x, residual, self.piece):
            columns = self.geometry.columns(x_piece.to(dtype))
            rows = self.geometry.rows(r_piece.to(dtype))
            if gram:
                self.gram += columns @ columns.mT
                self.column_sum += columns.sum(-1, dtype=torch.float64)
                self.samples += columns.shape[-1]
            self.cross += rows @ columns.mT
            self.row_sum += rows.sum(-1, dtype=torch.float64)
            self.row_energy += rows.square().sum(-1, dtype=torch.float64)

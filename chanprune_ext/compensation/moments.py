"""Second moments of a layer's columns and of what they should explain, piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .linear_maps import LinearMap, unfolded

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Moments"]


class Moments:
    """Sums over samples of ``x x^T``, ``r x^T``, ``x``, ``r`` and ``r^2``, in float64.

    Products are formed in the precision of the data (at least float32) over pieces of bounded size
    and added up in float64, so the unfolded input never exists as a whole.

    Args:
        maps: The layers whose outputs are added up; several only if none has groups.
        columns: Unknowns per row and group, of all layers together.
        rows: Output channels per group.
        device: Where the sums live.
        piece: Most elements of one unfolded piece.
        every: Take every n-th position along each spatial axis only.
    """

    def __init__(
        self,
        maps: Sequence[LinearMap],
        columns: int,
        rows: int,
        device: torch.device,
        piece: int,
        every: int = 1,
    ) -> None:
        groups = maps[0].groups
        self._maps = maps
        self._piece = piece
        self._every = every
        self._turn = 0
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
        self._turn = 0

    def add(self, inputs: Sequence[Tensor], residual: Tensor, *, gram: bool = True) -> None:
        """Adds the samples of one batch.

        Args:
            inputs: Inputs of the layers.
            residual: What a change of the weights should add to the sum of their outputs.
            gram: Also add to ``gram`` and ``column_sum``; False when they are known already.
        """
        dtype = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
        pieces = unfolded(
            self._maps,
            [x.to(dtype) for x in inputs],
            residual.to(dtype),
            size=self._piece,
            every=self._every,
            turn=self._turn,
        )
        for columns, rows in pieces:
            self._turn += 1
            if gram:
                self.gram += columns @ columns.mT
                self.column_sum += columns.sum(-1)
                self.samples += columns.shape[-1]
            self.cross += rows @ columns.mT
            self.row_sum += rows.sum(-1)
            self.row_energy += rows.square().sum(-1)

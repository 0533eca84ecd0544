"""What was changed, so that it can be undone."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Ledger"]


class Ledger:
    """Keeps the first value of every tensor that is about to be changed in place."""

    def __init__(self) -> None:
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}

    def remember(self, *tensors: Tensor | None) -> None:
        """Notes the values of tensors that were not noted before."""
        for tensor in tensors:
            if tensor is not None and id(tensor) not in self._saved:
                self._saved[id(tensor)] = (tensor, tensor.detach().clone())

    def restore(self) -> None:
        """Puts every noted value back."""
        with torch.no_grad():
            for tensor, value in self._saved.values():
                tensor.copy_(value)

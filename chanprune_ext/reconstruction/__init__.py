"""Accuracy back block by block: gradients, but no labels and no end-to-end training."""

from __future__ import annotations

from .procedure import reconstruct
from .report import BlockReport, ReconstructionReport

__all__ = ["BlockReport", "ReconstructionReport", "reconstruct"]

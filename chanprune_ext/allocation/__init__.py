"""How many channels stay where: by ratios, thresholds, a global ranking, or within a budget."""

from __future__ import annotations

from .selection import Budget

__all__ = ["Budget"]

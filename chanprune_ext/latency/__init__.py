"""Measured time: of whole networks, of their layers, and of layers at widths not built yet."""

from __future__ import annotations

from .measurement import Latency, measure_latency, time_in_turns

__all__ = ["Latency", "measure_latency", "time_in_turns"]

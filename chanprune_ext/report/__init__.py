"""The record of a run as plain numbers, and the self-contained page drawn from it."""

from __future__ import annotations

from .page import render_html, write_report
from .record import (
    LayerWidth,
    Reference,
    RunReport,
    Stage,
    StageLatency,
    TrainingEpoch,
    environment,
    load_report,
)

__all__ = [
    "LayerWidth",
    "Reference",
    "RunReport",
    "Stage",
    "StageLatency",
    "TrainingEpoch",
    "environment",
    "load_report",
    "render_html",
    "write_report",
]

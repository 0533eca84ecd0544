"""The record of a run as plain numbers, and the self-contained page drawn from it."""

from __future__ import annotations

from .run_report import (
    LayerWidth,
    Reference,
    RunReport,
    Stage,
    StageLatency,
    TrainingEpoch,
    environment,
    load_report,
    make_folder,
    render_html,
    write_report,
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
    "make_folder",
    "render_html",
    "write_report",
]

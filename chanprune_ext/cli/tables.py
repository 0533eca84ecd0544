"""The tables that commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from chanprune_ext.quantities import (
    accuracy_error,
    format_accuracy,
    format_bytes,
    format_count,
    format_milliseconds,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chanprune_ext.file_checks import Check
    from chanprune_ext.jobs.trials import TrialResult
    from chanprune_ext.report import Stage

__all__ = ["check_table", "facts_table", "stage_table", "trial_table"]


def stage_table(stages: Sequence[Stage], title: str) -> Table:
    """Table of a run, narrow enough for 80 columns; MACs and latency relative to the first row."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("stage", no_wrap=True)
    for heading in ("top-1", "params", "MACs", "latency", "file"):
        table.add_column(heading, justify="right", no_wrap=True)
    first = stages[0]
    for stage in stages:
        latency = size = "-"
        if stage.latency is not None:
            median = format_milliseconds(stage.latency.median_ms)
            latency = f"{median} {stage.latency.speedup:.2f}x"
        if stage.file_bytes is not None:
            size = format_bytes(stage.file_bytes)
        table.add_row(
            stage.name,
            format_accuracy(stage.accuracy, stage.standard_error),
            format_count(stage.params),
            f"{format_count(stage.macs)} {stage.macs / first.macs:.2f}x",
            latency,
            size,
        )
    return table


def trial_table(baseline: float, n: int, results: Sequence[TrialResult], title: str) -> Table:
    """One row a way of pruning: mean over the draws and their spread, beside the original."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    # Words may wrap, figures must not be cut.
    table.add_column("no labels")
    for heading in ("top-1", "drop", "agree", "MACs", "params"):
        cells = "100.0 ± 1.6 %" if heading == "top-1" else heading
        table.add_column(heading, justify="right", no_wrap=True, min_width=len(cells))
    table.add_column("published")
    error = accuracy_error(baseline, n)
    table.add_row("original", format_accuracy(baseline, error), "", "", "x1", "x1", "")
    for result in results:
        spread = result.spread if len(result.draws) > 1 else None
        table.add_row(
            result.name,
            format_accuracy(result.top1, spread),
            f"{100 * (baseline - result.top1):.2f}",
            f"{100 * result.agreement:.1f} %",
            f"x{result.macs_share:.2f}",
            f"x{result.params_share:.2f}",
            result.published,
        )
    return table


def facts_table(facts: Mapping[str, object]) -> Table:
    """Two columns, name and value, without borders."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table


def check_table(checks: Sequence[Check], title: str) -> Table:
    """One row a check: how it went, its name, what was found."""
    marks = {
        True: Text("ok", "green"),
        False: Text("failed", "bold red"),
        None: Text("-", "yellow"),
    }
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=False
    )
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for check in checks:
        table.add_row(marks[check.passed], check.name, Text(check.detail))
    return table

"""What a whole job shows on the terminal."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

from rich.console import Console

from chanprune_ext.cli.tables import stage_table
from chanprune_ext.jobs.pipeline import Job, run_job

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["command_line", "run_and_print"]


def run_and_print(job: Job, out: Path) -> None:
    """Runs a job, tells each step, prints the table and where the report is."""
    console = Console()
    report = run_job(job, out, command=command_line(), say=say)
    console.print()
    console.print(stage_table(report.stages, report.title))
    samples = report.stages[0].samples
    console.print(f"top-1: n = {samples:,}, with one standard error", style="dim")
    console.print(f"latency: {report.conditions}", style="dim")
    console.print("x: MACs and speed relative to the original", style="dim")
    for note in report.notes:
        console.print(note, style="dim", highlight=False, markup=False)
    console.print(f"report: {out / 'report.html'}", soft_wrap=True)


def say(line: str) -> None:
    """Announces a step."""
    Console().print(f"[bold cyan]>[/] {line}")


def command_line() -> str:
    """The command line as one would type it again."""
    return shlex.join(["chanprune", *sys.argv[1:]])

"""What a whole job shows on the terminal."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from chanprune_ext.cli.tables import stage_table
from chanprune_ext.cli.terminal import plain_console
from chanprune_ext.jobs.pipeline import Job, run_job
from chanprune_ext.recovery import RecoveryInterrupted

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "INTERRUPTED",
    "announcement",
    "command_line",
    "print_interruption",
    "run_and_print",
    "say",
]

INTERRUPTED = 130  # what a shell reports of a program that SIGINT ended


def run_and_print(job: Job, out: Path, *, resume: bool | None = None) -> None:
    """Runs a job, tells each step, prints the table and where the report is.

    ``resume`` is as for :func:`chanprune_ext.jobs.pipeline.run_job`.
    """
    console = plain_console()
    try:
        report = run_job(job, out, command=command_line(), say=say, resume=resume)
    except RecoveryInterrupted as interruption:
        print_interruption(interruption, "--resume")
        raise typer.Exit(INTERRUPTED) from interruption
    console.print()
    console.print(stage_table(report.stages, report.title))
    samples = report.stages[0].samples
    console.print(f"top-1: n = {samples:,}, with one standard error", style="dim")
    console.print(f"latency: {report.conditions}", style="dim")
    console.print("x: MACs and speed relative to the original", style="dim")
    for note in report.notes:
        console.print(note, style="dim", highlight=False)
    console.print(f"report: {out / 'report.html'}", soft_wrap=True)


def print_interruption(interruption: RecoveryInterrupted, option: str) -> None:
    """Says how far a training came, and with which option the same command goes on."""
    message = (
        f"interrupted after update {interruption.update} of {interruption.updates}; go on with "
        f"the same command and {option}"
    )
    plain_console(stderr=True).print(message, soft_wrap=True, highlight=False)


def say(line: str) -> None:
    """Announces a step."""
    plain_console().print(announcement(line))


def announcement(line: str) -> Text:
    """How a step is announced."""
    return Text.assemble((">", "bold cyan"), " ", line)


def command_line() -> str:
    """The command line as one would type it again."""
    return shlex.join(["chanprune", *sys.argv[1:]])

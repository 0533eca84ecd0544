"""``chanprune report``: renders a saved run again."""

from pathlib import Path
from typing import Annotated

import typer

from chanprune_ext.cli.tables import stage_table
from chanprune_ext.cli.terminal import plain_console
from chanprune_ext.report import load_report, write_report

__all__ = ["report"]


def report(
    run: Annotated[
        Path, typer.Argument(help="The folder of a run, or its report.json.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for report.html and report.json.", show_default="that of the run"
        ),
    ] = None,
) -> None:
    """Prints the table of a saved run and writes its HTML page again."""
    run = run / "report.json" if run.is_dir() else run
    saved = load_report(run)
    console = plain_console()
    console.print(stage_table(saved.stages, saved.title))
    console.print(f"report: {write_report(saved, out or run.parent)}", soft_wrap=True)

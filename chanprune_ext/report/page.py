"""The self-contained HTML page made from the record of a run.

It needs no network: charts are inline SVG, styles and the few lines of script are in the file.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING

from chanprune_ext.atomic_files import make_folder, write_text
from chanprune_ext.errors import OutputError
from chanprune_ext.quantities import (
    format_accuracy,
    format_bytes,
    format_count,
    format_milliseconds,
)

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from .record import RunReport

__all__ = ["render_html", "write_report"]


def render_html(report: RunReport) -> str:
    """Renders the report as one HTML page that needs nothing outside itself.

    Raises:
        OutputError: matplotlib or jinja2 is not installed.
    """
    try:
        import jinja2

        from . import chart_style, charts, sensitivity_charts, tradeoff_charts
    except ImportError as error:
        raise OutputError(
            f"an HTML report needs {error.name}; install it with: "
            "pip install 'chanprune_ext[report]'"
        ) from error

    source = files("chanprune_ext.report").joinpath("templates/report.html.j2").read_text("utf-8")
    templates = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    templates.trim_blocks = templates.lstrip_blocks = True
    templates.filters.update(
        accuracy=format_accuracy,
        bytes=format_bytes,
        count=format_count,
        milliseconds=format_milliseconds,
    )
    measured = [stage for stage in report.stages if stage.latency is not None]
    return templates.from_string(source).render(
        report=report,
        first=report.stages[0],
        last=report.stages[-1],
        accuracy_chart=charts.accuracy_chart(report.stages),
        tradeoff_chart=(
            tradeoff_charts.tradeoff_chart(report.stages, report.references)
            if len({stage.macs for stage in report.stages}) > 1 or report.references
            else ""
        ),
        letters=tradeoff_charts.LETTERS,
        latency_chart=charts.latency_chart(report.stages) if measured else "",
        widths_chart=charts.widths_chart(report.widths) if report.widths else "",
        training_chart=charts.training_chart(report) if report.history else "",
        sensitivity_chart=(
            sensitivity_charts.sensitivity_chart(report.sensitivity) if report.sensitivity else ""
        ),
        stage_colors=chart_style.STAGE_COLORS,
    )


def write_report(report: RunReport, folder: str | os.PathLike[str]) -> Path:
    """Writes ``report.json`` and ``report.html`` into a folder, which is made where missing.

    Returns:
        Path of the HTML page.

    Raises:
        OutputError: The folder or a file cannot be written; no partial file is left.
    """
    texts = {
        "report.json": json.dumps(report.to_dict(), indent=2) + "\n",
        "report.html": render_html(report),
    }
    target = make_folder(folder)
    for name, text in texts.items():
        write_text(target / name, text)
    return target / "report.html"

"""The report's bars and curves: accuracy, latency, widths and training, as inline SVG."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from matplotlib.ticker import FuncFormatter, MaxNLocator

from chanprune_ext.quantities import format_accuracy, format_milliseconds

from .chart_style import INK, MUTED, PLACEHOLDERS, SURFACE, add_tip, as_svg, new_figure, stage_color

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .record import LayerWidth, RunReport, Stage

__all__ = [
    "accuracy_chart",
    "latency_chart",
    "training_chart",
    "widths_chart",
]

_MOST_NAMED_LAYERS = 36


def accuracy_chart(stages: Sequence[Stage]) -> str:
    """Draws the accuracy of every stage with its standard error, the first as a reference line."""
    figure, axes = _stage_axes(len(stages))
    tips: dict[str, str] = {}
    for row, stage in enumerate(stages):
        value, error = stage.accuracy * 100, stage.standard_error * 100
        _stage_bar(axes, row, value, (error, error), tips, f"{stage.name}: n = {stage.samples}")
        label = format_accuracy(stage.accuracy, stage.standard_error)
        # In a column of their own, where the reference line does not cross them.
        axes.text(104, row, label, va="center", weight="bold", color=INK)
    axes.axvline(stages[0].accuracy * 100, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlim(0, 122)
    axes.set_xticks(range(0, 101, 20), labels=[f"{tick} %" for tick in range(0, 101, 20)])
    _name_rows(axes, [stage.name for stage in stages])
    return as_svg(figure, "accuracy", "Accuracy of each stage with standard error", tips)


def latency_chart(stages: Sequence[Stage]) -> str:
    """Draws the measured latency of every stage that has one, with the quartiles as whiskers."""
    rows = [(row, stage.name, stage.latency) for row, stage in enumerate(stages) if stage.latency]
    figure, axes = _stage_axes(len(rows))
    tips: dict[str, str] = {}
    longest = max(latency.high_ms for _, _, latency in rows)
    for position, (row, name, latency) in enumerate(rows):
        whiskers = (latency.median_ms - latency.low_ms, latency.high_ms - latency.median_ms)
        tip = (
            f"{name}: quartiles {format_milliseconds(latency.low_ms)} "
            f"to {format_milliseconds(latency.high_ms)}"
        )
        _stage_bar(axes, position, latency.median_ms, whiskers, tips, tip, color_of=row)
        label = format_milliseconds(latency.median_ms)
        if position:
            label += f", {latency.speedup:.2f} times as fast"
        place = latency.high_ms + 0.012 * longest
        axes.text(place, position, label, va="center", weight="bold", color=INK)
    axes.set_xlim(0, longest * 1.28)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} ms"))
    _name_rows(axes, [name for _, name, _ in rows])
    return as_svg(figure, "latency", "Measured latency of each stage", tips)


def widths_chart(widths: Sequence[LayerWidth]) -> str:
    """Draws output channels per layer in execution order: what was there and what is kept."""
    named = len(widths) <= _MOST_NAMED_LAYERS
    figure, (axes,) = new_figure(3.6 if named else 3.0)
    tips: dict[str, str] = {}
    for column, layer in enumerate(widths):
        tip = f"{layer.name}: {layer.before} → {layer.after} channels"
        for kind, height in (("before", layer.before), ("after", layer.after)):
            (bar,) = axes.bar(column, height, width=0.78, color=PLACEHOLDERS[f"--{kind}"])
            add_tip(bar, f"{kind}-{column}", tip, tips)
    axes.set_xlim(-0.7, len(widths) - 0.3)
    axes.set_ylabel("output channels")
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.grid(visible=False, axis="x")
    if named:
        labels = [layer.name for layer in widths]
        axes.set_xticks(range(len(widths)), labels=labels, rotation=60, ha="right", va="top")
        axes.tick_params(axis="x", labelsize=9, pad=2)
        for tick in axes.get_xticklabels():
            tick.set_rotation_mode("anchor")
    else:
        axes.set_xlabel("layer, in execution order (hover for names)")
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    return as_svg(figure, "widths", "Output channels of each layer before and after pruning", tips)


def training_chart(report: RunReport) -> str:
    """Draws loss, validation accuracy and learning rate of the recovery epochs, side by side."""
    history = report.history
    epochs = [record.epoch for record in history]
    validated = [
        (record.epoch, record.val_accuracy * 100)
        for record in history
        if record.val_accuracy is not None
    ]
    figure, (loss_axes, accuracy_axes, rate_axes) = new_figure(2.7, 3)
    tips: dict[str, str] = {}
    _curve(loss_axes, "training loss", epochs, [record.loss for record in history], tips, 1)
    _curve(
        accuracy_axes,
        "validation accuracy (%)",
        [epoch for epoch, _ in validated],
        [accuracy for _, accuracy in validated],
        tips,
        3,
    )
    rates = [record.learning_rate for record in history]
    _curve(rate_axes, "learning rate", epochs, rates, tips, 2)
    rate_axes.set_ylim(bottom=0)
    return as_svg(figure, "training", "Recovery: loss, validation accuracy, learning rate", tips)


def _curve(
    axes: Axes,
    title: str,
    x: Sequence[int],
    y: Sequence[float],
    tips: dict[str, str],
    color: int,
) -> None:
    """Draws one training curve; each point has its value as tooltip."""
    hue = stage_color(color)
    axes.plot(x, y, color=hue, linewidth=1.8)
    kind = title.split(" ", maxsplit=1)[0]
    for epoch, value in zip(x, y, strict=True):
        if not math.isfinite(value):
            continue
        (point,) = axes.plot(
            [epoch], [value], marker="o", markersize=5, color=hue, markeredgecolor=SURFACE
        )
        add_tip(point, f"{kind}-{epoch}", f"epoch {epoch}: {value:.4g}", tips)
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.06, y=0.12)


def _stage_axes(rows: int) -> tuple[Figure, Axes]:
    """Axes for horizontal bars, one row per stage, first on top."""
    figure, (axes,) = new_figure(0.55 + 0.48 * rows)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_visible(False)
    return figure, axes


def _stage_bar(
    axes: Axes,
    row: int,
    value: float,
    whiskers: tuple[float, float],
    tips: dict[str, str],
    tip: str,
    color_of: int | None = None,
) -> None:
    """Draws one horizontal bar with whiskers (lengths below and above the value)."""
    stage = row if color_of is None else color_of
    (bar,) = axes.barh(row, value, height=0.62, color=stage_color(stage))
    add_tip(bar, f"bar-{row}", tip, tips)
    below, above = whiskers
    axes.plot([value - below, value + above], [row, row], color=INK, linewidth=1.2)
    for end in (value - below, value + above):
        axes.plot([end, end], [row - 0.11, row + 0.11], color=INK, linewidth=1.2)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), labels=names)
    axes.tick_params(axis="y", labelcolor=INK, pad=6)
    axes.set_ylim(len(names) - 0.5, -0.5)

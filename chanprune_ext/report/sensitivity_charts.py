"""The report's drawing of sensitivity curves: every group a line, the most sensitive ones named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.ticker import FuncFormatter

from ..sensitivity import told_apart
from .chart_style import GRID, INK, MUTED, add_tip, as_svg, new_figure, stage_color

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

__all__ = ["sensitivity_chart"]

_NAMED = 5  # groups with a colour and a name


def sensitivity_chart(data: Mapping[str, Any]) -> str:
    """Draws accuracy (with labels) or KL divergence or output error of each group against ratio.

    Args:
        data: What :meth:`chanprune_ext.sensitivity.Sensitivity.to_dict` returns. Where points were
            compensated, a second panel shows them on the same scale.
    """
    kind, title, scale = _quantity(data)
    panels = [("as cut", [curve[kind] for curve in data["curves"]])]
    after = [curve.get("compensated") for curve in data["curves"]]
    if after and all(curve is not None for curve in after):
        panels.append(("compensated", [curve[kind] for curve in after]))
    figure, axes = new_figure(3.6, len(panels), sharey=True)
    tips: dict[str, str] = {}
    start = 100 * data["accuracy"] if kind == "accuracy" else 0.0
    for panel, (name, values) in zip(axes, panels, strict=True):
        scaled = [[start, *(scale * v for v in curve)] for curve in values]
        _panel(panel, data, scaled, f"{title}, {name}", name, tips, rising=kind != "accuracy")
    return as_svg(figure, "sensitivity", f"{title} of each group against the share removed", tips)


def _quantity(data: Mapping[str, Any]) -> tuple[str, str, float]:
    curves = data["curves"]
    if data.get("accuracy") is not None and all(c.get("accuracy") for c in curves):
        return "accuracy", "accuracy (%)", 100.0
    if curves and all(c.get("kl") for c in curves):
        return "kl", "KL divergence (nats)", 1.0
    return "error", "relative output error", 1.0


def _panel(
    axes: Axes,
    data: Mapping[str, Any],
    values: Sequence[Sequence[float]],
    title: str,
    name: str,
    tips: dict[str, str],
    *,
    rising: bool,
) -> None:
    ratios = [0.0, *data["ratios"]]
    names = told_apart([(curve["group"], curve.get("kind", "")) for curve in data["curves"]])
    order = sorted(range(len(values)), key=lambda i: sum(values[i]), reverse=rising)
    for rank, number in reversed(list(enumerate(order))):
        named = rank < _NAMED
        colour = stage_color(rank + 1) if named else MUTED
        label = names[number] if named else None
        (line,) = axes.plot(
            ratios,
            values[number],
            color=colour,
            linewidth=1.8 if named else 0.9,
            alpha=1.0 if named else 0.45,
            label=label,
        )
        points = ", ".join(
            f"{r:.0%}: {v:.3g}" for r, v in zip(data["ratios"], values[number][1:], strict=True)
        )
        add_tip(line, f"{name}-{number}", f"{names[number]} ({points})", tips)
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    axes.set_xlabel("share of the group removed")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        labels[::-1],
        fontsize=8.5,
        facecolor="none",
        edgecolor=GRID,
        labelcolor=INK,
    )

"""The report's drawing of accuracy against cost: the run's stages among results from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_lowercase
from typing import TYPE_CHECKING

from matplotlib.ticker import FuncFormatter, MaxNLocator

from .chart_style import INK, MUTED, SURFACE, add_tip, as_svg, new_figure, stage_color

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from .record import Reference, Stage

__all__ = ["LETTERS", "tradeoff_chart"]

# Points of accuracy. What lost more is drawn on the lower border: more than the first at least, the
# second at most, between them more than twice what the best of the run lost.
_WORST = -8.0, -30.0
_TIMES = "\N{MULTIPLICATION SIGN}"
LETTERS = ascii_lowercase  # of published results, in the chart and in the table below it


@dataclass(frozen=True)
class _Point:
    """Cost as a share of the original's, change of accuracy in points, and how it is drawn."""

    cost: float
    change: float
    name: str
    label: str
    color: str
    ours: bool


def tradeoff_chart(stages: Sequence[Stage], references: Sequence[Reference]) -> str:
    """Draws the change of accuracy against MACs, and against latency where any was measured.

    Both are relative to the unpruned network, each result's own: results from elsewhere began with
    other weights, and were measured on other images and machines.

    Args:
        stages: Of the run, the original first.
        references: Published results, named by letters in their order.

    Returns:
        An ``<svg>`` element, with one or two panels.
    """
    panels = [("multiply-accumulates", _by_macs(stages, references))]
    latency = _by_latency(stages, references)
    if any(point.ours for point in latency):
        panels.append(("measured time", latency))
    figure, axes = new_figure(3.7, len(panels), sharey=True)
    tips: dict[str, str] = {}
    changes = [point.change for _, points in panels for point in points]
    floor = _floor(changes, [p.change for p in panels[0][1] if p.ours][1:])
    for panel, (quantity, points) in zip(axes, panels, strict=True):
        _draw(panel, points, floor, quantity, tips)
    span = max(max(changes) - floor, 1.0)
    axes[0].set_ylim(floor - 0.12 * span, max(changes) + 0.12 * span)
    axes[0].set_ylabel("change of top-1 accuracy (points)")
    label = "Change of accuracy against multiply-accumulates and time"
    return as_svg(figure, "tradeoff", label, tips)


def _floor(changes: Sequence[float], pruned: Sequence[float]) -> float:
    """Where the lower border is: below all that did not lose much more than the best of the run."""
    worst = min(_WORST[0], max(_WORST[1], 2 * max(pruned, default=0.0)))
    inside = [change for change in changes if change >= worst]
    return min(inside) if len(inside) == len(changes) else min(inside) - 1.0


def _by_macs(stages: Sequence[Stage], references: Sequence[Reference]) -> list[_Point]:
    first = stages[0]
    points = [
        _stage_point(number, stage, first, stage.macs / first.macs)
        for number, stage in enumerate(stages)
    ]
    found = [_reference_point(n, r, r.macs_share) for n, r in enumerate(references)]
    return points + [point for point in found if point is not None]


def _by_latency(stages: Sequence[Stage], references: Sequence[Reference]) -> list[_Point]:
    points = [
        _stage_point(number, stage, stages[0], 1 / stage.latency.speedup)
        for number, stage in enumerate(stages)
        if stage.latency is not None
    ]
    found = [_reference_point(n, r, r.latency_share) for n, r in enumerate(references)]
    return points + [point for point in found if point is not None]


def _stage_point(number: int, stage: Stage, first: Stage, cost: float) -> _Point:
    change = 100 * (stage.accuracy - first.accuracy)
    return _Point(cost, change, stage.name, stage.name, stage_color(number), ours=True)


def _reference_point(number: int, reference: Reference, cost: float | None) -> _Point | None:
    if cost is None:
        return None
    letter = LETTERS[number % len(LETTERS)]
    return _Point(cost, 100 * reference.change, reference.name, letter, MUTED, ours=False)


def _draw(
    axes: Axes, points: Sequence[_Point], floor: float, quantity: str, tips: dict[str, str]
) -> None:
    for number, point in enumerate(points):
        below = point.change < floor
        shape = "v" if below else "o" if point.ours else "D"
        (marker,) = axes.plot(
            [point.cost],
            [max(point.change, floor)],
            marker=shape,
            markersize=9 if point.ours else 6,
            color=point.color if point.ours else SURFACE,
            markeredgecolor=SURFACE if point.ours else MUTED,
            linestyle="none",
        )
        tip = f"{point.name}: {_TIMES}{point.cost:.2f} {quantity}, {_signed(point.change)} points"
        add_tip(marker, f"{quantity.split(maxsplit=1)[0]}-{number}", tip, tips)
        if not point.ours or below:
            left = not below and _crowded(point, points)
            axes.annotate(
                f"{_signed(point.change)}" if below else point.label,
                (point.cost, max(point.change, floor)),
                xytext=(-8 if left else 8, -1),
                textcoords="offset points",
                ha="right" if left else "left",
                va="center",
                color=INK if below else MUTED,
                fontsize=9.5,
            )
    axes.axhline(0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    most = max(1.0, *(point.cost for point in points))
    axes.set_xlim(0, 1.08 * most)
    axes.set_xlabel(f"{quantity}, original = 1")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{_TIMES}{value:g}"))
    axes.yaxis.set_major_locator(MaxNLocator(7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _signed(value)))


def _crowded(point: _Point, points: Sequence[_Point]) -> bool:
    """Whether another point stands where the label on the right would go."""
    return any(
        0 < other.cost - point.cost < 0.1 and abs(other.change - point.change) < 0.5
        for other in points
    )


def _signed(value: float) -> str:
    if abs(value) < 0.05:
        return "0"
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")

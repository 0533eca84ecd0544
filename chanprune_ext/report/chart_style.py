"""How the charts of the report look, and how a drawing becomes a part of the page.

matplotlib draws with placeholder colours; in the finished SVG each placeholder is replaced by a CSS
variable of the page, and text stays text so that it takes the page's font. Elements given a tooltip
carry an SVG ``<title>``.
"""

from __future__ import annotations

import html
import io
import re
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

__all__ = [
    "GRID",
    "INK",
    "MUTED",
    "PLACEHOLDERS",
    "STAGE_COLORS",
    "SURFACE",
    "add_tip",
    "as_svg",
    "new_figure",
    "stage_color",
]

# CSS variable of the page for each stage in turn: the original is grey, the rest have a hue.
STAGE_COLORS = ("--stage-0", "--stage-1", "--stage-2", "--stage-3", "--stage-4", "--stage-5")

_VARIABLES = ("--ink", "--muted", "--grid", "--surface", "--before", "--after", *STAGE_COLORS)
# Placeholders are near-black colours that no other element of a figure uses.
PLACEHOLDERS = {name: f"#0a0b{number + 16:02x}" for number, name in enumerate(_VARIABLES)}
INK, MUTED, GRID, SURFACE = (
    PLACEHOLDERS[name] for name in ("--ink", "--muted", "--grid", "--surface")
)

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
_WIDTH = 9.6  # inches; the page scales the drawing to its column


def new_figure(
    height: float, panels: int = 1, *, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of the page's width, ``height`` inches high, with its panels from left to right."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        return figure, list(figure.subplots(1, panels, sharey=sharey, squeeze=False)[0])


def stage_color(number: int) -> str:
    """The placeholder of a stage's colour; the colours begin again after the last."""
    return PLACEHOLDERS[STAGE_COLORS[number % len(STAGE_COLORS)]]


def add_tip(artist: Artist, identity: str, text: str, tips: dict[str, str]) -> None:
    """Remembers a tooltip for an artist; :func:`as_svg` writes it into the drawing."""
    artist.set_gid(f"tip-{identity}")
    tips[f"tip-{identity}"] = text


def as_svg(figure: Figure, name: str, label: str, tips: Mapping[str, str]) -> str:
    """Returns the figure as an ``<svg>`` element for inlining, with a label for screen readers."""
    buffer = io.StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, count=1, flags=re.DOTALL)
    for variable, placeholder in PLACEHOLDERS.items():
        drawing = drawing.replace(placeholder, f"var({variable})")
    # The style element would apply to the whole page, and the page has its own font.
    drawing = re.sub(r"<style.*?</style>", "", drawing, count=1, flags=re.DOTALL)
    drawing = re.sub(r"font-family: [^;\"]*;", "", drawing)
    drawing = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--font)", drawing)
    for identity, text in tips.items():
        group = f'<g id="{identity}">'
        drawing = drawing.replace(group, f"<g><title>{html.escape(text)}</title>", 1)
    # Nothing refers to groups, and several drawings on one page would repeat their ids.
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)
    size = re.search(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', drawing)
    assert size is not None, "matplotlib always writes a viewBox"
    opening = (
        f'<svg class="chart" viewBox="{size.group(1)}" role="img" '
        f'aria-label="{html.escape(label)}" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return opening + drawing[size.end() :].strip()

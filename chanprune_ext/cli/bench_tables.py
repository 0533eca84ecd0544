"""The tables of ``chanprune bench``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from chanprune_ext.bench import BenchReport
    from chanprune_ext.latency.module_times import ModuleTime

__all__ = ["module_table", "row_table"]


def row_table(report: BenchReport, title: str) -> Table:
    """One row for each backend and batch size, original -> pruned."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for heading in ("batch", "latency, ms", "speed-up", "examples/s", "memory, MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report.rows:
        memory = "-"
        if row.original_memory is not None and row.pruned_memory is not None:
            memory = _change(row.original_memory / 1e6, row.pruned_memory / 1e6)
        table.add_row(
            row.backend,
            str(row.batch_size),
            _change(row.original_ms, row.pruned_ms),
            f"{row.speedup:.2f}x",
            _change(*row.throughput()),
            memory,
        )
    return table


def _change(before: float, after: float) -> str:
    return f"{before:.3g} -> {after:.3g}" if before < 1000 else f"{before:.0f} -> {after:.0f}"


def module_table(report: BenchReport, count: int) -> Table:
    """The modules that take most of the original's time, and what has become of it."""
    table = Table(
        title=f"where the time goes (eager, batch {report.modules_batch})",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
    )
    table.add_column("module", overflow="fold", min_width=16)
    table.add_column("kind", overflow="ellipsis", max_width=12)
    table.add_column("widths", no_wrap=True)
    for heading in ("time, ms", "saved"):
        table.add_column(heading, justify="right", no_wrap=True)
    pruned = {t.name: t for t in report.pruned_modules}
    pairs = [(t, pruned[t.name]) for t in report.original_modules if t.name in pruned]
    pairs.sort(key=lambda pair: -pair[0].milliseconds)
    rows = [(_name(b), b.kind, _widths(b, a), b.milliseconds, a.milliseconds) for b, a in pairs]
    shown, rest = rows[:count], rows[count:]
    if rest:
        before, after = sum(row[3] for row in rest), sum(row[4] for row in rest)
        shown.append((f"{len(rest)} others", "", "", before, after))
    for name, kind, widths, before, after in shown:
        table.add_row(
            name,
            kind,
            widths,
            f"{before:.2f} -> {after:.2f}",
            f"{1 - after / before:.0%}" if before else "-",
        )
    return table


def _name(module: ModuleTime) -> str:
    return module.name or "(itself)"


def _widths(before: ModuleTime, after: ModuleTime) -> str:
    if before.widths is None or after.widths is None:
        return ""
    old, new = (f"{a}x{b}" for a, b in (before.widths, after.widths))
    return old if old == new else f"{old} -> {new}"

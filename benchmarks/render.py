"""Turns JSON files of pytest-benchmark into a page with tables, plots and a small JSON.

`python benchmarks/render.py docs "a note on the run" runs/benchmarks*.json` writes benchmarks.md,
benchmarks.json (times and bytes, and of the machine only its processor) and one plot per operator.
Several files are the parts of one run: same machine, same torch.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

mpl.use("Agg")
import matplotlib.pyplot as plt

OURS = "ours"

INTRODUCTION = """# Benchmarks

Written by `make bench`; the numbers behind it are in [benchmarks.json](benchmarks.json).

{machine}

Every time is a median; the variants of a case are timed in turns, in changing order, in one
process, with threads bound to cores. *MB* are those that must move at least, *GB/s* is bytes over
time, *% of copy* and *% of read* compare it with copying and with summing 256 MB in the same
process; data that fit the caches can exceed 100 %, and where in memory the system has put the data
makes a difference too.
`read` therefore sums every weight to one number: no norms, but the very same memory. What a variant
frees stays with the process (glibc), for a fresh page from the system costs more than copying it.
*Ratio* is the time of a variant over ours: above 1, ours is faster. KD times include the backward;
`nothing` is an autograd function without any work and `sum` torch's plainest loss, `student.sum()`:
no such loss costs less. `ours_backward` makes the gradient in the backward, from row statistics,
instead of in the forward; `ours_with_gradient` is `kd_kl_div_with_gradient`, which returns loss and
gradient without autograd.{cuda}{note}
"""
NO_CUDA = """

CUDA kernels were compiled here, not run: this machine has no GPU, hence no CUDA rows."""


def variant_of(bench: dict[str, Any]) -> str:
    """Name of the variant that was timed."""
    return str(bench["params"]["variant"])


def rows_of(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one pytest-benchmark file."""
    rows = []
    for bench in raw["benchmarks"]:
        operator, case = bench["group"].split(" ", 1)
        rows.append(
            {
                "operator": operator,
                "case": case,
                "variant": variant_of(bench),
                "median_s": bench["stats"]["median"],
                "iqr_s": bench["stats"]["iqr"],
                "rounds": bench["stats"]["rounds"],
                **bench["extra_info"],
            }
        )
    return rows


def load(paths: list[Path]) -> dict[str, Any]:
    """The rows of all files and what to know of the machine."""
    files = [json.loads(path.read_text()) for path in paths]
    rows = [row for raw in files for row in rows_of(raw)]
    info = files[0]["machine_info"]
    processors = {raw["machine_info"]["cpu"].get("brand_raw", "unknown") for raw in files}
    if len(processors) != 1:
        raise ValueError(f"files of different machines: {', '.join(sorted(processors))}")
    machine = {
        "processor": processors.pop(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": sorted({row["threads"] for row in rows}),
        "torch": torch.__version__,
        "python": info["python_version"],
    }
    return {"machine": machine, "rows": rows}


def by_case(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of one operator, case by case, in the order in which they ran."""
    cases: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        cases[row["case"]].append(row)
    return cases


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of one operator."""
    lines = [
        "| case | variant | time, ms | MB | GB/s | % of copy | % of read | ratio |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case, variants in by_case(rows).items():
        ours = next((r["median_s"] for r in variants if r["variant"] == OURS), None)
        for r in variants:
            ratio = f"{r['median_s'] / ours:.2f}" if ours else ""
            lines.append(
                f"| {case} | {r['variant']} | {r['median_s'] * 1e3:.3f} | {r['bytes'] / 1e6:.2f} | "
                f"{r['gb_per_s']} | {r['percent_of_copy']} | {r['percent_of_read']} | {ratio} |"
            )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Time against bytes, one mark per row, with the time of a copy as the floor."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        points[row["variant"]].append((row["bytes"] / 1e6, row["median_s"] * 1e3))
    for variant, values in points.items():
        values.sort()
        axes.plot(*zip(*values, strict=True), "o", label=variant, alpha=0.8)
    speed = max(row["copy_gb_per_s"] for row in rows)
    sizes = [min(r["bytes"] for r in rows) / 1e6, max(r["bytes"] for r in rows) / 1e6]
    axes.plot(
        sizes,
        [megabytes / speed for megabytes in sizes],
        "k--",
        label=f"floor: copy at {speed:.1f} GB/s",
    )
    axes.set(xscale="log", yscale="log", xlabel="MB that must move", ylabel="ms", title=title)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def render(folder: Path, note: str, sources: list[Path]) -> None:
    """Writes page, plots and JSON into `folder`."""
    results = load(sources)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmarks.json").write_text(json.dumps(results, indent=1) + "\n")
    machine = results["machine"]
    device = machine["device"]
    threads = " and ".join(map(str, machine["threads"]))
    description = (
        f"{machine['processor']}, {threads} thread(s), "
        f"{device + ', ' if device else ''}torch {machine['torch']}, Python {machine['python']}."
    )
    parts = [
        INTRODUCTION.format(
            machine=description,
            cuda="" if device else NO_CUDA,
            note=f"\n\n{note}" if note else "",
        )
    ]
    for operator in dict.fromkeys(row["operator"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["operator"] == operator]
        for kind in ("cpu", "cuda"):
            chosen = [row for row in rows if re.sub(r":\d+$", "", row["case"]).endswith(kind)]
            if not chosen:
                continue
            name = f"benchmarks_{operator}_{kind}.png"
            plot(chosen, f"{operator}, {kind.upper()}", folder / name)
            parts.append(f"## {operator}, {kind.upper()}\n\n![]({name})\n\n{table(chosen)}\n")
    (folder / "benchmarks.md").write_text("\n".join(parts))


if __name__ == "__main__":
    render(Path(sys.argv[1]), sys.argv[2], [Path(argument) for argument in sys.argv[3:]])

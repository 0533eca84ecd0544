"""Turns the JSON of pytest-benchmark into a page with tables, plots and a small JSON.

`python benchmarks/render.py runs/benchmarks.json docs ["a note on the run"]` writes benchmarks.md,
benchmarks.json (times and bytes, and of the machine only its processor) and one plot per operator.
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

Every time is the median of one process. *Bytes* are those that must move at least, *GB/s* is bytes
over time, and *% of copy* compares it with copying 256 MB in the same process; data that fit the
caches can exceed 100 %. *Ratio* is the time of a variant over ours: above 1, ours is faster. KD
times include the backward.{cuda}{note}
"""
NO_CUDA = """

CUDA kernels were compiled here, not run: this machine has no GPU, hence no CUDA rows."""


def variant_of(bench: dict[str, Any]) -> str:
    """Name of the function that was timed, which pytest-benchmark keeps as its representation."""
    found = re.search(r"<function (\w+)", bench["params"]["run"])
    if found is None:
        raise ValueError(f"no function in the parameter run of {bench['name']}")
    return found.group(1)


def load(path: Path) -> dict[str, Any]:
    """The rows of a pytest-benchmark file and what to know of the machine."""
    raw = json.loads(path.read_text())
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
    machine = {
        "processor": raw["machine_info"]["cpu"].get("brand_raw", "unknown"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": raw["machine_info"]["python_version"],
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
        "| case | variant | time, ms | MB | GB/s | % of copy | ratio |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for case, variants in by_case(rows).items():
        ours = next((r["median_s"] for r in variants if r["variant"] == OURS), None)
        for r in variants:
            ratio = f"{r['median_s'] / ours:.2f}" if ours else ""
            lines.append(
                f"| {case} | {r['variant']} | {r['median_s'] * 1e3:.3f} | {r['bytes'] / 1e6:.2f} | "
                f"{r['gb_per_s']} | {r['percent_of_copy']} | {ratio} |"
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
    # Every row implies the same copy speed; the median undoes the rounding of its percentage.
    speeds = sorted(r["bytes"] / r["median_s"] * 100 / r["percent_of_copy"] for r in rows)
    speed = speeds[len(speeds) // 2]
    sizes = [min(r["bytes"] for r in rows), max(r["bytes"] for r in rows)]
    axes.plot(
        [size / 1e6 for size in sizes],
        [size / speed * 1e3 for size in sizes],
        "k--",
        label=f"floor: copy at {speed / 1e9:.1f} GB/s",
    )
    axes.set(xscale="log", yscale="log", xlabel="MB that must move", ylabel="ms", title=title)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def render(source: Path, folder: Path, note: str = "") -> None:
    """Writes page, plots and JSON into `folder`."""
    results = load(source)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmarks.json").write_text(json.dumps(results, indent=1) + "\n")
    machine = results["machine"]
    device = machine["device"]
    description = (
        f"{machine['processor']}, {machine['threads']} thread(s), "
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
            chosen = [row for row in rows if row["case"].split()[-1] == kind]
            if not chosen:
                continue
            name = f"benchmarks_{operator}_{kind}.png"
            plot(chosen, f"{operator}, {kind.upper()}", folder / name)
            parts.append(f"## {operator}, {kind.upper()}\n\n![]({name})\n\n{table(chosen)}\n")
    (folder / "benchmarks.md").write_text("\n".join(parts))


if __name__ == "__main__":
    render(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:4])

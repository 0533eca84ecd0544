"""Render results of the coverage runner as Markdown.

python -m benchmarks.coverage.render docs/results docs/coverage.md
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["main", "rendered"]

_ORDER = ("torchvision", "timm", "transformers", "families", "multimodal", "libraries", "toys")
_INTRODUCTION = """\
# Coverage

Every model of seven suites, pruned at ratio {ratio:g} with L1 scores from random weights (affine
parameters, statistics, biases, layer scales and whatever else starts out neutral are randomised).
Each runs in a process of its own; a hang, a crash or too much memory counts as a failure.

- **pruned**: a plan was made, applied and replayed.
- **exact**: the result runs in eval mode on another batch with outputs of the original's shapes and
  in training mode, backward reaches every parameter it reached before, copies and files of it give
  the same outputs, it has at most {effective:.0%} of the parameters, and in float64 it equals the
  original with the removed channels zeroed to a relative error below {tolerance:g}. Where a layer
  takes a statistic over removed channels, that one layer of the original sees the kept ones only.
- **runs**: all of that but the last two.
- **refused**: the library says no, and why.
- **failed**: anything else.
- **covered**: the part of all output channels of convolutions and linear layers that may go,
  leaving aside those that are the model's output.
- **compared**: *strict*, with the zeroed original; *restricted*, statistics over removed channels
  taken over the kept ones. (The peer may also let attention's scale follow the smaller heads.)

Times are CPU seconds of one thread: analysis, planning with replay, surgery.

`make coverage` makes the figures (`SUITES='timm toys'` chooses, `PEER=1` adds the peer).
"""


def _kind(report: dict[str, Any]) -> str:
    return str(report.get("verdict", "failed")).partition(":")[0]


def _pruned(report: dict[str, Any]) -> bool:
    return "apply_s" in report or ("prune_s" in report)


def _prune_seconds(report: dict[str, Any]) -> float | None:
    if "prune_s" in report:
        return float(report["prune_s"])
    if "apply_s" in report:
        return float(report["plan_s"] + report["apply_s"])
    return None


def _median(values: Iterable[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{statistics.median(known):.2f}" if known else "-"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(_cell(c) for c in row) + " |" for row in rows]
    return [*lines, ""]


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _counts(who: str, reports: Sequence[dict[str, Any]]) -> list[object]:
    kinds = [_kind(r) for r in reports]
    exact = kinds.count("exact")
    return [
        who,
        len(reports),
        sum(map(_pruned, reports)),
        f"{exact} ({exact / max(len(reports), 1):.0%})",
        sum(bool(r.get("effective")) for r in reports),
        kinds.count("runs"),
        kinds.count("refused"),
        kinds.count("failed"),
        _median(map(_prune_seconds, reports)),
    ]


def _peers(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [r["peer"] for r in results["models"].values() if "peer" in r]


def _summary(suites: dict[str, dict[str, Any]]) -> list[str]:
    rows = []
    for suite, results in suites.items():
        rows.append(_counts(suite, list(results["models"].values())))
        if peers := _peers(results):
            rows.append(_counts(f"{suite}: {results['peer']}", peers))
    header = ["suite", "models", "pruned", "exact", "effective", "runs", "refused", "failed"]
    lines = ["## Summary", "", *_table([*header, "median prune s"], rows)]
    for suite, results in suites.items():
        exported = [r["export"] for r in results["models"].values() if "export" in r]
        expected = [found for found in exported if found != "not the original either"]
        if expected:
            lines.append(
                f"{suite}: `torch.export` takes {expected.count('ok')} of {len(expected)} pruned "
                f"models whose originals it takes.\n"
            )
    return lines


def _outcome(report: dict[str, Any], length: int = 160) -> str:
    verdict = str(report.get("verdict", "failed: no result"))
    return verdict if len(verdict) <= length else f"{verdict[: length - 3]}..."


def _part(report: dict[str, Any], key: str) -> str:
    if key not in report:
        return "-"
    before, after = report[key]
    return f"{after / max(before, 1):.2f}"


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, (int, float)) else "-"


def _model_row(name: str, report: dict[str, Any], *, with_peer: bool) -> list[object]:
    row: list[object] = [
        name,
        _outcome(report),
        report.get("exactness", "-"),
        _number(report.get("error"), ".0e"),
        _number(report["params"][0] / 1e6 if "params" in report else None, ".2f"),
        _part(report, "params"),
        _part(report, "macs"),
        _number(report.get("covered"), ".0%"),
        _number(report.get("forward_s"), ".2f"),
        _number(report.get("analyse_s"), ".2f"),
        _number(_prune_seconds(report), ".2f"),
    ]
    if with_peer:
        peer = report.get("peer", {})
        row += [_outcome(peer, 90), _number(_prune_seconds(peer), ".2f")]
    return row


def _details(suite: str, results: dict[str, Any]) -> list[str]:
    lines = [f"## {suite}", ""]
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    lines += [f"{versions}; ratio {results['ratio']:g}.", ""]
    with_peer = bool(_peers(results))
    header = ["model", "outcome", "compared", "error", "params M", "params x", "MACs x", "covered"]
    header += ["forward s", "analysis s", "prune s"]
    header += [str(results["peer"]), "its prune s"] if with_peer else []
    families: dict[str, list[list[object]]] = {}
    for name, report in results["models"].items():
        row = _model_row(name, report, with_peer=with_peer)
        families.setdefault(report["family"], []).append(row)
    for family, rows in families.items():
        lines += [f"### {family}", "", *_table(header, rows)]
    kept = [
        (name, "<br>".join(report["frozen"][:3]))
        for name, report in results["models"].items()
        if report.get("frozen")
    ]
    if kept:
        lines += ["### Channels that stay, and why", "", *_table(["model", "channels"], kept)]
    return lines


def _speed(results: dict[str, Any]) -> list[str]:
    """What :mod:`benchmarks.prune_speed` has measured."""
    lines = [
        "## Pruning time beside Torch-Pruning",
        "",
        "From a model in memory to a smaller model in memory: analysis, scores, planning, checks",
        "and surgery. CPU seconds of one thread, medians of rounds in which both libraries take",
        "turns in one process; only networks that both prune exactly. The peer works in place:",
        "*in place* does the same job, *prune(model)* leaves the model as it was and copies it.",
        "`make prune-speed` makes the figures.",
        "",
    ]
    if "note" in results:
        lines += [f"This run: {results['note']}.", ""]
    for way, name in (("ours", "prune(model)"), ("ours in place", "in place")):
        found = results["summary"][way]
        slower = ", ".join(f"{model} ({ratio:.2f}x)" for model, ratio in found["slower"].items())
        lines.append(
            f"- {name}: the peer takes {found['median']:.1f} times as long in the median of "
            f"{found['models']} networks; slower here on {len(found['slower'])}"
            f"{f': {slower}' if slower else ''}."
        )
    rows = [
        [
            model,
            r["rounds"],
            *(f"{r[f'{way}_s']:.3f}" for way in ("ours", "ours in place", "peer")),
            *(f"{r['peer_s'] / r[f'{way}_s']:.1f}" for way in ("ours", "ours in place")),
        ]
        for model, r in results["models"].items()
        if r.get("peer_s")
    ]
    header = ["model", "rounds", "prune(model) s", "in place s", "torch-pruning s"]
    return [*lines, "", *_table([*header, "ratio", "ratio in place"], rows)]


def rendered(suites: dict[str, dict[str, Any]], speed: dict[str, Any] | None = None) -> str:
    """The page for results by suite, and for pruning times where there are any."""
    from benchmarks.coverage.checks import EFFECTIVE, TOLERANCE

    ratio = next(iter(suites.values()))["ratio"]
    lines = [
        _INTRODUCTION.format(ratio=ratio, effective=EFFECTIVE, tolerance=TOLERANCE),
        *_summary(suites),
        *(_speed(speed) if speed else []),
    ]
    for suite, results in suites.items():
        lines += _details(suite, results)
    return "\n".join(lines).rstrip() + "\n"


def main(folder: Path, page: Path) -> int:
    """Render all results in ``folder`` to ``page``; 2 where there are none."""
    files = {path.stem.removeprefix("coverage-"): path for path in folder.glob("coverage-*.json")}
    suites = {name: json.loads(files[name].read_text()) for name in _ORDER if name in files}
    if not suites:
        print(f"no results of the coverage runner in {folder}", file=sys.stderr)
        return 2
    timed = folder / "prune-speed-torchvision.json"
    speed = json.loads(timed.read_text()) if timed.exists() else None
    page.write_text(rendered(suites, speed))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))

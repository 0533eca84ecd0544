"""Time whole prune of this library and of Torch-Pruning, side by side on the same networks.

python -m benchmarks.prune_speed --suite torchvision --exact docs/results/coverage-torchvision.json

A network is pruned several times by each library in turn, in one process of its own with one
thread. "Whole prune" goes from a model in memory to a smaller model in memory: analysis, scores,
planning, checks and surgery. Torch-Pruning works in place, so both are timed in place on a copy
made beforehand; ``chanprune_ext.prune`` leaving the model untouched is timed too, its copy
included. The peer is used as it documents, with the heads and the output layers given by hand
(found outside the timing).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.coverage.__main__ import SUITES, catalogue, versions, warm_up
from benchmarks.coverage.case import built
from benchmarks.coverage.checks import cpu_seconds, told
from benchmarks.coverage.sandbox import Limits, run_all

import torch  # isort: skip - after the import that limits its threads

import chanprune_ext as cpx
from chanprune_ext.analysis import analyse
from chanprune_ext.copying import copied

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.coverage.case import Case

__all__ = ["main", "summary"]

_WAYS = ("ours", "ours in place", "peer")


def _measure(
    case: Case,
    send: Callable[[dict[str, Any]], None],
    *,
    ratio: float,
    rounds: int,
    seconds: float,
    peer: bool,
) -> None:
    """Prune ``case`` in every way, in turn, until ``rounds`` are done or time is over."""
    torch.manual_seed(1)
    inputs = case.inputs()
    model = built(case)
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: cpx.prune(model, inputs, ratio),
        "ours in place": lambda: cpx.prune(copies.pop(), inputs, ratio, inplace=True),
    }
    if peer:
        from benchmarks.coverage.peer import PeerJob

        analysis = analyse(model, inputs)
        ways["peer"] = lambda: jobs.pop().run()
    times: dict[str, list[float]] = {way: [] for way in ways}
    started = time.monotonic()
    for _ in range(rounds):
        for way, prune in ways.items():
            copies = [copied(model)] if way == "ours in place" else []
            jobs = [PeerJob(copied(model), inputs, analysis, ratio)] if way == "peer" else []
            send({"step": way})
            try:
                _, spent = cpu_seconds(prune)
            except Exception as error:  # noqa: BLE001 - whatever it raises is a result
                send({"verdict": f"failed: {way}: {told(error, 200)}"})
                return
            times[way].append(spent)
        if time.monotonic() - started > seconds:
            break
    medians = {f"{way}_s": round(statistics.median(t), 5) for way, t in times.items()}
    send({**medians, "rounds": len(times["ours"]), "times": times, "verdict": "timed"})


def summary(models: dict[str, dict[str, Any]], way: str) -> dict[str, Any]:
    """How many times longer the peer takes than ``way`` of ours."""
    ratios = {name: r["peer_s"] / r[f"{way}_s"] for name, r in models.items() if r.get("peer_s")}
    return {
        "models": len(ratios),
        "median": round(statistics.median(ratios.values()), 2),
        "slower": {n: round(v, 2) for n, v in sorted(ratios.items(), key=lambda i: i[1]) if v < 1},
    }


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prune_speed", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default="torchvision")
    parser.add_argument("--only", nargs="+", metavar="GLOB", help="names of models")
    parser.add_argument(
        "--exact", type=Path, metavar="FILE", help="only models both prune exactly by this result"
    )
    parser.add_argument("--no-peer", action="store_true", help="time this library alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15, help="no new round after these")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go")
    return parser.parse_args(given)


def _chosen(options: argparse.Namespace) -> list[Case]:
    known = json.loads(options.exact.read_text())["models"] if options.exact else None
    return [
        case
        for case in catalogue(options.suite)
        if any(fnmatch.fnmatch(case.name, glob) for glob in options.only or ["*"])
        and (known is None or _both_exact(known.get(case.name, {})))
    ]


def _both_exact(report: dict[str, Any]) -> bool:
    return report.get("verdict") == report.get("peer", {}).get("verdict") == "exact"


def _told(report: dict[str, Any]) -> str:
    if report["verdict"] != "timed":
        return str(report["verdict"])
    parts = [f"{way} {report[f'{way}_s']:.3f} s" for way in _WAYS if f"{way}_s" in report]
    if "peer_s" in report:
        parts.append(f"x{report['peer_s'] / report['ours_s']:.2f}")
        parts.append(f"x{report['peer_s'] / report['ours in place_s']:.2f} in place")
    return "  ".join(parts)


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if everything was timed."""
    options = _arguments(given)
    torch.set_num_threads(1)
    peer = not options.no_peer
    warm_up(peer=peer)
    work = partial(
        _measure,
        ratio=options.ratio,
        rounds=options.rounds,
        seconds=options.seconds,
        peer=peer,
    )
    jobs = [(c.name, partial(work, c), Limits(600, 12)) for c in _chosen(options)]
    found: dict[str, dict[str, Any]] = {}
    content: dict[str, Any] = {
        "suite": options.suite,
        "ratio": options.ratio,
        "versions": versions(options.suite, peer=peer),
        "models": found,
    }
    for name, report in run_all(jobs):
        found[name] = report
        print(f"{name:30} {_told(report)}", flush=True)
        if any(r.get("peer_s") for r in found.values()):
            content["summary"] = {way: summary(found, way) for way in ("ours", "ours in place")}
        if options.json:
            options.json.write_text(json.dumps(content, indent=1) + "\n")
    for way, figures in content.get("summary", {}).items():
        print(f"{way}: {figures}")
    return int(any(r["verdict"] != "timed" for r in found.values()))


if __name__ == "__main__":
    sys.exit(main())

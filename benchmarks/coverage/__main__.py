"""Prune every model of a suite, check the results from all sides, and write them down.

python -m benchmarks.coverage --suite torchvision --only 'resnet*' --peer torch-pruning
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import os
import platform
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Read when torch is imported.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

from benchmarks.coverage.ours import check  # noqa: E402
from benchmarks.coverage.sandbox import Limits, run_all  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.coverage.case import Case

_PACKAGES = {
    "timm": ("timm",),
    "transformers": ("transformers",),
    "families": ("transformers",),
    "multimodal": ("transformers",),
    "libraries": (
        *("diffusers", "monai", "open-clip-torch", "openai-whisper", "pytorchcv"),
        *("segmentation-models-pytorch", "spandrel", "torch-geometric", "ultralytics"),
        *("vit-pytorch", "x-transformers"),
    ),
}
SUITES = (*("torchvision", "timm", "transformers", "families", "multimodal", "libraries", "toys"),)


def catalogue(suite: str) -> list[Case]:
    """The models of a suite."""
    return list(importlib.import_module(f"benchmarks.coverage.{suite}_suite").cases())


def versions(suite: str, *, peer: bool = False) -> dict[str, str]:
    """Versions of what the results depend on."""
    from importlib.metadata import version

    import chanprune_ext

    names = ["torch", "torchvision", *_PACKAGES.get(suite, ())]
    names += ["torch-pruning"] if peer else []
    return {
        "chanprune_ext": chanprune_ext.__version__,
        "python": platform.python_version(),
        **{name: version(name).partition("+")[0] for name in names},
    }


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--only", nargs="+", metavar="GLOB", help="names or families of models")
    parser.add_argument("--peer", choices=["torch-pruning"], help="run it on the same models too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="models at the same time")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="for each model")
    parser.add_argument("--memory", type=float, default=6.0, metavar="GB", help="for each model")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument(
        "--resume", action="store_true", help="keep what FILE says is exact; run all else"
    )
    parser.add_argument("--no-export", action="store_true", help="skip torch.export")
    parser.add_argument("--list", action="store_true", help="only name the models")
    return parser.parse_args(given)


def _limits(case: Case, options: argparse.Namespace) -> Limits:
    factor = 4 if case.huge else 1
    return Limits(options.timeout * factor, options.memory * (2 if case.huge else 1))


def _chosen(options: argparse.Namespace) -> list[Case]:
    globs = options.only or ["*"]
    return [
        case
        for case in catalogue(options.suite)
        if any(fnmatch.fnmatch(case.name, g) or fnmatch.fnmatch(case.family, g) for g in globs)
    ]


def _done(report: dict[str, Any], options: argparse.Namespace) -> bool:
    """Whether a result of an earlier run needs no second one."""
    return report.get("verdict") == "exact" and (not options.peer or "peer" in report)


def warm_up(*, peer: bool = False) -> None:
    """Load once, before any fork, what the first use of a library loads."""
    import chanprune_ext

    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
    chanprune_ext.prune(net, torch.randn(2, 3, 8, 8), 0.5)
    if peer:
        from benchmarks.coverage.peer import PeerJob

        PeerJob(net, torch.randn(2, 3, 8, 8), None, 0.5).run()


def _short(report: dict[str, Any]) -> str:
    verdict = report["verdict"].replace("\n", " ")
    parts = [verdict if len(verdict) < 160 else verdict[:157] + "..."]
    if "params" in report:
        before, after = report["params"]
        parts.append(f"params x{after / max(before, 1):.2f}")
    if "covered" in report:
        parts.append(f"covered {report['covered']:.0%}")
    if "apply_s" in report:
        parts.append(f"{report['plan_s'] + report['apply_s']:.2f} s")
    if "prune_s" in report:
        parts.append(f"{report['prune_s']:.2f} s")
    return "  ".join(parts)


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if nothing failed."""
    options = _arguments(given)
    torch.set_num_threads(1)
    chosen = _chosen(options)
    if options.list:
        print("\n".join(f"{case.family}: {case.name}" for case in chosen))
        return 0
    if not chosen:
        print(f"no model of suite {options.suite} is called {options.only}", file=sys.stderr)
        return 2
    warm_up()
    started = time.time()
    found: dict[str, dict[str, Any]] = {case.name: {"family": case.family} for case in chosen}
    if options.resume and options.json and options.json.exists():
        known = json.loads(options.json.read_text())["models"]
        found |= {name: r for name, r in known.items() if name in found and _done(r, options)}
    jobs = []
    for case in chosen:
        if "verdict" in found[case.name]:
            continue
        limits = _limits(case, options)
        work = partial(check, case, ratio=options.ratio, export=not options.no_export)
        jobs.append((case.name, work, limits))
        if options.peer:
            from benchmarks.coverage.peer import check_peer

            jobs.append(
                (f"peer {case.name}", partial(check_peer, case, ratio=options.ratio), limits)
            )
    for name, report in run_all(jobs, options.jobs):
        print(f"{name:36} {_short(report)}", flush=True)
        if name.startswith("peer "):
            found[name.removeprefix("peer ")]["peer"] = report
        else:
            found[name].update(report)
        if options.json:
            _write(options, found, time.time() - started)
    failed = sum(r.get("verdict", "failed").startswith("failed") for r in found.values())
    exact = sum(r.get("verdict") == "exact" for r in found.values())
    print(f"{len(found)} models: {exact} exact, {failed} failed, {time.time() - started:.0f} s")
    return int(failed > 0)


def _write(options: argparse.Namespace, found: dict[str, dict[str, Any]], seconds: float) -> None:
    """All results so far, so that an interrupted run leaves what it has."""
    content = {
        "suite": options.suite,
        "ratio": options.ratio,
        "versions": versions(options.suite, peer=options.peer is not None),
        "peer": options.peer,
        "wall_s": round(seconds),
        "models": {name: report for name, report in found.items() if "verdict" in report},
    }
    temporary = options.json.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(options.json)


if __name__ == "__main__":
    sys.exit(main())

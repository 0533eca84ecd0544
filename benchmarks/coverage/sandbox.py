"""Runs every model in a process of its own, under limits: a hang or a crash is only a result."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["Limits", "run_all"]

_LAST_STEPS = frozenset(["export"])
"""Steps after the verdict: failing there is noted and changes nothing."""


@dataclass(frozen=True)
class Limits:
    """What one model may use.

    Attributes:
        seconds: Wall-clock time.
        gigabytes: Resident memory.
    """

    seconds: float = 120.0
    gigabytes: float = 6.0


@dataclass(eq=False)
class _Running:
    name: str
    process: Any
    results: Connection
    deadline: float
    gigabytes: float
    report: dict[str, Any] = field(default_factory=dict)


def _child(work: Callable[[Callable[[dict[str, Any]], None]], None], results: Connection) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    import warnings

    warnings.simplefilter("ignore")
    work(results.send)
    results.close()
    # No interpreter shutdown: a forked copy of a large process has nothing to tidy up.
    os._exit(0)


def _resident_gigabytes(pid: int) -> float:
    """Memory of a process; 0 where the system does not tell."""
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**30
    return 0.0


def run_all(
    jobs: Sequence[tuple[str, Callable[[Callable[[dict[str, Any]], None]], None], Limits]],
    parallel: int = 1,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run jobs in forked processes and yield ``(name, report)`` as they end.

    A job is a function that gets ``send``, and reports by sending dicts that are merged. What ends
    without a verdict gets one: ``"failed: <step>: ..."``.
    """
    context = multiprocessing.get_context("fork")
    waiting = list(jobs)
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                name, work, limits = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(work, sender), daemon=True)
                process.start()
                sender.close()
                deadline = time.monotonic() + limits.seconds
                running.append(_Running(name, process, receiver, deadline, limits.gigabytes))
            wait([r.results for r in running], timeout=0.25)
            for item in tuple(running):
                if _finished(item):
                    running.remove(item)
                    yield item.name, item.report
    finally:
        for item in running:
            item.process.kill()


def _finished(item: _Running) -> bool:
    """Take what a process has sent; end it where it has used up its limits."""
    problem = ""
    with contextlib.suppress(EOFError, OSError):
        while item.results.poll():
            item.report.update(item.results.recv())
        if time.monotonic() > item.deadline:
            problem = "took too long"
        elif _resident_gigabytes(item.process.pid) > item.gigabytes:
            problem = f"needs more than {item.gigabytes:g} GB"
        else:
            return False
    if problem:
        item.process.kill()
    item.process.join()
    item.results.close()
    problem = problem or f"ended with code {item.process.exitcode}"
    step = item.report.pop("step", "start")
    if "verdict" not in item.report:
        item.report["verdict"] = f"failed: {step}: {problem}"
    elif step in _LAST_STEPS:
        item.report.setdefault(step, problem)
    return True

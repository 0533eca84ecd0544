"""The small nasty networks of the tests, and the networks the tests hold exact."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.coverage.case import Case, images

__all__ = ["cases"]


def _tests(name: str) -> Any:
    folder = str(Path(__file__).resolve().parents[2] / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def cases() -> list[Case]:
    """Toys first."""
    toys = _tests("toys").TOYS
    models = _tests("models")
    return [
        *(Case(name, toy.make, toy.inputs, family="toys") for name, toy in toys.items()),
        *(
            Case(
                f"test:{name}",
                partial(_called, make),
                images(2, 3, side, side),
                family="test networks",
            )
            for name, make in models.NETWORKS.items()
            for side in (models.SIDES.get(name, 64),)
        ),
    ]


def _called(make: Any) -> Any:
    return make()

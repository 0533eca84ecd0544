"""A model that a library makes by a class or function."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from benchmarks.coverage.case import Case

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["library_case"]


def library_case(
    package: str, kind: str, inputs: Callable[[], Any], *given: Any, name: str = "", **options: Any
) -> Case:
    """``package.kind(*given, **options)``; the package may name a module of it."""

    def build() -> torch.nn.Module:
        model: torch.nn.Module = getattr(importlib.import_module(package), kind)(*given, **options)
        return model

    family = package.partition(".")[0]
    return Case(f"{family}:{name or kind}", build, inputs, family=family)

"""What the user of a plan should know of it: where it may not hold for other inputs."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING

from chanprune_ext.analysis.calls import PACKAGE_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import FrameType

    from torch import nn

    from chanprune_ext.analysis.groups import Analysis
    from chanprune_ext.plan import PruningPlan

__all__ = ["warn_of_branches", "warn_of_unreached"]

_TOLD = 3


def warn_of_branches(analysis: Analysis) -> None:
    """Warn of places where the forward may take another path for other values."""
    read = analysis.trace.values_read
    if read:
        lines = [f"{source} in '{module}'" if module else source for source, module in read.items()]
        _warn(
            f"the forward reads values of tensors ({_first(lines)}): the plan holds for the path "
            f"it takes with these example_inputs"
        )


def warn_of_unreached(analysis: Analysis, model: nn.Module, made: PruningPlan) -> None:
    """Warn of parts that these inputs do not reach, and that may be meant for channels that go."""
    cut = {group.width_before for group in made.groups if group.width_after < group.width_before}
    unreached = set(analysis.trace.unreached)
    lost = {id(p) for name, p in model.named_parameters() if name in unreached}
    parameters = list(model.named_parameters(remove_duplicate=False))
    reached = {around for name, p in parameters if id(p) not in lost for around in _around(name)}
    parts: dict[str, None] = {}
    for name, parameter in parameters:
        if id(parameter) in lost and not cut.isdisjoint(parameter.shape):
            # The largest part that it belongs to and that is not reached either.
            parts.setdefault(next((path for path in _around(name) if path not in reached), name))
    if parts:
        _warn(
            f"with these example_inputs the forward does not reach {_first(parts)}, left as wide "
            f"as before though channels of the same width go: other inputs that reach it may not "
            f"run on the pruned model; give example_inputs that reach all of the model"
        )


def _warn(message: str) -> None:
    """A warning at the line that called this package, by whichever of its functions."""
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE_DIRECTORY):
        frame = frame.f_back
        level += 1
    warnings.warn(message, UserWarning, stacklevel=level)


def _around(name: str) -> Iterator[str]:
    """Paths of the modules around a parameter, outermost first."""
    steps = name.split(".")
    for depth in range(1, len(steps)):
        yield ".".join(steps[:depth])


def _first(names: Iterable[str]) -> str:
    """The first few of several names, and whether there are more."""
    told = list(names)
    return f"{', '.join(told[:_TOLD])}{' and elsewhere' if len(told) > _TOLD else ''}"

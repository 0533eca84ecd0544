"""Where the time of a forward goes: every module's own share, measured in the running network."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from chanprune_ext.analysis.calls import run_model, tensors_in
from chanprune_ext.devices import synchroniser
from chanprune_ext.module_modes import evaluating

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

__all__ = ["ModuleTime", "module_times"]


@dataclass(frozen=True)
class ModuleTime:
    """Time that one module spends itself, without what it calls.

    Attributes:
        name: Dotted path; ``""`` is the model.
        kind: Its class.
        milliseconds: Median over the rounds of the time in one forward, all its calls together.
        widths: ``(inputs, outputs)`` of a layer that has such, else None.
    """

    name: str
    kind: str
    milliseconds: float
    widths: tuple[int, int] | None


def module_times(
    models: Mapping[str, nn.Module], example_inputs: Any, *, rounds: int = 9
) -> dict[str, list[ModuleTime]]:
    """Times every module of some models, which run in turns.

    The hooks that hold the watch take time themselves, a few microseconds a module, and on a GPU
    every module waits for the one before: the shares are what counts, and the sum is more than the
    forward takes.

    Args:
        models: Models by name, on the device of the inputs.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs.
        rounds: Forwards of each model that count, after one that does not.

    Returns:
        Under the name of each model its modules, in the order they are defined.
    """
    synchronise = synchroniser(tensors_in(example_inputs)[0].device)
    watches = {name: _Watch(model, synchronise) for name, model in models.items()}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for name, model in models.items():
            stack.enter_context(evaluating(model))
            stack.callback(watches[name].remove)
        for number in range(rounds + 1):
            for name, model in models.items():
                own = watches[name].round(model, example_inputs)
                if number:
                    watches[name].samples.append(own)
    return {name: watch.times() for name, watch in watches.items()}


class _Watch:
    """Hooks on every module of one model; a stack of who is running."""

    def __init__(self, model: nn.Module, synchronise: Callable[[], object]) -> None:
        self.modules = dict(model.named_modules())
        self.synchronise = synchronise
        self.samples: list[dict[str, float]] = []
        self.own: dict[str, float] = {}
        self.running: list[str] = []
        self.last = 0.0
        self.watching = False  # one network may be there under two names
        self.handles = []
        for name, module in self.modules.items():
            self.handles.append(module.register_forward_pre_hook(self._entering(name)))
            self.handles.append(module.register_forward_hook(self._leaving, always_call=True))

    def round(self, model: nn.Module, inputs: Any) -> dict[str, float]:
        self.own = dict.fromkeys(self.modules, 0.0)
        self.running.clear()
        self.watching = True
        try:
            run_model(model, inputs)
        finally:
            self.watching = False
        return self.own

    def times(self) -> list[ModuleTime]:
        return [
            ModuleTime(
                name,
                type(module).__name__,
                1e3 * statistics.median(sample[name] for sample in self.samples),
                _widths_of(module),
            )
            for name, module in self.modules.items()
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            if self.watching:
                self._tick()
                self.running.append(name)

        return enter

    def _leaving(self, *_: Any) -> None:
        if self.watching:
            self._tick()
            self.running.pop()

    def _tick(self) -> None:
        """What has passed since the last look belongs to the innermost module that runs."""
        self.synchronise()
        now = time.perf_counter()
        if self.running:
            self.own[self.running[-1]] += now - self.last
        self.last = time.perf_counter()


def _widths_of(module: nn.Module) -> tuple[int, int] | None:
    for before, after in (("in_channels", "out_channels"), ("in_features", "out_features")):
        found = getattr(module, before, None), getattr(module, after, None)
        if isinstance(found[0], int) and isinstance(found[1], int):
            return found[0], found[1]
    return None

"""Measured latency of whole models, comparable between models even on a noisy machine.

A figure measured alone drifts with whatever else the machine does. Here every round times each
model once, in an order that rotates, so that a slow second hits all of them alike: the *ratio*
within a round holds even where the milliseconds do not. The order statistics reported are medians
and quartiles, which a few interrupted rounds cannot move.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.devices import synchroniser
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.module_modes import evaluating

__all__ = ["Latency", "measure_latency", "time_in_turns"]

# A sample shorter than this is dominated by the clock and by Python; calls are repeated to fill it.
_SHORTEST_SAMPLE_MS = 2.0
_MOST_CALLS_PER_SAMPLE = 1000


@dataclass(frozen=True)
class Latency:
    """Latency of one model, in milliseconds per forward call.

    Attributes:
        samples_ms: Mean time of one call in each round, in the order of the rounds. Entry ``i`` of
            two models measured together was taken in the same round.
        batch_size: Size of dim 0 of the first input tensor.
        dtype: Dtype of the first floating-point input, or of the first input where none is.
        device: Device of the inputs, as a string.
        threads: Intra-op threads PyTorch was allowed to use.
    """

    samples_ms: tuple[float, ...]
    batch_size: int
    dtype: str
    device: str
    threads: int

    @property
    def median_ms(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.samples_ms)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """First and third quartile over the rounds."""
        if len(self.samples_ms) == 1:
            return self.samples_ms[0], self.samples_ms[0]
        first, _, third = statistics.quantiles(self.samples_ms, n=4, method="inclusive")
        return first, third

    def speedup_over(self, baseline: Latency) -> float:
        """Returns the median over rounds of baseline time / own time (> 1: faster than it).

        Raises:
            InvalidArgumentError: The two were not measured in the same rounds.
        """
        if len(baseline.samples_ms) != len(self.samples_ms):
            raise InvalidArgumentError(
                "baseline: expected a latency from the same measurement "
                f"({len(self.samples_ms)} rounds), got one of {len(baseline.samples_ms)}; "
                "pass both models to one call of measure_latency"
            )
        rounds = zip(baseline.samples_ms, self.samples_ms, strict=True)
        return statistics.median(theirs / ours for theirs, ours in rounds)

    def conditions(self) -> str:
        """One line that says under what conditions the figures hold."""
        plural = "" if self.threads == 1 else "s"
        return (
            f"batch {self.batch_size}, {self.dtype}, {self.device}, {self.threads} thread{plural}, "
            f"median of {len(self.samples_ms)} interleaved rounds"
        )


def measure_latency(
    models: Mapping[str, nn.Module],
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    *,
    rounds: int = 30,
    warmup: int = 5,
    threads: int | None = None,
) -> dict[str, Latency]:
    """Times the forward pass of several models side by side.

    Models run in eval mode under ``torch.inference_mode``; their training flags and the number of
    threads are put back afterwards. On CUDA each sample ends with a synchronisation.

    Args:
        models: Models by name. All take the same inputs and live on the inputs' device.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword inputs.
        rounds: Samples per model (>= 1).
        warmup: Untimed rounds before the first sample (>= 0).
        threads: Intra-op threads to use; None keeps the current setting.

    Returns:
        One :class:`Latency` per model under the same name, in the same order.

    Raises:
        InvalidArgumentError: An argument is out of range, no input is a tensor, or a model cannot
            run on the inputs.
    """
    if not models:
        raise InvalidArgumentError("models: expected at least one model, got an empty mapping")
    _require_at_least("rounds", rounds, 1)
    _require_at_least("warmup", warmup, 0)
    if threads is not None:
        _require_at_least("threads", threads, 1)
    args, kwargs = _call_arguments(example_inputs)
    tensors = tensors_in((args, kwargs))
    if not tensors:
        raise InvalidArgumentError(
            "example_inputs: expected at least one tensor among the inputs, got none"
        )
    shown = next((t for t in tensors if t.is_floating_point()), tensors[0])
    synchronise = synchroniser(shown.device)

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(_thread_count(threads))
        for model in models.values():
            stack.enter_context(evaluating(model))
        for name, model in models.items():
            _first_call(name, model, args, kwargs)
        calls = {name: partial(model, *args, **kwargs) for name, model in models.items()}
        samples = time_in_turns(calls, synchronise, rounds=rounds, warmup=warmup)
        used_threads = torch.get_num_threads()

    return {
        name: Latency(
            samples_ms=tuple(samples[name]),
            batch_size=tensors[0].shape[0] if tensors[0].dim() else 1,
            dtype=str(shown.dtype).removeprefix("torch."),
            device=str(shown.device),
            threads=used_threads,
        )
        for name in models
    }


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    synchronise: Callable[[], object],
    *,
    rounds: int,
    warmup: int = 1,
) -> dict[str, list[float]]:
    """Times every call once a round; the order rotates so that none always runs first.

    Args:
        calls: What to time, by name.
        synchronise: Waits until the device is done.
        rounds: Samples of each.
        warmup: Rounds before the first sample.

    Returns:
        Milliseconds of one call in each round, under the same names.
    """
    names = list(calls)
    repeats = {name: _calls_per_sample(call, synchronise) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in names}
    with _no_garbage_collection():
        for number in range(warmup + rounds):
            start = number % len(names)
            for name in names[start:] + names[:start]:
                elapsed = _time_calls(calls[name], repeats[name], synchronise)
                if number >= warmup:
                    samples[name].append(elapsed)
    return samples


def _time_calls(
    call: Callable[[], object], repeats: int, synchronise: Callable[[], object]
) -> float:
    """Returns the mean milliseconds of one call over some calls in a row."""
    synchronise()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronise()
    return (time.perf_counter() - start) * 1e3 / repeats


def _calls_per_sample(call: Callable[[], object], synchronise: Callable[[], object]) -> int:
    """Returns how many calls make a sample long enough for the clock."""
    quickest = _time_calls(call, 1, synchronise)
    if quickest < _SHORTEST_SAMPLE_MS:
        quickest = min(quickest, *(_time_calls(call, 1, synchronise) for _ in range(2)))
    wanted = _SHORTEST_SAMPLE_MS / max(quickest, 1e-6)
    return min(_MOST_CALLS_PER_SAMPLE, max(1, round(wanted + 0.5)))


def _first_call(
    name: str, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Runs the model once and turns its failure into an error that names it."""
    try:
        model(*args, **kwargs)
    except Exception as error:
        raise InvalidArgumentError(
            f"models[{name!r}]: the model cannot run on example_inputs "
            f"({type(error).__name__}: {error}); give inputs of its shape, dtype and device"
        ) from error


def _call_arguments(
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Splits example inputs into positional and keyword arguments."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    raise InvalidArgumentError(
        "example_inputs: expected a tensor, a tuple or a mapping of keyword inputs, "
        f"got {type(example_inputs).__name__}"
    )


def _require_at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidArgumentError(f"{name}: expected an integer >= {least}, got {value!r}")


@contextmanager
def _thread_count(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keeps collector pauses out of the samples."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

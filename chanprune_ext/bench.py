"""A pruned network beside its original: latency, throughput and memory, in every way to run it.

Original and pruned run in turns, so that a slow moment of the machine hits both; a speed-up is the
median of the paired ratios.
"""

from __future__ import annotations

import copy
import math
import os
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from chanprune_ext.analysis.calls import run_model, tensors_in
from chanprune_ext.analysis.stand_ins import substitute, tensors_of
from chanprune_ext.devices import device_name, synchroniser
from chanprune_ext.errors import ChanpruneError, InvalidArgumentError
from chanprune_ext.latency import time_in_turns
from chanprune_ext.latency.module_times import ModuleTime, module_times
from chanprune_ext.latency.width_advice import advice
from chanprune_ext.module_modes import evaluating, without_cache
from chanprune_ext.plan import plans_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["BACKENDS", "BenchReport", "BenchRow", "bench"]

BACKENDS = ("eager", "compile", "onnxruntime")


@dataclass(frozen=True)
class BenchRow:
    """One way to run both networks at one batch size.

    Attributes:
        backend: One of :data:`BACKENDS`.
        batch_size: Examples in a batch.
        original_ms, pruned_ms: Median time of a batch.
        original_quartiles_ms, pruned_quartiles_ms: First and third quartile.
        speedup: Median over the rounds of original time / pruned time.
        standard_error: Of the speed-up, from the spread over the rounds.
        rounds: How many rounds there were.
        original_memory, pruned_memory: Bytes of weights and, at its peak, of activations; None
            where it can't be seen.
    """

    backend: str
    batch_size: int
    original_ms: float
    pruned_ms: float
    original_quartiles_ms: tuple[float, float]
    pruned_quartiles_ms: tuple[float, float]
    speedup: float
    standard_error: float
    rounds: int
    original_memory: int | None = None
    pruned_memory: int | None = None

    def throughput(self) -> tuple[float, float]:
        """Examples per second of both."""
        return 1e3 * self.batch_size / self.original_ms, 1e3 * self.batch_size / self.pruned_ms


@dataclass(frozen=True)
class BenchReport:
    """All rows of a measurement, the share of every module, and what follows from them.

    Attributes:
        rows: One for each backend and batch size.
        skipped: Backend -> why it was not measured.
        original_modules, pruned_modules: Own time of every module, eager, at ``modules_batch``.
        modules_batch: Batch size of that.
        hints: What to change.
        device: Name of the device.
        threads: Threads that torch may use.
        channels_last: Weights and inputs are stored with channels last.
        macs_ratio, params_ratio: Pruned over original, from the plan; None without one.
    """

    rows: tuple[BenchRow, ...]
    skipped: Mapping[str, str]
    original_modules: tuple[ModuleTime, ...]
    pruned_modules: tuple[ModuleTime, ...]
    modules_batch: int
    hints: tuple[str, ...]
    device: str
    threads: int
    channels_last: bool
    macs_ratio: float | None
    params_ratio: float | None

    def __repr__(self) -> str:
        told = ", ".join(f"{r.backend} batch {r.batch_size} x{r.speedup:.2f}" for r in self.rows)
        return f"<{type(self).__name__}: {told}>"

    def __str__(self) -> str:
        lines = [f"{self.device}, {self.threads} threads, median of paired ratios"]
        lines += [
            f"  {r.backend}, batch {r.batch_size}: {r.original_ms:.4g} -> {r.pruned_ms:.4g} ms, "
            f"x{r.speedup:.2f} ± {r.standard_error:.2f}"
            for r in self.rows
        ]
        lines += [f"  {backend}: not measured, {why}" for backend, why in self.skipped.items()]
        return "\n".join([*lines, *(f"  hint: {hint}" for hint in self.hints)])

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers, strings, lists and dicts."""
        return asdict(self)


def bench(
    original: nn.Module,
    pruned: nn.Module,
    example_inputs: Any,
    *,
    batch_sizes: Sequence[int] = (1, 16),
    backends: Sequence[str] = BACKENDS,
    seconds: float = 10.0,
    channels_last: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> BenchReport:
    """Measures a pruned network against its original.

    Args:
        original: The network before pruning.
        pruned: The network after it, on the same device. Both are left as they were.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs;
            dimension 0 of those that share the first tensor's is the batch and is made as long as
            is asked for.
        batch_sizes: Batches to measure.
        backends: Ways to run: ``"eager"``, ``"compile"`` (``torch.compile``) and
            ``"onnxruntime"``. One that can't run here is left out, and the report says why.
        seconds: Time for each row, compiling and exporting apart; at least nine rounds are run.
        channels_last: Measure copies whose convolutions are stored with channels last.
        say: Receives one line as each step begins.

    Raises:
        InvalidArgumentError: An argument is out of range, the networks are exchanged, or one does
            not run on the inputs.
    """
    if unknown := sorted(set(backends) - set(BACKENDS)):
        raise InvalidArgumentError(f"backends must be some of {BACKENDS}, got {unknown}")
    if not batch_sizes or any(type(size) is not int or size < 1 for size in batch_sizes):
        raise InvalidArgumentError(f"batch_sizes must be integers >= 1, got {list(batch_sizes)}")
    if not backends:
        raise InvalidArgumentError(f"backends must hold at least one of {BACKENDS}")
    if not tensors_in(example_inputs) or not tensors_in(example_inputs)[0].dim():
        raise InvalidArgumentError("example_inputs must hold a tensor with a batch dimension")
    if plans_of(original) and not plans_of(pruned):
        raise InvalidArgumentError(
            "original: it is a pruned model, and pruned is none; call bench(original, pruned, ...)"
        )
    models = {"original": original, "pruned": pruned}
    if channels_last:
        models = {n: _channels_last(copy.deepcopy(m)) for n, m in models.items()}
        example_inputs = substitute(example_inputs, _tensor_channels_last)
    device = tensors_in(example_inputs)[0].device
    rows: list[BenchRow] = []
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
            stack.enter_context(without_cache(model))
        stack.enter_context(torch.inference_mode())
        for name, model in models.items():
            _first_call(name, model, example_inputs)
        for backend in backends:
            for size in batch_sizes:
                say(f"{backend}, batch {size}")
                inputs = _batch(example_inputs, size)
                try:
                    calls = {n: _RUNNERS[backend](m, inputs, stack) for n, m in models.items()}
                except Exception as error:  # noqa: BLE001 - compilers raise anything
                    skipped[backend] = _reason(error)
                    break
                row = _row(backend, size, calls, device, seconds)
                if backend == "eager":
                    memory = {n: _memory(m, inputs) for n, m in models.items()}
                    row = BenchRow(
                        **{
                            **vars(row),
                            "original_memory": memory["original"],
                            "pruned_memory": memory["pruned"],
                        }
                    )
                rows.append(row)
        if not rows:
            raise InvalidArgumentError(f"backends: none could run: {skipped}")
        say(f"modules, batch {batch_sizes[0]}")
        modules = module_times(models, _batch(example_inputs, batch_sizes[0]))
    plans = plans_of(pruned)[len(plans_of(original)) :]
    macs = math.prod(p.macs_after / max(p.macs_before, 1) for p in plans) if plans else None
    params = math.prod(p.params_after / max(p.params_before, 1) for p in plans) if plans else None
    return BenchReport(
        rows=tuple(rows),
        skipped=skipped,
        original_modules=tuple(modules["original"]),
        pruned_modules=tuple(modules["pruned"]),
        modules_batch=batch_sizes[0],
        hints=tuple(
            advice(
                modules["original"],
                modules["pruned"],
                device,
                macs_ratio=macs,
                time_ratio=1 / rows[0].speedup,
                channels_last=channels_last,
            )
        ),
        device=device_name(device),
        threads=torch.get_num_threads(),
        channels_last=channels_last,
        macs_ratio=macs,
        params_ratio=params,
    )


def _row(
    backend: str,
    size: int,
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
) -> BenchRow:
    synchronise = synchroniser(device)
    first = time_in_turns(calls, synchronise, rounds=2)
    pair_ms = sum(min(samples) for samples in first.values())
    rounds = min(max(int(seconds * 1e3 / max(pair_ms, 4.0)), 9), 201)
    samples = time_in_turns(calls, synchronise, rounds=rounds, warmup=1)
    ratios = [a / b for a, b in zip(samples["original"], samples["pruned"], strict=True)]
    speedup = statistics.median(ratios)
    deviation = 1.4826 * statistics.median(abs(r - speedup) for r in ratios)

    def quartiles(name: str) -> tuple[float, float]:
        low, _, high = statistics.quantiles(samples[name], n=4, method="inclusive")
        return low, high

    return BenchRow(
        backend=backend,
        batch_size=size,
        original_ms=statistics.median(samples["original"]),
        pruned_ms=statistics.median(samples["pruned"]),
        original_quartiles_ms=quartiles("original"),
        pruned_quartiles_ms=quartiles("pruned"),
        speedup=speedup,
        standard_error=1.2533 * deviation / math.sqrt(rounds),
        rounds=rounds,
    )


# -- ways to run ---------------------------------------------------------------------------------


def _eager(model: nn.Module, inputs: Any, stack: ExitStack) -> Callable[[], object]:
    del stack
    return partial(run_model, model, inputs)


def _compiled(model: nn.Module, inputs: Any, stack: ExitStack) -> Callable[[], object]:
    del stack
    torch._dynamo.reset()  # noqa: SLF001 - the documented way to forget earlier batch sizes
    compiled: Any = torch.compile(model, dynamic=False)
    run_model(compiled, inputs)
    return partial(run_model, compiled, inputs)


def _onnxruntime(model: nn.Module, inputs: Any, stack: ExitStack) -> Callable[[], object]:
    from chanprune_ext.export import export, onnx_session

    if tensors_in(inputs)[0].device.type != "cpu":
        raise InvalidArgumentError("onnxruntime is measured on the CPU; use --device cpu")
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    path = Path(folder) / "model.onnx"
    with torch.inference_mode(False), torch.no_grad():
        inputs = substitute(inputs, Tensor.clone)
        export(model, inputs, path, dynamic_batch=False, tolerance=1e-2)
    session, feeds = onnx_session(path, inputs)
    return lambda: session.run(None, feeds)


_RUNNERS = {"eager": _eager, "compile": _compiled, "onnxruntime": _onnxruntime}


# -- inputs and memory ---------------------------------------------------------------------------


def _batch(inputs: Any, size: int) -> Any:
    """The inputs with a batch of that size: repeated, and cut."""
    batch = tensors_in(inputs)[0].shape[0]

    def sized(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != batch:
            return tensor
        repeated = torch.cat([tensor] * math.ceil(size / batch))[:size]
        return _tensor_channels_last(repeated) if _is_channels_last(tensor) else repeated

    return substitute(inputs, sized)


def _memory(model: nn.Module, inputs: Any) -> int | None:
    """Bytes of the weights and, at the peak, of what a forward allocates."""
    weights = sum(tensor.nbytes for tensor in tensors_of(model).values())
    device = tensors_in(inputs)[0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run_model(model, inputs)
        torch.cuda.synchronize(device)
        return weights + torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    # The profiler's library tells of missing GPUs on the terminal; it reads this when first used.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run_model(model, inputs)
    profiler = recorded.profiler
    assert profiler is not None
    # Of the events that torch sums up per operation only the raw list holds every allocation.
    raw = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(raw, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return weights + peak


def _channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)


def _tensor_channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _is_channels_last(tensor: Tensor) -> bool:
    return (
        tensor.dim() == 4
        and tensor.is_contiguous(memory_format=torch.channels_last)
        and not tensor.is_contiguous()
    )


def _first_call(name: str, model: nn.Module, inputs: Any) -> None:
    try:
        run_model(model, inputs)
    except Exception as error:
        raise InvalidArgumentError(
            f"{name}: the model can't run on example_inputs ({type(error).__name__}: {error}); "
            f"give inputs of its shape, dtype and device"
        ) from error


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    told = text[0] if text else ""
    return told if isinstance(error, ChanpruneError) else f"{type(error).__name__}: {told}"

"""One run of a model in which every tensor dimension carries channel labels.

Three layers watch the same forward: module hooks know where it is, a function mode sees
Python-level calls with their size arguments, a dispatch mode applies one rule per ATen operation.
The model is run on meta tensors where that works, on fake tensors where devices are mixed, and on
real tensors where shapes depend on values.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator

from chanprune_ext.analysis.calls import (
    VALUE_READS,
    CallMode,
    OperationMode,
    Run,
    raising_line,
    results_of,
    schema_name,
    steady_calls,
    tensors_in,
)
from chanprune_ext.analysis.dataflow import Dataflow, DataflowMode
from chanprune_ext.analysis.labels import LabelStore
from chanprune_ext.analysis.meta_kernels import lowered, run_operation
from chanprune_ext.analysis.model_outputs import named_tensors, picked_outputs
from chanprune_ext.analysis.module_path import ModulePath
from chanprune_ext.analysis.multiples import follow_multiples
from chanprune_ext.analysis.numpy_products import traced_products
from chanprune_ext.analysis.provenance import (
    Dim,
    Equation,
    GuessedInt,
    TracedInt,
    plain,
    traced_attributes,
)
from chanprune_ext.analysis.recollection import noting, recollected
from chanprune_ext.analysis.rules import apply_rule, give_up
from chanprune_ext.analysis.sizes import TAKES_SIZES, literals_in, numbers_in, record_equations
from chanprune_ext.analysis.stand_ins import (
    call_substituted,
    held_tensors_of,
    substitute,
    substrate_device,
    substrate_mode,
    tensors_of,
)
from chanprune_ext.analysis.tracer import Cost, Event, Join, Slots, Tracer
from chanprune_ext.errors import AnalysisError, ChanpruneError
from chanprune_ext.module_tree import modules_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = ["Trace", "TracedCall", "trace_model"]


# Picks, from what a model returns, what must keep its shape.
Outputs: TypeAlias = "Callable[[Any], Any] | None"


@dataclass(frozen=True, eq=False)
class TracedCall:
    """One Python-level call: what a replay must do again, with which shapes.

    Attributes:
        name: Low-level name, such as ``"conv2d"``.
        module: Dotted path of the innermost module being run.
        source: ``file.py:line`` of the calling line.
        numbers: Numbers it computes with; None where an equation speaks of them.
        literals: Its other plain arguments, None for those that an equation may speak of.
        inputs: Slots of every dim of every tensor among its arguments, before it ran.
        outputs: Slots of every dim of every tensor it made.
    """

    name: str
    module: str
    source: str
    numbers: tuple[float | complex, ...] | None
    literals: tuple[Any, ...]
    inputs: tuple[tuple[Slots, ...], ...]
    outputs: tuple[tuple[Slots, ...], ...]


@dataclass(eq=False)
class Trace:
    """All that one run taught: labels of every parameter dimension, equations, costs, calls."""

    store: LabelStore
    parameters: dict[str, tuple[Slots, ...]]
    shapes: dict[str, tuple[int, ...]]
    roles: dict[tuple[str, int], str]
    order: list[str]
    events: list[Event]
    equations: list[Equation]
    differences: list[Equation]
    costs: list[Cost]
    calls: list[TracedCall]
    unknown: list[Event]
    values_read: dict[str, str]
    caches: set[tuple[str, str]]
    substrate: str
    joins: list[Join] = field(default_factory=list)
    axes: list[int] = field(default_factory=list)
    unreached: tuple[str, ...] = ()  # registered tensors that no forward has computed with


class _ForwardError(Exception):
    """The user's forward raised; the argument says where, the cause is what it raised."""


class _RuleMode(OperationMode):  # type: ignore[no-untyped-call]
    """Applies the rule of each ATen operation after it has run."""

    def __init__(self, calls: CallMode, tracer: Tracer) -> None:
        super().__init__(calls)
        self.tracer = tracer

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(func, HigherOrderOperator):
            output = func(*args, **kwargs)
            give_up(self.tracer, f"operator {func}", tensors_in((args, kwargs)), output)
            return output
        output = run_operation(func, args, kwargs)
        apply_rule(self.tracer, func, args, kwargs, output)
        return output


class _ProvenanceMode(CallMode):
    """Hands out traced sizes, and turns size arguments into equations."""

    def __init__(self, tracer: Tracer, flow: Dataflow | None, device: torch.device | None) -> None:
        super().__init__(device)
        self.tracer = tracer
        self.flow = flow
        self.calls: list[TracedCall] = []

    def query(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in VALUE_READS:
            self.tracer.enter_call()
            self.tracer.read_values(tensors_in(args))
        result = func(*plain(args), **plain(kwargs))
        if name not in ("__get__.shape", "size", "numel", "nelement"):
            return result
        tensor = args[0]
        if not isinstance(tensor, Tensor) or not self.tracer.labelled(tensor):
            return result
        dims = self.tracer.dims(tensor)
        if isinstance(result, torch.Size):
            return torch.Size(_traced_size(n, slots) for n, slots in zip(result, dims, strict=True))
        if name == "size":
            wanted = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            return _traced_size(result, dims[int(wanted)])
        product: Any = 1
        for n, slots in zip(tensor.shape, dims, strict=True):
            product = product * _traced_size(n, slots)
        return product

    def operation(self, func: Any, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = super().operation(func, run, args, kwargs)
        if schema_name(func) == "aten::slice":
            _freeze_before(self.tracer, *args)
        return output

    def call(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.next_index += 1
        tracer = self.tracer
        if name in TAKES_SIZES:
            args, kwargs = recollected((args, kwargs), GuessedInt)
        outer = (tracer.call_name, tracer.call_args, tracer.call_kwargs)
        tracer.call_name, tracer.call_args, tracer.call_kwargs = name, args, kwargs
        tracer.enter_call()
        given = tensors_in((args, kwargs) if kwargs else args)
        inputs = tuple([tracer.dims(t) for t in given])
        try:
            output = self._run(name, func, plain(args), plain(kwargs))
        except Exception:
            # The module hooks unwind before anybody can ask them: keep the innermost place.
            tracer.failed_at = tracer.failed_at or f"in '{tracer.path.current}' ({name})"
            raise
        tracer.op_name = ""
        if name in VALUE_READS:
            tracer.read_values(tensors_in(args))
        followed = follow_multiples(tracer, name, args, given, output)
        if not followed:
            record_equations(tracer, name, args, kwargs, output)
        if self.flow is not None:
            self.flow.note(name, tracer.path.current, args, kwargs, output)
        results = results_of(name, args, output)
        self.calls.append(
            TracedCall(
                name,
                *tracer.place(),
                None if followed else numbers_in(name, args, kwargs),
                literals_in(name, args, kwargs),
                inputs,
                tuple([tracer.dims(t) for t in results]),
            )
        )
        tracer.call_name, tracer.call_args, tracer.call_kwargs = outer
        return output

    def _run(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call: by itself where it is an everyday one, else through torch's dispatcher."""
        found = lowered(name, args, kwargs)
        if found is None:
            if name != "lstm":
                return func(*args, **kwargs)
            with _step_by_step():
                return func(*args, **kwargs)
        apply_rule(self.tracer, found.op, found.args, {}, found.output)
        return found.result


@contextlib.contextmanager
def _step_by_step() -> Iterator[None]:
    """Recurrent layers as their steps, and not as the one operation that processors have."""
    usual = torch._C._get_mkldnn_enabled()  # noqa: SLF001 - the public way warns about other flags
    torch._C._set_mkldnn_enabled(False)  # noqa: SLF001
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(usual)  # noqa: SLF001


def _freeze_before(
    tracer: Tracer, x: Tensor, dim: int = 0, start: int | None = None, *_: Any
) -> None:
    """A slice from a fixed place: what is in front of it stays, or it would start elsewhere."""
    tracer.freeze(tracer.dims(x)[dim][:, : start or 0], f"slice at {start}")


def _traced_size(n: int, slots: Slots) -> int:
    return TracedInt(n, Dim(slots)) if len(slots) else int(n)


def _run(model: nn.Module, example_inputs: Any, substrate: str, outputs: Outputs) -> Trace:
    with steady_calls(model), ModulePath(model) as path, substrate_mode(substrate) as stand_in:
        tracer = Tracer(LabelStore(), path, substrate_device(substrate))
        parameters: dict[str, tuple[Slots, ...]] = {}
        stand_ins: dict[str, Tensor] = {}
        registered = tensors_of(model)
        for name, tensor in held_tensors_of(model).items():
            stand_ins[name] = stand_in(tensor)
            dims = tuple(tracer.fresh(n) for n in tensor.shape)
            parameters[name] = dims
            tracer.set(stand_ins[name], dims, (name, tuple(range(len(dims)))))
            # Zeroing a network is zeroing its parameters: buffers keep their values.
            tracer.set_zeros(stand_ins[name], [isinstance(tensor, nn.Parameter)] * len(dims))
        inputs = substitute(example_inputs, stand_in)
        kinds: set[Any] = {type(module) for _, module in modules_of(model)}
        asks = any(map(_asks_for_training, kinds))
        flow = Dataflow() if asks else None
        calls = _watch(tracer, model, stand_ins, inputs, outputs, flow)
        costs = list(tracer.costs)
        floating = {n: t for n, t in stand_ins.items() if t.is_floating_point() and n in registered}
        unused = [name for name, t in floating.items() if id(t) not in tracer.used]
        if unused or not _trains_alike(tracer, model, stand_ins, inputs, flow):
            _watch_training(tracer, model, stand_ins, inputs, unused, outputs)
    return Trace(
        store=tracer.store,
        parameters=parameters,
        shapes={name: tuple(t.shape) for name, t in stand_ins.items()},
        roles=tracer.roles,
        order=list(tracer.order),
        events=tracer.events,
        equations=tracer.equations,
        differences=tracer.differences,
        costs=costs,
        calls=calls,
        unknown=tracer.unknown,
        values_read=tracer.values_read,
        caches=tracer.caches,
        substrate=substrate,
        joins=tracer.joins,
        axes=tracer.axes,
        unreached=tuple([name for name in unused if id(floating[name]) not in tracer.used]),
    )


def _watch(
    tracer: Tracer,
    model: nn.Module,
    stand_ins: Mapping[str, Tensor],
    inputs: Any,
    outputs: Outputs,
    flow: Dataflow | None = None,
) -> list[TracedCall]:
    """One forward under all three layers; its outputs must keep their shape."""
    mode = _ProvenanceMode(tracer, flow, tracer.device)
    try:
        attributes = traced_attributes(model, tracer.compared, tracer.asked)
        with noting(), traced_products(), attributes, _RuleMode(mode, tracer), mode:
            output = call_substituted(model, stand_ins, inputs, tracer.caches)
    except Exception as error:
        raise _ForwardError(tracer.failed_at) from error
    if outputs is not None:
        output = picked_outputs(outputs, output)
    returned = tensors_in(output)
    tracer.at_output()
    tracer.use(returned)
    tracer.keep_multiples(returned)
    for name, tensor in named_tensors(output):
        tracer.at_output(name)
        tracer.freeze_tensor(tensor, "the model's output")
    return mode.calls


def _trains_alike(
    tracer: Tracer,
    model: nn.Module,
    stand_ins: Mapping[str, Tensor],
    inputs: Any,
    flow: Dataflow | None,
) -> bool:
    """Whether the training-mode forward computes the same of the same, dropout apart.

    True without looking where no module asks for its mode (``flow`` is None).
    """
    if flow is None:
        return True
    for _, module in modules_of(model):
        module.training = True
    mode = DataflowMode(tracer.path, tracer.device)
    try:
        with mode:
            call_substituted(model, stand_ins, inputs)
    except Exception:  # noqa: BLE001 - a user's forward may raise anything
        return False
    return mode.flow.steps == flow.steps


def _watch_training(
    tracer: Tracer,
    model: nn.Module,
    stand_ins: Mapping[str, Tensor],
    inputs: Any,
    unused: Sequence[str],
    outputs: Outputs,
) -> None:
    """Follow the training-mode forward too, for parts and paths that only run there.

    Everything learnt only restricts, so both modes stay right. Batch statistics of a single value
    are refused by torch: a second try doubles the batch. A model that cannot run in training mode
    on these inputs is only an error where it has parts that eval mode does not show.
    """
    for _, module in modules_of(model):
        module.training = True
    for times in (1, 2):
        batch = inputs
        try:
            if times == 2:
                batch = substitute(inputs, lambda t: torch.cat([t, t]) if t.dim() else t)
            _watch(tracer, model, stand_ins, batch, outputs)
        except Exception as error:  # noqa: BLE001 - a user's forward may raise anything
            failure = error
        else:
            return
    if not unused:
        return
    raise AnalysisError(
        f"parameters such as '{unused[0]}' ({len(unused)} in all) are not used in eval mode, and "
        f"the training-mode forward, which may use them, raised {_told(failure)}. Give "
        f"example_inputs that the model can train on (larger, say), or remove the unused parts."
    ) from (failure.__cause__ or failure)


@functools.lru_cache(maxsize=4096)
def _asks_for_training(kind: type) -> bool:
    """Whether a module's own code (not torch's) mentions its training flag."""
    return any(
        "training" in code.co_names
        for base in kind.__mro__
        if base.__module__.partition(".")[0] != "torch"
        for member in vars(base).values()
        if (code := getattr(member, "__code__", None)) is not None
    )


def trace_model(model: nn.Module, example_inputs: Any, outputs: Outputs = None) -> Trace:
    """Trace ``model`` on the cheapest substrate that can run it.

    Raises:
        AnalysisError: The model's own forward raised, on real tensors too.
        InvalidArgumentError: ``outputs`` raised.
    """
    on_meta = any(t.is_meta for t in tensors_of(model).values())
    substrates = ("meta", "fake") if on_meta else ("meta", "fake", "real")
    for substrate in substrates:
        try:
            return _run(model, example_inputs, substrate, outputs)
        except Exception as error:  # noqa: BLE001 - a user's forward may raise anything
            failure = error
    if isinstance(failure, ChanpruneError):
        raise failure
    advice = "Check that example_inputs are what the model takes."
    if on_meta:
        advice += " If it reads values of tensors, give it real ones: on meta there are none."
    raise AnalysisError(
        f"while tracing, the model's forward raised {_told(failure)}. {advice}"
    ) from (failure.__cause__ or failure)


def _told(failure: Exception) -> str:
    """An error of the user's forward in words, with its place where that is known."""
    cause = (failure.__cause__ if isinstance(failure, _ForwardError) else None) or failure
    place = f" {failure}" if isinstance(failure, _ForwardError) and str(failure) else ""
    line = raising_line(cause)
    place += f" at {line}" if line else ""
    return f"{type(cause).__name__}{place}: {str(cause).rstrip('.')}"

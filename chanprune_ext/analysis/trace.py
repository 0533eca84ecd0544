"""One run of a model in which every tensor dimension carries channel labels.

Three layers watch the same forward: module hooks know where it is, a function mode sees
Python-level calls with their size arguments, a dispatch mode applies one rule per ATen operation.
The model is run on meta tensors where that works, on fake tensors where devices are mixed, and on
real tensors where shapes depend on values.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from chanprune_ext.analysis.calls import (
    CallMode,
    ModulePath,
    source_line,
    steady_calls,
    tensors_in,
)
from chanprune_ext.analysis.labels import LabelStore
from chanprune_ext.analysis.provenance import (
    Attribute,
    Dim,
    Equation,
    Expr,
    Op,
    TracedInt,
    expression,
    leaves,
    plain,
    traced_attributes,
)
from chanprune_ext.analysis.rules import apply_rule
from chanprune_ext.analysis.sizes import numbers_in, record_equations
from chanprune_ext.errors import AnalysisError

__all__ = ["Cost", "Event", "Slots", "Trace", "TracedCall", "Tracer", "substitute", "trace_model"]

Slots = np.ndarray  # int64 (k, n): k label slots for each of the n indices of one dimension
# The parameter that a tensor computed from parameters alone stands for: its entry, and for each dim
# the parameter's dim (or None).
Origin = tuple[str, tuple[int | None, ...]]
# Two rows of slots that one operation made equal, column by column, and the event that says where.
Join = tuple[int, Slots, Slots]
NORMALISED = 1  # flag: some layer computes a statistic over these channels


@dataclass(frozen=True)
class Event:
    """Where and why labels were restricted."""

    op: str
    module: str
    source: str
    detail: str

    def __str__(self) -> str:
        where = f"in '{self.module}' " if self.module else ""
        return f"{self.detail or self.op} {where}({self.source})"


@dataclass(frozen=True, eq=False)
class Cost:
    """Multiply-accumulates of a contraction: ``constant`` times the surviving sizes of ``dims``."""

    module: str
    constant: int
    dims: tuple[Slots, ...]


@dataclass(frozen=True, eq=False)
class TracedCall:
    """One Python-level call: what a replay must do again, with which shapes.

    Attributes:
        name: Low-level name, such as ``"conv2d"``.
        module: Dotted path of the innermost module being run.
        source: ``file.py:line`` of the calling line.
        numbers: Numbers it computes with.
        inputs: Slots of every dim of every tensor among its arguments, before it ran.
        outputs: Slots of every dim of every tensor it made.
    """

    name: str
    module: str
    source: str
    numbers: tuple[float, ...]
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
    substrate: str
    joins: list[Join] = field(default_factory=list)
    axes: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _State:
    dims: tuple[Slots, ...]
    origin: Origin | None = None
    zeros: tuple[bool, ...] = ()


def anonymous(n: int) -> Slots:
    """The slots of a dimension nobody may shorten."""
    return np.empty((0, n), dtype=np.int64)


def _storage(tensor: Tensor) -> int:
    """What a tensor and its views share, also on the meta device, where nothing has an address."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001


@dataclass(eq=False)
class Tracer:
    """The state rules work on. Every method that restricts labels records who asked for it."""

    store: LabelStore
    path: ModulePath
    events: list[Event] = field(default_factory=list)
    equations: list[Equation] = field(default_factory=list)
    differences: list[Equation] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    roles: dict[tuple[str, int], str] = field(default_factory=dict)
    order: dict[str, None] = field(default_factory=dict)
    unknown: list[Event] = field(default_factory=list)
    joins: list[Join] = field(default_factory=list)
    axes: list[int] = field(default_factory=list)  # first label of every row of new labels, rising
    used: set[int] = field(default_factory=set)
    failed_at: str = ""
    call_args: tuple[Any, ...] = ()
    call_kwargs: dict[str, Any] = field(default_factory=dict)
    call_name: str = ""
    op_name: str = ""
    _states: dict[int, _State] = field(default_factory=dict)
    _alive: list[Any] = field(default_factory=list)
    _overwritten: set[int] = field(default_factory=set)
    _pending: dict[int, tuple[Slots, int]] = field(default_factory=dict)
    _where: tuple[str, str] | None = None

    # -- tensors ---------------------------------------------------------------------------------

    def dims(self, tensor: Tensor) -> tuple[Slots, ...]:
        """The slots of every dimension of ``tensor``."""
        state = self._states.get(id(tensor))
        if state is not None:
            if tuple(slots.shape[1] for slots in state.dims) == tuple(tensor.shape):
                return state.dims
            # Reshaped in place by an operation no rule followed: its channels must all stay.
            for slots in state.dims:
                self.freeze(slots, "a tensor changes its shape in place")
        return tuple(anonymous(n) for n in tensor.shape)

    def recorded(self, tensor: Tensor) -> tuple[tuple[Slots, ...], Origin | None]:
        """Slots and origin as last recorded, though the operation may have changed the shape."""
        state = self._states.get(id(tensor))
        return (self.dims(tensor), None) if state is None else (state.dims, state.origin)

    def labelled(self, tensor: Tensor) -> bool:
        """Whether any dimension of ``tensor`` carries labels."""
        state = self._states.get(id(tensor))
        return state is not None and any(len(slots) for slots in state.dims)

    def set(
        self,
        tensor: Tensor,
        dims: Sequence[Slots],
        origin: Origin | None = None,
    ) -> None:
        """Give ``tensor`` its slots."""
        sizes = tuple(slots.shape[1] for slots in dims)
        if sizes != tuple(tensor.shape):
            raise AssertionError(f"{self.op_name}: slots {sizes} for shape {tuple(tensor.shape)}")
        self._alive.append(tensor)
        self._states[id(tensor)] = _State(tuple(dims), origin)

    def origin(self, tensor: Tensor) -> Origin | None:
        """The parameter that ``tensor`` stands for, if it is computed from parameters alone."""
        state = self._states.get(id(tensor))
        return None if state is None else state.origin

    def zeros(self, tensor: Tensor) -> tuple[bool, ...]:
        """For every dimension, whether the zeroed network is zero at what is removed of it.

        True for a dimension without labels, of which nothing is removed.
        """
        state = self._states.get(id(tensor))
        if state is None:
            return (True,) * tensor.dim()
        known = len(state.zeros) == tensor.dim() and not (
            self._overwritten and _storage(tensor) in self._overwritten
        )
        return tuple(
            not len(slots) or (known and state.zeros[d])
            for d, slots in enumerate(self.dims(tensor))
        )

    def set_zeros(self, tensor: Tensor, zeros: Sequence[bool], *, changed: bool = False) -> None:
        """Record :meth:`zeros`; with ``changed`` the tensor was changed in place, and its views."""
        self._states[id(tensor)].zeros = tuple(zeros)
        if changed and not all(self.zeros(tensor)):
            self._overwritten.add(_storage(tensor))

    def note_role(self, tensor: Tensor, dim: int, role: str) -> None:
        """Record that ``dim`` of a weight makes (``"out"``) or reads (``"in"``) channels."""
        origin = self.origin(tensor)
        if origin is not None and origin[1][dim] is not None:
            self.order.setdefault(origin[0])
            self.roles.setdefault((origin[0], int(origin[1][dim])), role)  # type: ignore[arg-type]

    # -- labels ----------------------------------------------------------------------------------

    def reason(self, detail: str = "") -> int:
        """A fresh event at the place that is running now."""
        module, source = self.place()
        self.events.append(Event(self.op_name or self.call_name, module, source, detail))
        return len(self.events) - 1

    def fresh(self, n: int) -> Slots:
        """New labels for a dimension whose content is the same at every index."""
        if n <= 1:
            return anonymous(n)
        first = self.store.fresh(n)
        self.axes.append(first)
        return np.arange(first, first + n, dtype=np.int64)[None]

    def place(self) -> tuple[str, str]:
        """Module path and ``file.py:line`` of what is running now."""
        if self._where is None:
            file, line = source_line()
            self._where = (self.path.current, f"{Path(file).name}:{line}")
        return self._where

    def enter_call(self) -> None:
        """A Python-level call starts: forget where the last one was."""
        self.op_name = ""
        self._where = None

    def at_output(self) -> None:
        """What follows happens where the model returns."""
        self.op_name = self.call_name = "output"
        self._where = ("", "model output")

    def unify(self, a: Slots, b: Slots) -> None:
        """Index i of ``a`` is removed if and only if index i of ``b`` is."""
        if a is b or (not len(a) and not len(b)) or (a.shape == b.shape and np.array_equal(a, b)):
            return
        reason = self.reason("channels meet others that cannot be removed")
        self.store.unify(a, b, reason)
        if len(a) and len(b):
            self.joins.append((reason, a, b))

    def note_factors(
        self, reason: int, first: int, slots: Slots, sizes: Sequence[int], pieces: Sequence[Slots]
    ) -> None:
        """Remember that a split of ``slots`` made new labels, from ``first`` on, for ``pieces``."""
        self.axes.append(first)
        positions = np.unravel_index(np.arange(slots.shape[1]), tuple(sizes))
        for piece, position in zip(pieces, positions, strict=True):
            if (piece >= first).any():
                self.joins.append((reason, slots, piece[:, position]))

    def freeze(self, slots: Slots, detail: str) -> None:
        """Keep every index of this dimension."""
        if len(slots):
            self.store.freeze(slots.ravel(), self.reason(detail))

    def freeze_tensor(self, tensor: Tensor, detail: str) -> None:
        """Keep every index of every dimension of ``tensor``."""
        for slots in self.dims(tensor):
            self.freeze(slots, detail)

    def freeze_if_used(self, tensor: Tensor, slots: Slots, detail: str) -> None:
        """Keep every index of this dimension if anything is computed with ``tensor``."""
        if len(slots):
            self._pending[id(tensor)] = slots, self.reason(detail)

    def use(self, tensors: Iterable[Tensor]) -> None:
        """An operation computes with these tensors, or the model returns them."""
        for tensor in tensors:
            self.used.add(id(tensor))
            if id(tensor) in self._pending:
                slots, reason = self._pending.pop(id(tensor))
                self.store.freeze(slots.ravel(), reason)

    def flag_normalised(self, slots: Slots) -> None:
        """Remember that a statistic is taken over this dimension."""
        if len(slots):
            self.store.set_flag(slots.ravel(), NORMALISED)

    def equate(self, size: Any, slots: Slots, detail: str = "") -> None:
        """Require that the size argument ``size`` equals the surviving size of ``slots``."""
        if isinstance(size, bool) or not isinstance(size, int):
            return
        # A plain number for a dimension nobody may shorten says nothing; a traced one must stay.
        if len(slots) or isinstance(size, TracedInt):
            self.equations.append(
                Equation(expression(size), slots, self.reason(detail or f"size {int(size)}"))
            )

    def keep_value(self, number: TracedInt, detail: str) -> None:
        """Require that ``number``, and all it is made of, does not change."""
        for leaf in leaves(number.expr):
            if isinstance(leaf, Dim):
                self.freeze(leaf.slots, detail)
            elif isinstance(leaf, Attribute) and leaf.value >= 0:
                reason = self.reason(detail)
                self.equations.append(Equation(leaf, anonymous(leaf.value), reason))

    def compared(self, left: Expr, right: Expr, equal: bool) -> None:
        """The forward compared two sizes: equal or different, they must stay so."""
        if not equal:
            if any(isinstance(leaf, (Dim, Attribute)) for leaf in leaves(Op("-", left, right))):
                self.enter_call()
                reason = self.reason("two sizes must stay different")
                difference = Op("-", left, right)
                self.differences.append(Equation(difference, anonymous(0), reason))
            return
        if not any(isinstance(leaf, Dim) for leaf in (*leaves(left), *leaves(right))):
            return
        if isinstance(left, Dim):
            left, right = right, left
        self.enter_call()
        reason = self.reason("two sizes must stay equal")
        if isinstance(right, Dim):
            self.equations.append(Equation(left, right.slots, reason))
        else:
            self.equations.append(Equation(Op("-", left, right), anonymous(0), reason))

    def argument(self, position: int, name: str) -> Any:
        """An argument of the Python-level call that is running, as the caller wrote it."""
        if len(self.call_args) > position:
            return self.call_args[position]
        return self.call_kwargs.get(name)

    def cost(self, constant: int, *dims: Slots) -> None:
        """Count multiply-accumulates of the operation that is running."""
        fixed = constant
        kept = []
        for slots in dims:
            if len(slots):
                kept.append(slots)
            else:
                fixed *= slots.shape[1]
        self.costs.append(Cost(self.path.current, fixed, tuple(kept)))


class _ForwardError(Exception):
    """The user's forward raised; the argument says where, the cause is what it raised."""


class _RuleMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Applies the rule of each ATen operation after it has run."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        apply_rule(self.tracer, func, args, kwargs, output)
        return output


class _ProvenanceMode(CallMode):
    """Hands out traced sizes, and turns size arguments into equations."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer
        self.calls: list[TracedCall] = []

    def query(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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

    def call(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.next_index += 1
        tracer = self.tracer
        outer = (tracer.call_name, tracer.call_args, tracer.call_kwargs)
        tracer.call_name, tracer.call_args, tracer.call_kwargs = name, args, kwargs
        tracer.enter_call()
        inputs = tuple(tracer.dims(t) for t in tensors_in((args, kwargs)))
        try:
            output = func(*plain(args), **plain(kwargs))
        except Exception:
            # The module hooks unwind before anybody can ask them: keep the innermost place.
            tracer.failed_at = tracer.failed_at or f"in '{tracer.path.current}' ({name})"
            raise
        tracer.op_name = ""
        record_equations(tracer, name, args, kwargs, output)
        results = tensors_in(args[:1]) if name == "__setitem__" else tensors_in(output)
        self.calls.append(
            TracedCall(
                name,
                *tracer.place(),
                numbers_in(name, args, kwargs),
                inputs,
                tuple(tracer.dims(t) for t in results),
            )
        )
        tracer.call_name, tracer.call_args, tracer.call_kwargs = outer
        return output


def _traced_size(n: int, slots: Slots) -> int:
    return TracedInt(n, Dim(slots)) if len(slots) else int(n)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once, under its first name."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    found.update((name, b) for name, b in model.named_buffers() if isinstance(b, Tensor))
    return found


def substitute(value: Any, change: Any) -> Any:
    """``value`` with ``change`` applied to each tensor inside tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {k: substitute(v, change) for k, v in value.items()}
    if isinstance(value, tuple):
        items = [substitute(v, change) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [substitute(v, change) for v in value]
    return value


@contextlib.contextmanager
def substrate_mode(substrate: str) -> Iterator[Any]:
    """A function tensor -> stand-in for ``"meta"``, ``"fake"`` or ``"real"``."""
    if substrate == "meta":
        with torch.device("meta"):
            yield lambda t: t.detach().to("meta")
    elif substrate == "fake":
        from torch._subclasses import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield lambda t: mode.from_tensor(t.detach(), static_shapes=True)
    else:
        # A copy: a training-mode forward moves the running statistics.
        yield lambda t: t.detach().clone()


def call_substituted(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Any) -> Any:
    """Run ``model`` with other tensors in place of its parameters and buffers.

    A tensor is replaced wherever a module holds it: under every name of a shared module (where
    ``torch.func.functional_call`` would not put the original back), and in plain attributes. What
    the forward stores on its modules (a counter, an entry of a cache, a hook or its result) is
    forgotten.
    """
    originals = tensors_of(model)
    stand_ins = {id(originals[name]): tensor for name, tensor in tensors.items()}

    def change(tensor: Tensor) -> Tensor:
        return stand_ins.get(id(tensor), tensor)

    before = [(module, dict(module.__dict__)) for module in model.modules()]
    caches: list[tuple[Any, Any]] = []
    try:
        for module, attributes in before:
            for name, value in attributes.items():
                if name in ("_parameters", "_buffers") or _holds_tensors(value):
                    module.__dict__[name] = substitute(value, change)
                elif type(value) in (dict, OrderedDict, list, set):
                    caches.append((value, value.copy()))
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    finally:
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for cache, content in caches:
            cache.clear()
            cache.extend(content) if isinstance(cache, list) else cache.update(content)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        type(value) in (list, tuple) and bool(value) and isinstance(value[0], Tensor)
    )


def _run(model: nn.Module, example_inputs: Any, substrate: str) -> Trace:
    with steady_calls(model), ModulePath(model) as path, substrate_mode(substrate) as stand_in:
        tracer = Tracer(LabelStore(), path)
        parameters: dict[str, tuple[Slots, ...]] = {}
        stand_ins: dict[str, Tensor] = {}
        for name, tensor in tensors_of(model).items():
            stand_ins[name] = stand_in(tensor)
            dims = tuple(tracer.fresh(n) for n in tensor.shape)
            parameters[name] = dims
            tracer.set(stand_ins[name], dims, (name, tuple(range(len(dims)))))
            # Zeroing a network is zeroing its parameters: buffers keep their values.
            tracer.set_zeros(stand_ins[name], [isinstance(tensor, nn.Parameter)] * len(dims))
        inputs = substitute(example_inputs, stand_in)
        calls = _watch(tracer, model, stand_ins, inputs)
        costs = list(tracer.costs)
        unused = [
            name
            for name, t in stand_ins.items()
            if id(t) not in tracer.used and t.is_floating_point()
        ]
        if unused or any(map(_asks_for_training, {type(m) for m in model.modules()})):
            _watch_training(tracer, model, stand_ins, inputs, unused)
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
        substrate=substrate,
        joins=tracer.joins,
        axes=tracer.axes,
    )


def _watch(
    tracer: Tracer, model: nn.Module, stand_ins: Mapping[str, Tensor], inputs: Any
) -> list[TracedCall]:
    """One forward under all three layers; its outputs must keep their shape."""
    mode = _ProvenanceMode(tracer)
    try:
        with traced_attributes(model, tracer.compared), _RuleMode(tracer), mode:
            output = call_substituted(model, stand_ins, inputs)
    except Exception as error:
        raise _ForwardError(tracer.failed_at) from error
    tracer.at_output()
    returned = tensors_in(output)
    tracer.use(returned)
    for tensor in returned:
        tracer.freeze_tensor(tensor, "the model's output")
    return mode.calls


def _watch_training(
    tracer: Tracer,
    model: nn.Module,
    stand_ins: Mapping[str, Tensor],
    inputs: Any,
    unused: Sequence[str],
) -> None:
    """Follow the training-mode forward too, for parts and paths that only run there.

    Everything learnt only restricts, so both modes stay right. Batch statistics of a single value
    are refused by torch: a second try doubles the batch. A model that cannot run in training mode
    on these inputs is only an error where it has parts that eval mode does not show.
    """
    for module in model.modules():
        module.training = True
    doubled = substitute(inputs, lambda t: torch.cat([t, t]) if t.dim() else t)
    for batch in (inputs, doubled):
        try:
            _watch(tracer, model, stand_ins, batch)
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


def _asks_for_training(kind: type[nn.Module]) -> bool:
    """Whether a module's own code (not torch's) mentions its training flag."""
    return any(
        "training" in code.co_names
        for base in kind.__mro__
        if base.__module__.partition(".")[0] != "torch"
        for member in vars(base).values()
        if (code := getattr(member, "__code__", None)) is not None
    )


def trace_model(model: nn.Module, example_inputs: Any) -> Trace:
    """Trace ``model`` on the cheapest substrate that can run it.

    Raises:
        AnalysisError: The model's own forward raised, on real tensors too.
    """
    on_meta = any(t.is_meta for t in tensors_of(model).values())
    substrates = ("meta", "fake") if on_meta else ("meta", "fake", "real")
    for substrate in substrates:
        try:
            return _run(model, example_inputs, substrate)
        except Exception as error:  # noqa: BLE001 - a user's forward may raise anything
            failure = error
    if isinstance(failure, AnalysisError):
        raise failure
    raise AnalysisError(
        f"while tracing, the model's forward raised {_told(failure)}. Check that example_inputs "
        f"are what the model takes."
    ) from (failure.__cause__ or failure)


def _told(failure: Exception) -> str:
    """An error of the user's forward in words, with its place where that is known."""
    cause = failure.__cause__ if isinstance(failure, _ForwardError) else failure
    place = f" {failure}" if isinstance(failure, _ForwardError) and str(failure) else ""
    return f"{type(cause).__name__}{place}: {str(cause).rstrip('.')}"

"""What the rules work on: labels of tensors, and the equations, costs and events of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from chanprune_ext.analysis.calls import argument_of, source_place
from chanprune_ext.analysis.provenance import (
    Attribute,
    Dim,
    Equation,
    Expr,
    GuessedInt,
    Op,
    TracedInt,
    expression,
    leaves,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from chanprune_ext.analysis.labels import LabelStore
    from chanprune_ext.analysis.module_path import ModulePath

__all__ = [
    "ADDED",
    "HEADS",
    "HEAD_DIM",
    "NORMALISED",
    "Cost",
    "Event",
    "Slots",
    "Tracer",
    "anonymous",
]

Slots = np.ndarray  # int64 (k, n): k label slots for each of the n indices of one dimension
# The parameter that a tensor computed from parameters alone stands for: its entry, and for each dim
# the parameter's dim (or None).
Origin = tuple[str, tuple[int | None, ...]]
# Of a tensor joined from parameters: each of these, and for each dim of the whole its own or None.
Parts = tuple[tuple["Tensor", tuple[int | None, ...]], ...]
# Two rows of slots that one operation made equal, column by column, and the event that says where.
Join = tuple[int, Slots, Slots]

# Flags of channels: a layer computes a statistic over them; they number attention heads; they are
# the width of a head; one path of the network adds them to another's.
NORMALISED, HEADS, HEAD_DIM, ADDED = 1, 2, 4, 8


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


@dataclass(eq=False)
class _State:
    dims: tuple[Slots, ...]
    shape: tuple[int, ...]
    zeros: tuple[bool, ...]
    origin: Origin | None = None
    rows: bool = False  # chosen from a parameter


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
    device: torch.device | None = None  # where calls that name none make their tensors
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
    values_read: dict[str, str] = field(default_factory=dict)
    caches: set[tuple[str, str]] = field(default_factory=set)
    call_args: tuple[Any, ...] = ()
    call_kwargs: dict[str, Any] = field(default_factory=dict)
    call_name: str = ""
    op_name: str = ""
    _states: dict[int, _State] = field(default_factory=dict)
    _parts: dict[int, Parts] = field(default_factory=dict)
    _alive: list[Any] = field(default_factory=list)
    _overwritten: set[int] = field(default_factory=set)
    _pending: dict[int, tuple[Slots, int]] = field(default_factory=dict)
    _multiples: dict[int, TracedInt] = field(default_factory=dict)
    _where: tuple[str, str] | None = None
    _asked: dict[str, set[Attribute]] = field(default_factory=dict)

    # -- tensors ---------------------------------------------------------------------------------

    def dims(self, tensor: Tensor) -> tuple[Slots, ...]:
        """The slots of every dimension of ``tensor``."""
        state = self._states.get(id(tensor))
        if state is not None:
            if state.shape == tensor.shape:
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
        return state is not None and any(map(len, state.dims))

    def set(
        self,
        tensor: Tensor,
        dims: Sequence[Slots],
        origin: Origin | None = None,
    ) -> None:
        """Give ``tensor`` its slots."""
        sizes = tuple([slots.shape[1] for slots in dims])
        if sizes != tensor.shape:
            raise AssertionError(f"{self.op_name}: slots {sizes} for shape {tuple(tensor.shape)}")
        self._alive.append(tensor)
        self._parts.pop(id(tensor), None)
        zeros = tuple([not len(slots) for slots in dims])
        self._states[id(tensor)] = _State(tuple(dims), sizes, zeros, origin)

    def origin(self, tensor: Tensor) -> Origin | None:
        """The parameter that ``tensor`` stands for, if it is computed from parameters alone."""
        state = self._states.get(id(tensor))
        return None if state is None else state.origin

    def note_rows(self, tensor: Tensor, source: Tensor) -> None:
        """``tensor`` holds what was picked from ``source`` by index."""
        self._states[id(tensor)].rows = self.of_parameters(source)

    def of_parameters(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is computed from parameters alone, or was picked from such."""
        state = self._states.get(id(tensor))
        return state is not None and (state.origin is not None or state.rows)

    def zeros(self, tensor: Tensor) -> tuple[bool, ...]:
        """For every dimension, whether the zeroed network is zero at what is removed of it.

        True for a dimension without labels, of which nothing is removed.
        """
        state = self._states.get(id(tensor))
        if state is None:
            return (True,) * tensor.dim()
        if state.shape != tensor.shape:
            return tuple([not len(slots) for slots in self.dims(tensor)])
        if self._overwritten and _storage(tensor) in self._overwritten:
            return tuple([not len(slots) for slots in state.dims])
        return state.zeros

    def set_zeros(self, tensor: Tensor, zeros: Sequence[bool], *, changed: bool = False) -> None:
        """Record :meth:`zeros`; with ``changed`` the tensor was changed in place, and its views."""
        state = self._states[id(tensor)]
        if len(zeros) == len(state.dims):
            pairs = zip(zeros, state.dims, strict=True)
            state.zeros = tuple([bool(zero) or not len(slots) for zero, slots in pairs])
        if changed and not all(self.zeros(tensor)):
            self._overwritten.add(_storage(tensor))

    def read_values(self, tensors: Iterable[Tensor]) -> None:
        """The values of these tensors leave torch: nothing that comes of them can be followed."""
        module, source = self.place()
        self.values_read.setdefault(source, module)
        tensors = list(tensors)
        self.keep_multiples(tensors)
        for tensor in tensors:
            self.freeze_tensor(tensor, "values leave torch")

    def set_multiple(self, tensor: Tensor, size: TracedInt) -> None:
        """``tensor``, and all that share its memory, hold what something counts times a size."""
        self._alive.append(tensor)
        self._multiples[_storage(tensor)] = size

    def multiple_of(self, tensor: Tensor) -> TracedInt | None:
        """The size that :meth:`set_multiple` has recorded."""
        if not self._multiples or tensor.layout is not torch.strided:  # others have none
            return None
        return self._multiples.get(_storage(tensor))

    def any_multiple(self, tensors: Iterable[Tensor]) -> bool:
        """Whether any of these tensors holds a multiple of a size."""
        return bool(self._multiples) and any(map(self.multiple_of, tensors))

    def keep_multiples(self, tensors: Iterable[Tensor]) -> None:
        """Sizes that any of these tensors holds multiples of stay: they are computed with."""
        for tensor in tensors:
            size = self.multiple_of(tensor)
            if size is not None:
                self.keep_value(size, "their number is used in a computation")

    def parts(self, tensor: Tensor) -> Parts:
        """The parameters, and what is joined from such, that ``tensor`` is joined from."""
        return self._parts.get(id(tensor), ())

    def set_parts(self, tensor: Tensor, parts: Parts) -> None:
        """Record :meth:`parts`, after :meth:`set`; what comes of no parameter is left out."""
        known = tuple([p for p in parts if self.origin(p[0]) is not None or self.parts(p[0])])
        if known:
            self._parts[id(tensor)] = known

    def note_role(self, tensor: Tensor, dim: int, role: str) -> None:
        """Record that ``dim`` of a weight makes (``"out"``) or reads (``"in"``) channels."""
        origin = self.origin(tensor)
        if origin is not None and origin[1][dim] is not None:
            self.order.setdefault(origin[0])
            self.roles.setdefault((origin[0], int(origin[1][dim])), role)  # type: ignore[arg-type]
        for part, dims in self.parts(tensor):
            whose = dims[dim]
            if whose is not None:
                self.note_role(part, whose, role)

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
            self._where = (self.path.current, source_place())
        return self._where

    def enter_call(self) -> None:
        """A Python-level call starts: forget where the last one was."""
        self.op_name = ""
        self._where = None

    def at_output(self, name: str = "") -> None:
        """What follows happens where the model returns, this one of several tensors."""
        self.op_name = self.call_name = "output"
        self._where = ("", name or "model output")

    def unify(self, a: Slots, b: Slots) -> None:
        """Index i of ``a`` is removed if and only if index i of ``b`` is."""
        if a is b or (not len(a) and not len(b)):
            return
        if a.shape == b.shape and a.tobytes() == b.tobytes():
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

    def same_channels(self, a: Slots, b: Slots) -> bool:
        """Whether two dimensions are known to lose the same indices already."""
        return a is b or np.array_equal(self.store.resolve(a), self.store.resolve(b))

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

    def flag(self, slots: Slots, bit: int) -> None:
        """Remember something about the channels of this dimension."""
        if len(slots):
            self.store.set_flag(slots.ravel(), bit)

    def flag_normalised(self, slots: Slots) -> None:
        """Remember that a statistic is taken over this dimension."""
        self.flag(slots, NORMALISED)

    def equate(self, size: Any, slots: Slots, detail: str = "") -> None:
        """Require that the size argument ``size`` equals the surviving size of ``slots``."""
        if isinstance(size, bool) or not isinstance(size, int):
            return
        # A plain number for a dimension nobody may shorten says nothing; a traced one must stay.
        if len(slots) or (isinstance(size, TracedInt) and not isinstance(size, GuessedInt)):
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
        self.enter_call()
        self.keep_equal(left, right, "two sizes must stay equal")

    def keep_equal(self, left: Expr, right: Expr, detail: str) -> None:
        """Require that two sizes stay equal."""
        if isinstance(left, Dim):
            left, right = right, left
        reason = self.reason(detail)
        if isinstance(right, Dim):
            self.equations.append(Equation(left, right.slots, reason))
        else:
            self.equations.append(Equation(Op("-", left, right), anonymous(0), reason))

    def asked(self, size: Expr) -> None:
        """The forward asked whether a size is larger than another."""
        if isinstance(size, Attribute):
            self._asked.setdefault(self.path.current, set()).add(size)

    def asked_of(self, value: int) -> TracedInt | None:
        """The one attribute of this value that the running module has asked about."""
        found = [each for each in self._asked.get(self.path.current, ()) if each.value == value]
        return TracedInt(value, found[0]) if len(found) == 1 else None

    def argument(self, position: int, name: str) -> Any:
        """An argument of the Python-level call that is running, as the caller wrote it."""
        return argument_of(self.call_args, self.call_kwargs, position, name)

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

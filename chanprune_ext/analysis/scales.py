"""Constants that follow a width, folded into the weights in front of them.

Attention divides its logits by the square root of the head width. When head dims are pruned, code
that computes this number from a shape arrives at another one, and the network would no longer be
the zeroed original. The producer of the scaled values (the query projection, or the norm behind it)
is multiplied by the ratio of the two numbers instead.

Which rows of which parameters that are is found by running the model once more with row numbers in
place of values: they travel through views, splits, rotations and products up to the constant. They
may be scaled if they end up nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from chanprune_ext.analysis.calls import argument_of, results_of, steady_calls, tensors_in
from chanprune_ext.analysis.handlers import entering
from chanprune_ext.analysis.meta_calls import MetaCalls, run_call
from chanprune_ext.analysis.stand_ins import (
    call_substituted,
    held_tensors_of,
    substitute,
    substrate_device,
    substrate_mode,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence, Set

__all__ = ["Rescaling", "fold_scales", "scale_factor", "scaled_outputs"]

ATTENTION = "scaled_dot_product_attention"


@dataclass(frozen=True, eq=False)
class Rescaling:
    """Indices of one dim of a parameter or buffer that are multiplied by a factor.

    Attributes:
        entry: Name of the parameter or buffer.
        dim: The dim that ``indices`` count.
        indices: int64 (n,), in the numbering of the unpruned model, sorted.
        factor: What they are multiplied by.
    """

    entry: str
    dim: int
    indices: Tensor
    factor: float


def scale_factor(
    name: str, before: Sequence[float | complex], after: Sequence[float | complex]
) -> float | None:
    """What the first tensor of a call must be multiplied by for a changed number not to matter.

    None where no factor can make up for it.
    """
    changed = [(b, a) for b, a in zip(before, after, strict=False) if b != a]
    if len(before) != len(after) or len(changed) != 1 or 0.0 in changed[0]:
        return None
    old, new = changed[0]
    if isinstance(old, complex) or isinstance(new, complex):
        return None
    kind = name.strip("_")
    if kind in ("mul", "multiply", "rmul") or name == ATTENTION:
        return old / new
    if kind in ("div", "divide", "true_divide", "truediv"):
        return new / old
    return None


def fold_scales(
    model: nn.Module,
    example_inputs: Any,
    substrate: str,
    factors: Mapping[int, float],
) -> tuple[list[Rescaling], list[int]]:
    """Find the parameters to multiply so that scaled calls give what they gave before.

    Args:
        model: The unpruned model.
        example_inputs: The inputs it was traced with.
        substrate: The kind of tensors it was traced on.
        factors: Index of a call -> what its first tensor must be multiplied by.

    Returns:
        The rescalings, and the calls they cannot be found for, each next to those before it.
    """
    mode = _followed(model, example_inputs, substrate, factors)
    refused: list[int] = []
    while True:
        rescalings, call = mode.rescalings()
        if call is None:
            return rescalings, refused
        refused.append(call)
        mode.pass_over(call)


def scaled_outputs(
    model: nn.Module,
    example_inputs: Any,
    substrate: str,
    factors: Mapping[int, float],
    calls: Iterable[int],
) -> dict[int, Tensor]:
    """What the outputs of calls are multiplied by once parameters are, and not yet made up for.

    Args:
        model: The unpruned model.
        example_inputs: The inputs it was traced with.
        substrate: The kind of tensors it was traced on.
        factors: As for :func:`fold_scales`.
        calls: Indices of the calls to look at.

    Returns:
        Index of a call -> float64 factors of its first output, which they are broadcast to; calls
        whose outputs stay as they are have none.
    """
    mode = _followed(model, example_inputs, substrate, factors, frozenset(calls))
    factor_of = mode.row_factors()[0]
    found: dict[int, Tensor] = {}
    for index, output in mode.watched.items():
        ids = mode.ids.get(id(output))
        if ids is None:
            continue
        narrow = ids[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in ids.stride())]
        # Of elements that no row scales the number is -1: the last one.
        values = torch.from_numpy(np.append(factor_of, np.nan))[narrow].nan_to_num(nan=1.0)
        for dim in range(values.dim()):
            first = values.narrow(dim, 0, 1)
            values = first if bool((values == first).all()) else values
        if bool((values != 1).any()):
            found[index] = values
    return found


def _followed(
    model: nn.Module,
    example_inputs: Any,
    substrate: str,
    factors: Mapping[int, float],
    watch: Set[int] = frozenset(),
) -> _RowMode:
    """The model run with row numbers in place of values."""
    with steady_calls(model), substrate_mode(substrate) as stand_in:
        tensors = {name: stand_in(t) for name, t in held_tensors_of(model).items()}
        inputs = substitute(example_inputs, stand_in)
        mode = _RowMode(tensors, factors, substrate_device(substrate), watch)
        with mode:
            output = call_substituted(model, tensors, inputs)
    for tensor in tensors_in(output):
        mode.leave(tensor)
    return mode


@dataclass(eq=False)
class _Rows:
    """Numbers for the rows of parameters; rows of one class are scaled together or not at all."""

    starts: dict[tuple[str, int], int] = field(default_factory=dict)
    count: int = 0
    pairs: list[np.ndarray] = field(default_factory=list)

    def add(self, entry: str, dim: int, n: int) -> int:
        """The number of the first row of a dim of a parameter."""
        start = self.starts.setdefault((entry, dim), self.count)
        if start == self.count:
            self.count += n
        return start

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Rows that meet in one element of two broadcast tensors of row numbers."""
        shape = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
        a, b = a.expand(shape), b.expand(shape)
        once = tuple(
            0 if s == t == 0 else slice(None) for s, t in zip(a.stride(), b.stride(), strict=True)
        )
        pairs = torch.stack([a[once].flatten(), b[once].flatten()]).numpy()
        self.pairs.append(pairs[:, (pairs >= 0).all(axis=0)])

    def classes(self) -> np.ndarray:
        """Int (count,): the class of every row."""
        a, b = np.concatenate([np.empty((2, 0), dtype=np.int64), *self.pairs], axis=1)
        shape = (self.count, self.count)
        graph = coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape=shape)
        return np.asarray(connected_components(graph, directed=False)[1])


@dataclass(frozen=True, eq=False)
class _Running:
    """The call that has just run."""

    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def given(self, position: int, name: str = "input") -> Any:
        """One of the arguments, as :func:`argument_of` finds it."""
        return argument_of(self.args, self.kwargs, position, name)


def _distinct(ids: Tensor) -> np.ndarray:
    """Different row numbers of a tensor, stretched dims looked at once."""
    narrow = ids[tuple(0 if stride == 0 else slice(None) for stride in ids.stride())]
    return np.unique(narrow.numpy())


class _RowMode(MetaCalls):
    """Carries, beside every value that is linear in some rows of a parameter, those rows' numbers.

    A value's tensor of row numbers has the value's shape; -1 stands for elements that no row
    scales.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        factors: Mapping[int, float],
        device: torch.device | None = None,
        watch: Set[int] = frozenset(),
    ) -> None:
        super().__init__(device)
        self.entries = {id(t): name for name, t in tensors.items() if t.is_floating_point()}
        self.turned: set[int] = set()  # of those in ``entries``: transposed
        self.factors = factors
        self.rows = _Rows()
        self.ids: dict[int, Tensor] = {}
        self.alive: list[Any] = [tensors]
        self.exits: list[tuple[int | None, np.ndarray]] = []
        self.missing: list[int] = []
        self.watch = watch
        self.watched: dict[int, Tensor] = {}  # first outputs, which may be overwritten yet

    def call(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index = self.next_index
        self.next_index += 1
        output = run_call(name, func, args, kwargs)
        given = tensors_in((args, kwargs))
        follow = _FOLLOW.get(name)
        made: Any = None
        # Row numbers are real numbers, whatever the model runs on.
        with _disable_current_modes():
            if index in self.factors:
                ids = self.of(given[0])
                if ids is None:
                    self.missing.append(index)
                else:
                    self.exits.append((index, _distinct(ids)))
                for tensor in given[1:]:
                    self.leave(tensor)
            elif follow is not None and any(self.known(t) for t in given):
                made = follow(self, _Running(name, func, args, kwargs, output))
            if made is None and index not in self.factors:
                for tensor in given:
                    self.leave(tensor)
            self._give(output, made)
        results = results_of(name, args, output) if index in self.watch else []
        if results:
            self.watched[index] = results[0]
        return output

    def known(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and (id(tensor) in self.ids or id(tensor) in self.entries)

    def of(self, tensor: Any) -> Tensor | None:
        """Row numbers of a value; those of a vector parameter are its own indices."""
        if not isinstance(tensor, Tensor):
            return None
        ids = self.ids.get(id(tensor))
        return self.along(tensor, 0) if ids is None and tensor.dim() == 1 else ids

    def along(self, parameter: Any, dim: int) -> Tensor | None:
        """Row numbers of one dim of a parameter; None for a tensor that is none."""
        entry = self.entries.get(id(parameter))
        if entry is None:
            return None
        n = parameter.shape[dim]
        start = self.rows.add(entry, 1 - dim if id(parameter) in self.turned else dim, n)
        return torch.arange(start, start + n, device="cpu")

    def stand_for(self, tensor: Tensor, parameter: Tensor, *, turned: bool = False) -> Any:
        """``tensor`` is the parameter in another dtype, or transposed: layers will find its rows.

        What it is made by has no other row numbers to give.
        """
        self.entries[id(tensor)] = self.entries[id(parameter)]
        change = set.add if turned != (id(parameter) in self.turned) else set.discard
        change(self.turned, id(tensor))
        self.alive.append(tensor)
        return ()

    def leave(self, tensor: Tensor) -> None:
        """A value is used in a way that scaling would change: its rows must stay as they are."""
        ids = self.ids.get(id(tensor))
        if ids is not None:
            self.exits.append((None, _distinct(ids)))
            return
        for dim in range(tensor.dim()):
            rows = self.along(tensor, dim)
            if rows is not None:
                self.exits.append((None, rows.numpy()))

    def _give(self, output: Any, made: Any) -> None:
        results = tensors_in(output)
        for tensor in results:
            self.ids.pop(id(tensor), None)
        if made is None:
            return
        parts = tensors_in(made)
        if len(parts) != len(results):
            return
        for tensor, ids in zip(results, parts, strict=True):
            self.alive.append(tensor)
            self.ids[id(tensor)] = ids.expand(tensor.shape)

    def pass_over(self, call: int) -> None:
        """Look no more at what one call asks for."""
        self.missing = [index for index in self.missing if index != call]
        self.exits = [(index, rows) for index, rows in self.exits if index != call]

    def row_factors(self) -> tuple[np.ndarray, int | None]:
        """Float64 (rows,) of what rows are multiplied by, NaN for 1; a call that nothing fits."""
        class_of = self.rows.classes()
        factor_of = np.full(len(class_of), np.nan)
        source = np.full(len(class_of), -1)
        if self.missing:
            return factor_of, self.missing[0]
        for index, rows in self.exits:
            if index is None:
                continue
            found = class_of[rows[rows >= 0]]
            taken = ~np.isnan(factor_of[found])
            if (rows < 0).any() or (factor_of[found][taken] != self.factors[index]).any():
                return factor_of[class_of], index
            factor_of[found], source[found] = self.factors[index], index
        for index, rows in self.exits:
            found = class_of[rows[rows >= 0]]
            if index is None and (source[found] >= 0).any():
                return factor_of[class_of], int(source[found].max())
        return factor_of[class_of], None

    def rescalings(self) -> tuple[list[Rescaling], int | None]:
        """What to multiply, and a call for which nothing fits."""
        factor_of, refused = self.row_factors()
        if refused is not None:
            return [], refused
        rescalings: list[Rescaling] = []
        ends = [*list(self.rows.starts.values())[1:], self.rows.count]
        for ((entry, dim), start), end in zip(self.rows.starts.items(), ends, strict=True):
            factors = factor_of[start:end]
            for factor in np.unique(factors[~np.isnan(factors)]).tolist():
                indices = torch.from_numpy(np.flatnonzero(factors == factor))
                rescalings.append(Rescaling(entry, dim, indices, factor))
        return rescalings, None


# -- how row numbers travel ----------------------------------------------------------------------

Follow = Callable[[_RowMode, _Running], Any]
_FOLLOW: dict[str, Follow] = {}


_on = entering(_FOLLOW)


def _produced(
    mode: _RowMode, weight: Any, dim: int, bias: Any, shape: torch.Size, at: int
) -> Tensor | None:
    """Row numbers of a layer's output, of which dim ``at`` is dim ``dim`` of its weight."""
    ids = mode.along(weight, dim)
    if ids is None:
        return None
    if isinstance(bias, Tensor):
        added = mode.of(bias)
        if added is None:
            return None
        mode.rows.unite(ids, added)
    view = [1] * len(shape)
    view[at] = -1
    return ids.view(view).expand(shape)


@_on("linear")
def _linear(mode: _RowMode, call: _Running) -> Any:
    mode.leave(call.given(0))
    weight, bias = call.given(1, "weight"), call.given(2, "bias")
    return _produced(mode, weight, 0, bias, call.output.shape, -1)


@_on("conv1d", "conv2d", "conv3d")
def _convolution(mode: _RowMode, call: _Running) -> Any:
    mode.leave(call.given(0))
    weight, bias = call.given(1, "weight"), call.given(2, "bias")
    return _produced(mode, weight, 0, bias, call.output.shape, call.output.dim() - weight.dim() + 1)


@_on("addmm")
def _addmm(mode: _RowMode, call: _Running) -> Any:
    mode.leave(call.given(1, "mat1"))
    weight, bias = call.given(2, "mat2"), call.given(0)
    return _produced(mode, weight, 1, bias, call.output.shape, -1)


@_on("layer_norm", "rms_norm")
def _norm(mode: _RowMode, call: _Running) -> Any:
    mode.leave(call.given(0))
    weight = call.given(2, "weight")
    # The fourth argument of an RMS norm is its epsilon.
    bias = call.given(3, "bias")
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    return _produced(mode, weight, 0, bias, call.output.shape, -1)


@_on("batch_norm")
def _batch_norm(mode: _RowMode, call: _Running) -> Any:
    mode.leave(call.given(0))
    # torch.batch_norm has the weight in front of the running mean, which is not scaled.
    first = 1 if call.func is torch.batch_norm else 3
    weight = call.given(first, "weight")
    if not isinstance(weight, Tensor):
        return None
    return _produced(mode, weight, 0, call.given(first + 1, "bias"), call.output.shape, 1)


_TURNS = frozenset(["t", "transpose", "swapaxes", "permute", "movedim", "__get__.T", "__get__.mT"])
"""Calls that may transpose a matrix."""


@_on(
    *("view", "reshape", "permute", "transpose", "swapaxes", "t", "movedim", "unflatten"),
    *("flatten", "squeeze", "unsqueeze", "expand", "repeat", "repeat_interleave", "unbind"),
    *("select", "narrow", "split", "split_with_sizes", "chunk", "roll", "flip", "__getitem__"),
    *("cat", "stack", "tensor_split", "__get__.T", "__get__.mT"),
)
def _moved(mode: _RowMode, call: _Running) -> Any:
    """The same movement of row numbers; what has none next to what has is -1."""
    whole = call.given(0)
    if id(whole) in mode.entries and whole.dim() == 2 and call.name in _TURNS:
        like = torch.empty(2, 3, device="cpu")
        given = substitute((call.args, call.kwargs), lambda _: like)
        turned = call.func(*given[0], **given[1]).shape[0] == 3
        return mode.stand_for(call.output, whole, turned=turned)
    # Row numbers are stretched tensors, which a view may refuse.
    move = Tensor.reshape if call.name == "view" else call.func

    def ids_of(tensor: Tensor) -> Tensor:
        ids = mode.of(tensor)
        return torch.full((), -1, device="cpu").expand(tensor.shape) if ids is None else ids

    # A tensor that serves as an index: a stand-in does not know its values.
    if isinstance(call.given(0), Tensor) and tensors_in(call.args[1:]):
        return None
    return move(*substitute(call.args, ids_of), **substitute(call.kwargs, ids_of))


@_on(
    *("to", "float", "half", "bfloat16", "double", "type_as", "contiguous", "clone", "detach"),
    *("dropout", "alias", "neg", "__neg__", "positive", "cuda", "cpu", "type"),
)
def _same(mode: _RowMode, call: _Running) -> Any:
    value = call.given(0)
    if id(value) not in mode.entries or value.dim() == 1:
        return mode.of(value)
    return mode.stand_for(call.output, value)


@_on(
    *("mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply", "div", "div_", "true_divide"),
    *("__truediv__", "__itruediv__", "divide"),
)
def _product(mode: _RowMode, call: _Running) -> Any:
    """Linear in the one factor that has rows; a vector parameter counts where no other does."""
    factors = tensors_in((call.args, call.kwargs))
    tracked = [t for t in factors if id(t) in mode.ids]
    leaves = [t for t in factors if id(t) in mode.entries and t.dim() == 1]
    quotient = "div" in call.name
    if leaves and not quotient:
        for tensor in tracked:
            mode.leave(tensor)
        tracked = leaves
    if len(tracked) != 1 or (quotient and tracked[0] is not call.given(0)):
        return None
    ids = mode.of(tracked[0])
    return None if ids is None else ids.expand(call.output.shape)


@_on("add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__isub__")
def _sum(mode: _RowMode, call: _Running) -> Any:
    left, right = mode.of(call.given(0)), mode.of(call.given(1, "other"))
    if left is None or right is None:
        return None
    mode.rows.unite(left, right)
    return left.expand(call.output.shape)


@_on("matmul", "__matmul__", "bmm", "mm")
def _matrix_product(mode: _RowMode, call: _Running) -> Any:
    """Linear in the rows of the left factor, or in the columns of a right one."""
    left = call.given(0)
    right = call.given(1, "other" if "matmul" in call.name else "mat2")
    if id(right) in mode.entries and right.dim() == 2:
        mode.leave(left)
        return _produced(mode, right, 1, None, call.output.shape, -1)
    for tensor, at in ((left, -1), (right, -2)):
        ids = mode.ids.get(id(tensor))
        if ids is None or ids.dim() < 2:
            continue
        if tensor is left:
            mode.leave(right)
        first = ids.narrow(at, 0, 1)
        mode.rows.unite(first, ids)
        return first.expand(call.output.shape)
    return None

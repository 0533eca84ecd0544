"""What a pruned network must compute: the original with the removed channels zeroed.

Where a layer takes a statistic over removed channels, zeroing them is not removing them: there the
original is run with that one call restricted to the channels that stay. Everything else runs at its
full width on zeroed weights, so a channel that is still read somewhere shows up as a difference.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.coverage.float64 import Float64Mode, plain, run_in_float64
from chanprune_ext.analysis.calls import CallMode, tensors_in
from chanprune_ext.analysis.stand_ins import substitute
from chanprune_ext.analysis.tracer import NORMALISED
from chanprune_ext.verification import zero_slices

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chanprune_ext.analysis import Analysis
    from chanprune_ext.analysis.module_path import ModulePath
    from chanprune_ext.analysis.trace import TracedCall
    from chanprune_ext.analysis.tracer import Slots

__all__ = [
    "OracleError",
    "reference_outputs",
    "relative_error",
]

# Calls that keep their shape and look at all of some dimension.
_NORMS = frozenset(
    [
        *("layer_norm", "group_norm", "rms_norm", "instance_norm", "batch_norm"),
        *("softmax", "log_softmax", "native_layer_norm", "native_group_norm"),
    ]
)
# Calls that make a dimension vanish.
_REDUCTIONS = frozenset(
    [
        *("mean", "nanmean", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm"),
        *("linalg_norm", "sum", "nansum", "logsumexp", "amax", "amin", "aminmax", "max", "min"),
        *("prod", "median", "cosine_similarity", "einsum"),
    ]
)
_ATTENTION = "scaled_dot_product_attention"
# The dimension of the first tensor that a product sums over: what is zeroed at the factors of a
# product of activations need not be zero in them.
_CONTRACTED = {
    **dict.fromkeys(["matmul", "__matmul__", "mm", "bmm", "dot", "mv", "linear", _ATTENTION], -1),
    **dict.fromkeys(["conv1d", "conv2d", "conv3d"], 1),
}
_RESTRICTED = frozenset([*_NORMS, *_REDUCTIONS, *_CONTRACTED])
_WITH_SHAPE = frozenset(["layer_norm", "rms_norm", "native_layer_norm"])


class OracleError(Exception):
    """The reference cannot be computed: nothing is known about the pruned network."""


class _Recorded(Float64Mode):
    """Notes name and module of every call."""

    def __init__(self, path: ModulePath) -> None:
        super().__init__()
        self.path = path
        self.calls: list[tuple[str, str]] = []

    def call(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.calls.append((name, self.path.current))
        return super().call(name, func, args, kwargs)


class _Restricted(Float64Mode):
    """Gives the calls that take statistics over removed channels the kept ones only.

    Args:
        analysis: Knows the labels of every traced call.
        removed: Bool (labels,).
        traced: For every call that will come, the one it was when traced, or None.
        rescale: See :func:`reference_outputs`.
    """

    def __init__(
        self,
        analysis: Analysis,
        removed: np.ndarray,
        traced: Sequence[TracedCall | None],
        *,
        rescale: bool,
    ) -> None:
        super().__init__()
        self.analysis = analysis
        self.traced = traced
        self.rescale = rescale
        self.removed = removed
        roots = np.flatnonzero(removed)
        flagged = (analysis.trace.store.flags(roots) & NORMALISED) != 0
        self.flagged = np.zeros_like(removed)
        self.flagged[roots[flagged]] = True

    def call(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.next_index >= len(self.traced):
            raise OracleError(f"the model makes more calls than a moment ago: {name}")
        traced = self.traced[self.next_index]
        if traced is None:
            return super().call(name, func, args, kwargs)
        if traced.name != name:
            raise OracleError(f"the model calls {name}, a moment ago it called {traced.name}")
        removed = self.flagged
        if self.rescale and name == _ATTENTION and kwargs.get("scale") is None:
            removed = self.removed
        if name not in _RESTRICTED or _grouped(name, args, kwargs):
            return super().call(name, func, args, kwargs)
        inputs = [[self._kept(s, removed) for s in dims] for dims in traced.inputs]
        if not self._looks_at_removed(name, traced, inputs, removed):
            return super().call(name, func, args, kwargs)
        if name == _ATTENTION and kwargs.get("scale") is None and not self.rescale:
            query = args[0] if args else kwargs["query"]
            kwargs = {**kwargs, "scale": query.shape[-1] ** -0.5}
        feed = iter(inputs)
        args, kwargs = substitute((args, kwargs), lambda t: _selected(t, next(feed)))
        args, kwargs = _resized(name, args, kwargs, inputs)
        output = super().call(name, func, args, kwargs)
        masks = iter([[self._kept(s, removed) for s in dims] for dims in traced.outputs])
        return _mapped(output, lambda t: _scattered(t, next(masks)))

    def _kept(self, slots: Slots, removed: np.ndarray) -> np.ndarray | None:
        """Which indices stay; None for all."""
        mask = self.analysis.kept_mask(slots, removed)
        return None if mask.all() else mask

    def _looks_at_removed(
        self,
        name: str,
        traced: TracedCall,
        inputs: list[list[np.ndarray | None]],
        removed: np.ndarray,
    ) -> bool:
        if name in _NORMS:
            return any(mask is not None for mask in (inputs[0] if inputs else ()))
        if name in _CONTRACTED:
            return self._kept(traced.inputs[0][_CONTRACTED[name]], removed) is not None
        resolve = self.analysis.trace.store.resolve
        carried = [resolve(s) for dims in traced.outputs for s in dims if len(s)]
        return any(
            mask is not None and not any(np.array_equal(resolve(slots), c) for c in carried)
            for dims, masks in zip(traced.inputs, inputs, strict=True)
            for slots, mask in zip(dims, masks, strict=True)
        )


def _grouped(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this is a convolution whose channels do not all meet."""
    return name.startswith("conv") and (args[6] if len(args) > 6 else kwargs.get("groups", 1)) != 1


def _selected(tensor: Tensor, masks: list[np.ndarray | None]) -> Tensor:
    for dim, mask in enumerate(masks):
        if mask is not None:
            tensor = tensor.index_select(dim, torch.from_numpy(np.flatnonzero(mask)))
    return tensor


def _scattered(tensor: Tensor, masks: list[np.ndarray | None]) -> Tensor:
    for dim, mask in enumerate(masks):
        if mask is not None:
            shape = list(tensor.shape)
            shape[dim] = len(mask)
            index = torch.from_numpy(np.flatnonzero(mask))
            tensor = tensor.new_zeros(shape).index_copy(dim, index, tensor)
    return tensor


def _mapped(output: Any, change: Any) -> Any:
    """``change`` on every tensor of a call's output, which may be a tuple with names."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, (tuple, list)):
        items = [_mapped(v, change) for v in output]
        named = type(output).__module__ == "torch.return_types"
        return type(output)(items) if named or isinstance(output, list) else tuple(items)
    return output


def _resized(
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    inputs: list[list[np.ndarray | None]],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Size arguments of a norm for its restricted input."""
    if name in _WITH_SHAPE:
        given = args[1] if len(args) > 1 else kwargs["normalized_shape"]
        shape = list(args[0].shape[args[0].dim() - len(given) :])
        if len(args) > 1:
            return (args[0], shape, *args[2:]), kwargs
        return args, {**kwargs, "normalized_shape": shape}
    if name == "group_norm":
        given = args[1] if len(args) > 1 else kwargs["num_groups"]
        mask = inputs[0][1]
        groups = given if mask is None else int(mask.reshape(given, -1).any(axis=1).sum())
        if len(args) > 1:
            return (args[0], groups, *args[2:]), kwargs
        return args, {**kwargs, "num_groups": groups}
    return args, kwargs


def _aligned(
    model: nn.Module, inputs: Any, analysis: Analysis, seed: int
) -> list[TracedCall | None]:
    """For every call of a run, the traced one it is.

    A trace on stand-in tensors may differ from a run on values where a model looks at them (at
    a mask, say): such calls belong to no traced one.
    """
    records: list[_Recorded] = []

    def recording(path: ModulePath) -> CallMode:
        records.append(_Recorded(path))
        return records[0]

    run_in_float64(model, inputs, recording, seed)
    found = records[0].calls
    calls = analysis.trace.calls
    names = [(call.name, call.module) for call in calls]
    if found == names:
        return list(calls)
    result: list[TracedCall | None] = [None] * len(found)
    matcher = difflib.SequenceMatcher(None, names, found, autojunk=False)
    for start, position, length in matcher.get_matching_blocks():
        result[position : position + length] = calls[start : start + length]
    return result


def reference_outputs(
    model: nn.Module,
    inputs: Any,
    pruned: Mapping[str, Mapping[int, Tensor]],
    analysis: Analysis | None = None,
    removed: np.ndarray | None = None,
    *,
    rescale: bool = False,
    seed: int = 0,
) -> list[Tensor]:
    """What the pruned network must return.

    Args:
        model: The original; turned to float64 and zeroed in place.
        inputs: A batch.
        pruned: Parameter name -> {dim: removed indices}.
        analysis: With ``removed``, restrict the calls that take statistics over removed channels.
        removed: Bool (labels,), from :func:`removed_labels`.
        rescale: Let the default scale of attention follow the size of the pruned heads.
        seed: For models that draw numbers in eval mode.

    Raises:
        OracleError: The model's calls are not those that were traced.
    """
    model.double()
    zero_slices(model, pruned)
    if analysis is None or removed is None:
        return tensors_in(run_in_float64(model, inputs, plain, seed))
    traced = _aligned(model, inputs, analysis, seed)
    restricted = _Restricted(analysis, removed, traced, rescale=rescale)
    return tensors_in(run_in_float64(model, inputs, lambda _: restricted, seed))


def relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference over the largest value, the worst of all outputs; inf if not comparable.

    Raises:
        OracleError: The reference itself is not finite, or there is none.
    """
    if not expected:
        raise OracleError("the model returns no tensor")
    if len(actual) != len(expected):
        return float("inf")
    worst = 0.0
    for a, b in zip(actual, expected, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if not b.numel():
            continue
        a, b = a.double(), b.double()
        finite = torch.isfinite(b)
        if not torch.equal(finite, torch.isfinite(a)) or not torch.equal(a[~finite], b[~finite]):
            if bool(torch.isnan(b).any()):
                raise OracleError("the reference itself is not finite")
            return float("inf")
        a, b = a[finite], b[finite]
        if b.numel():
            worst = max(worst, float((a - b).abs().max()) / max(float(b.abs().max()), 1e-12))
    return worst

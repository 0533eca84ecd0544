"""Which channels of an original block's output the pruned block's output still has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..analysis.calls import tensors_in

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence, Set

    from ..analysis.call_trace import Call, CallTrace
    from .blocks import Block

__all__ = ["Matching", "UnmatchedError", "match_outputs"]

# Calls whose outputs have the channels of their inputs.
_CHANNELWISE = frozenset(
    {
        *("relu", "relu6", "hardtanh", "leaky_relu", "elu", "silu", "gelu", "hardswish", "sigmoid"),
        *("tanh", "hardsigmoid", "mish", "softplus", "prelu", "clamp", "add", "iadd", "sub", "mul"),
        *("__add__", "__iadd__", "__sub__", "__mul__", "dropout", "contiguous", "clone"),
        *("batch_norm", "layer_norm", "group_norm", "rms_norm", "instance_norm"),
        *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "max_pool1d", "avg_pool1d"),
        *("interpolate", "upsample_nearest2d"),
    }
)
# What these return is not multiplied where their inputs are: a plan has made sure of that.
_UNSCALED = frozenset(
    {
        *("linear", "addmm", "conv1d", "conv2d", "conv3d", "softmax", "log_softmax"),
        *("scaled_dot_product_attention", "batch_norm", "layer_norm", "group_norm", "rms_norm"),
    }
)


class UnmatchedError(Exception):
    """The outputs of the two networks cannot be compared; the message says why."""


class Matching:
    """Selects, of what the original's block returns, what the pruned one returns too.

    Args:
        choices: For every floating-point tensor: None to take it as it is, else an axis and the
            kept indices.
    """

    def __init__(self, choices: Sequence[tuple[int, Tensor] | None]) -> None:
        self._choices = choices

    def __call__(self, target: Any) -> list[Tensor]:
        """The tensors that the pruned block's outputs should equal."""
        return [
            tensor if choice is None else tensor.index_select(choice[0], choice[1])
            for tensor, choice in zip(floating(target), self._choices, strict=True)
        ]


def floating(value: Any) -> list[Tensor]:
    """The floating-point tensors inside a value, in order."""
    return [t for t in tensors_in(value) if t.is_floating_point()]


def match_outputs(
    block: Block,
    original: Any,
    pruned: Any,
    trace: CallTrace,
    kept: Mapping[str, Mapping[int, Tensor]],
    rescaled: Set[str],
    shapes: Mapping[str, Sequence[int]],
) -> Matching:
    """Finds out how two outputs of a block correspond.

    Args:
        block: The block.
        original: What it returns in the original network.
        pruned: What it returns in the pruned one.
        trace: Calls of the original.
        kept: Entry -> dim -> kept indices.
        rescaled: Entries of which the plan has multiplied something.
        shapes: Entry -> its shape in the original.

    Raises:
        UnmatchedError: channels were removed, and which ones can't be told, or its output may be
            multiplied.
    """
    if rescaled and _returns_rescaled(block, trace, rescaled):
        raise UnmatchedError("a scale that follows a pruned width is folded into its output")
    ours, theirs = floating(pruned), floating(original)
    if not theirs or len(ours) != len(theirs):
        raise UnmatchedError(f"it returns {len(theirs)} floating-point tensors, pruned {len(ours)}")
    choices: list[tuple[int, Tensor] | None] = []
    for a, b in zip(theirs, ours, strict=True):
        axes = [i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=False)) if m != n]
        if a.dim() != b.dim() or len(axes) > 1 or (axes and len(theirs) > 1):
            raise UnmatchedError(
                f"its outputs are {[list(t.shape) for t in theirs]}, pruned "
                f"{[list(t.shape) for t in ours]}"
            )
        if not axes:
            choices.append(None)
            continue
        search = _Search(trace, kept, shapes, a.shape[axes[0]], b.shape[axes[0]])
        indices = search.around(block)
        if indices is None:
            raise UnmatchedError("which channels of its output were removed can't be told")
        choices.append((axes[0], indices.to(a.device)))
    return Matching(choices)


def _returns_rescaled(block: Block, trace: CallTrace, rescaled: Set[str]) -> bool:
    """Whether a value that leaves the block may come from weights that the plan has multiplied.

    The factor is gone once the value has met the constant that it makes up for, which is a product
    that looks like any other: what comes out of one counts as multiplied still.
    """
    consumers, producer = trace.consumers(), trace.producer()
    left = [
        value
        for call in trace.calls
        if block.holds(call.module)
        for value in call.outputs
        if value in trace.output_values
        or any(not block.holds(trace.calls[i].module) for i in consumers.get(value, []))
    ]
    seen = set(left)
    while left:
        index = producer.get(left.pop())
        if index is None:
            continue
        call = trace.calls[index]
        if not rescaled.isdisjoint(call.parameters.values()):
            return True
        if call.name not in _UNSCALED:
            left += [value for value in call.inputs if value not in seen]
            seen.update(call.inputs)
    return False


class _Search:
    """Looks for the layer that makes or reads the channels of a value."""

    def __init__(
        self,
        trace: CallTrace,
        kept: Mapping[str, Mapping[int, Tensor]],
        shapes: Mapping[str, Sequence[int]],
        before: int,
        after: int,
    ) -> None:
        self._trace = trace
        self._kept = kept
        self._shapes = shapes
        self._sizes = before, after
        self._producer = trace.producer()
        self._consumers = trace.consumers()

    def around(self, block: Block) -> Tensor | None:
        """The kept indices of the block's output."""
        inside = [call for call in self._trace.calls if block.holds(call.module)]
        if not inside or not inside[-1].outputs:
            return None
        value = inside[-1].outputs[0]
        made = self._walked(value, 0, self._made_from)
        return self._walked(value, 1, self._read_by) if made is None else made

    def _made_from(self, value: int) -> list[Call]:
        index = self._producer.get(value)
        return [] if index is None else [self._trace.calls[index]]

    def _read_by(self, value: int) -> list[Call]:
        return [self._trace.calls[i] for i in self._consumers.get(value, [])]

    def _walked(
        self, value: int, dim: int, neighbours: Callable[[int], list[Call]]
    ) -> Tensor | None:
        seen, front = {value}, [value]
        while front:
            for call in neighbours(front.pop(0)):
                found = self._of(call, dim)
                if found is not None:
                    return found
                if call.name.rstrip("_") in _CHANNELWISE or call.name in _CHANNELWISE:
                    values = [v for v in (call.outputs if dim else call.inputs) if v not in seen]
                    seen.update(values)
                    front += values
        return None

    def _of(self, call: Call, dim: int) -> Tensor | None:
        for entry in call.parameters.values():
            indices = self._kept.get(entry, {}).get(dim)
            # What goes along with channels on their way, such as a norm's weight, has them too.
            if dim == 1 and len(self._shapes[entry]) == 1:
                indices = self._kept.get(entry, {}).get(0)
            if indices is None:
                continue
            size = self._shapes[entry][min(dim, len(self._shapes[entry]) - 1)]
            if (size, len(indices)) == self._sizes:
                return torch.as_tensor(indices, device="cpu")
        return None

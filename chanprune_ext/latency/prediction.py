"""What a network would take at other widths, from measured times of its layers.

The operations that multiply matrices are timed one by one at the widths a plan asks for; all else
is one number, the rest of the network's measured time, and shrinks with the elements it writes.
The sum is a prediction: it says how the time moves with the widths, layer by layer, and whoever
needs the time itself measures the network (:mod:`chanprune_ext.measured_budget`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from chanprune_ext.analysis.calls import CallMode, run_model, steady_calls

from .layer_times import GROUPS_POSITION, LatencyTable, TimedCall

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from chanprune_ext.analysis import Analysis
    from chanprune_ext.analysis.groups import Sizes
    from chanprune_ext.analysis.trace import TracedCall

__all__ = ["LatencyModel"]

_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
_TIMED = frozenset(
    {
        *_CONVOLUTIONS,
        *_TRANSPOSED,
        "linear",
        "addmm",
        "baddbmm",
        "bmm",
        "matmul",
        "__matmul__",
        "mm",
        "scaled_dot_product_attention",
    }
)
# These write nothing, or what they write is not worth a term of its own.
_FREE = frozenset(
    {
        "__getitem__",
        "_assert",
        "chunk",
        "detach",
        "dropout",
        "expand",
        "flatten",
        "narrow",
        "permute",
        "reshape",
        "select",
        "split",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unflatten",
        "unsqueeze",
        "view",
    }
)
_FINEST = 8  # widths are timed at multiples of this
_CELLS = 16  # and at no more than this many of one layer


class _Recorder(CallMode):
    """Keeps the calls that are timed, by position, and the names of all."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.timed: dict[int, TimedCall] = {}

    def run(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in _TIMED:
            self.timed[len(self.names)] = TimedCall.recorded(name, func, args, kwargs)
        self.names.append(name)
        return func(*args, **kwargs)


class LatencyModel:
    """Predicted milliseconds of a model under a removal.

    Args:
        analysis: Groups and calls of the model.
        model: The model, with weights, where it is to run.
        example_inputs: As for :func:`chanprune_ext.plan`.
        table: Times of single layers.
        whole_ms: Measured time of the whole model.
    """

    def __init__(
        self,
        analysis: Analysis,
        model: nn.Module,
        example_inputs: Any,
        table: LatencyTable,
        whole_ms: float,
    ) -> None:
        with steady_calls(model), _Recorder() as recorder:
            run_model(model, example_inputs)
        self.table = table
        self.whole_ms = whole_ms
        self._sizes_whole = analysis.sizes(analysis.removed_labels({}))
        calls = analysis.trace.calls
        # A forward that goes another way on real values has no calls to compare: its time then
        # moves with what it writes alone.
        same = recorder.names == [call.name for call in calls]
        timed = recorder.timed if same else {}
        self._layers = [(timed[i], calls[i]) for i in sorted(timed)]
        skipped = {id(call) for _, call in self._layers}
        self._others = [c for c in calls if id(c) not in skipped and c.name not in _FREE]
        layers_ms = sum(self._layer(*layer, self._sizes_whole) for layer in self._layers)
        # Layers timed alone have their operands in the cache and may add up to more than the whole.
        self._rest_ms = max(whole_ms - layers_ms, 0.0)
        self._elements_whole = max(self._elements(self._sizes_whole), 1)

    def milliseconds(self, sizes: Sizes) -> float:
        """Predicted time at the given sizes."""
        rest = self._rest_ms * self._elements(sizes) / self._elements_whole
        return rest + sum(self._layer(call, traced, sizes) for call, traced in self._layers)

    @property
    def unpruned_ms(self) -> float:
        """Predicted time with nothing removed."""
        return self.milliseconds(self._sizes_whole)

    def _elements(self, sizes: Sizes) -> int:
        return sum(
            math.prod(sizes.of(slots) for slots in dims)
            for call in self._others
            for dims in call.outputs
        )

    def _layer(self, call: TimedCall, traced: TracedCall, sizes: Sizes) -> float:
        """Time of one layer: that of the nearest measured widths, scaled by the work."""
        shapes = [[sizes.of(slots) for slots in dims] for dims in traced.inputs]
        before = [list(tensor.shape) for tensor in call.tensors()]
        groups = _groups(call, shapes, before)
        near = _near(shapes, before, groups)
        milliseconds = self.table.milliseconds(
            call.reshaped(near, groups and _scaled(groups, near))
        )
        return milliseconds * _work(shapes) / _work(near)


def _groups(
    call: TimedCall, shapes: Sequence[Sequence[int]], before: Sequence[Sequence[int]]
) -> int | None:
    """Groups of a convolution at new sizes; None for what has none."""
    if call.name in _CONVOLUTIONS:
        return shapes[0][_channel_axis(shapes)] // shapes[1][1]
    if call.name in _TRANSPOSED:
        given = call.kwargs.get("groups", 1)
        if len(call.args) > GROUPS_POSITION:
            given = call.args[GROUPS_POSITION]
        return shapes[1][0] if given == before[1][0] else int(given)
    return None


def _channel_axis(shapes: Sequence[Sequence[int]]) -> int:
    """Of a convolution's input: it comes first where there is no axis of samples."""
    return len(shapes[0]) - len(shapes[1]) + 1


def _scaled(groups: int, near: Sequence[Sequence[int]]) -> int:
    """Groups at the measured widths: one for each channel stays one for each channel."""
    depthwise = groups > 1 and near[1][1] == 1
    return near[0][_channel_axis(near)] if depthwise else groups


def _near(
    shapes: Sequence[Sequence[int]], before: Sequence[Sequence[int]], groups: int | None
) -> list[list[int]]:
    """Shapes nearby that are measured: a changed size becomes a multiple of the layer's step."""
    if groups is not None and groups > 1:
        depthwise = shapes[1][1] == 1 and shapes[1][0] == shapes[0][_channel_axis(shapes)]
        if not depthwise:
            return [list(shape) for shape in shapes]  # rounding would have to keep groups equal
    return [
        [_rounded(n, whole) for n, whole in zip(shape, old, strict=True)]
        for shape, old in zip(shapes, before, strict=True)
    ]


def _rounded(n: int, whole: int) -> int:
    step = max(_FINEST, 2 ** int(math.log2(max(whole, 1) / _CELLS))) if whole >= _CELLS else 1
    if n == whole:
        return n
    return min(max(step, round(n / step) * step), whole)


def _work(shapes: Sequence[Sequence[int]]) -> float:
    """What the time of a layer is proportional to between two neighbouring widths."""
    of = 1 if len(shapes) > 1 else 0  # the weight, or the second factor
    return float(max(math.prod(shapes[of]), 1))

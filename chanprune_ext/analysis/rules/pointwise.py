"""Element-wise operations: dimensions of equal size are removed together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanprune_ext.analysis.calls import schema_name, tensors_in
from chanprune_ext.analysis.rules.registry import rule
from chanprune_ext.analysis.tracer import ADDED

if TYPE_CHECKING:
    from torch import Tensor

    from chanprune_ext.analysis.tracer import Origin, Slots, Tracer


def broadcast_dims(tracer: Tracer, inputs: list[Tensor], shape: tuple[int, ...]) -> list[Slots]:
    """Unify inputs as broadcasting aligns them; the slots of the broadcast result."""
    rank = len(shape)
    dims: list[Slots] = []
    for d, size in enumerate(shape):
        result: Slots | None = None
        for tensor in inputs:
            k = d - (rank - tensor.dim())
            if k < 0:
                continue
            slots = tracer.dims(tensor)[k]
            if tensor.shape[k] != size:
                tracer.freeze(slots, "one channel is broadcast against many")
                continue
            if result is None:
                result = slots
            else:
                tracer.unify(result, slots)
                if len(slots) and not len(result):
                    result = slots
        dims.append(tracer.fresh(size) if result is None else result)
    return dims


_SUMS = frozenset({"aten::add", "aten::add_", "aten::sub", "aten::sub_"})
_RECURRENT = frozenset(
    f"{layer}{end}" for layer in ("lstm", "gru", "rnn_tanh", "rnn_relu") for end in ("", "_cell")
)

# Element-wise operations that torch does not tag as such, each with its in-place form.
_UNTAGGED = (
    *(
        "hardswish",
        "hardsigmoid",
        "mish",
        "threshold",
        "prelu",
        "log_sigmoid_forward",
        "softshrink",
    ),
    *("rrelu", "rrelu_with_noise", "celu", "selu", "hardshrink", "copy", "where", "clone", "fill"),
    *("zero", "masked_fill", "nan_to_num", "lerp", "bernoulli", "native_dropout", "isnan", "isinf"),
    *("alias", "detach", "lift", "lift_fresh", "lift_fresh_copy", "_to_copy", "contiguous"),
    "_prelu_kernel",
)


@rule("pointwise", *(f"aten::{n}{end}" for n in _UNTAGGED for end in ("", "_")))
def pointwise(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    inputs = tensors_in((args, kwargs) if kwargs else args)
    if schema_name(func) in _SUMS and _join_paths(tracer, inputs):
        for slots in tracer.dims(inputs[0]):
            tracer.flag(slots, ADDED)
    for out in tensors_in(output):
        dims = broadcast_dims(tracer, inputs, tuple(out.shape))
        tracer.set(out, dims, _common_origin(tracer, inputs, out))


def _join_paths(tracer: Tracer, inputs: list[Tensor]) -> bool:
    """Whether two activations of one shape meet, as at the end of a residual block.

    A sum within an activation function (``x + x**3``) joins nothing: its channels are the same.
    Nor does one of gates, of the input and of the state, within a recurrent layer.
    """
    if tracer.call_name in _RECURRENT:
        return False
    if len(inputs) != 2 or inputs[0].shape != inputs[1].shape:
        return False
    if any(tracer.of_parameters(t) for t in inputs):
        return False
    left, right = (tracer.dims(t) for t in inputs)
    return not all(map(tracer.same_channels, left, right))


def _common_origin(tracer: Tracer, inputs: list[Tensor], out: Tensor) -> Origin | None:
    """What is computed from parameters alone (a scaled kernel, say) stands for the one it fills."""
    origins = [(tracer.origin(t), t.shape) for t in inputs if t.dim()]
    if any(origin is None for origin, _ in origins):
        return None
    return next((origin for origin, shape in origins if shape == out.shape), None)

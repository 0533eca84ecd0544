"""Element-wise operations: dimensions of equal size are removed together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.analysis.rules.registry import rule

if TYPE_CHECKING:
    from torch import Tensor

    from chanprune_ext.analysis.trace import Slots, Tracer


def broadcast_dims(tracer: Tracer, inputs: list[Tensor], shape: tuple[int, ...]) -> list[Slots]:
    """Unify inputs as broadcasting aligns them; the slots of the broadcast result."""
    rank = len(shape)
    dims: list[Slots] = []
    for d, size in enumerate(shape):
        result: Slots | None = None
        for tensor in inputs:
            k = d - (rank - tensor.dim())
            if k < 0 or tensor.shape[k] != size:
                continue  # missing or broadcast from size 1: no coupling
            slots = tracer.dims(tensor)[k]
            if result is None:
                result = slots
            else:
                tracer.unify(result, slots)
                if len(slots) and not len(result):
                    result = slots
        dims.append(tracer.fresh(size) if result is None else result)
    return dims


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
    inputs = tensors_in((args, kwargs))
    for out in tensors_in(output):
        dims = broadcast_dims(tracer, inputs, tuple(out.shape))
        same = len(inputs) == 1 and inputs[0].shape == out.shape
        tracer.set(out, dims, tracer.origin(inputs[0]) if same else None)

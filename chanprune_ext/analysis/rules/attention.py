"""Fused attention: heads go together, the width of a head on both sides of its product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.analysis.rules.contraction import contract
from chanprune_ext.analysis.rules.registry import rule
from chanprune_ext.analysis.rules.reshape import merge
from chanprune_ext.analysis.tracer import HEAD_DIM, HEADS, anonymous

if TYPE_CHECKING:
    from chanprune_ext.analysis.tracer import Slots, Tracer


def _repeated(tracer: Tracer, heads: Slots, n: int) -> Slots:
    """The slots of ``n`` query heads that share these key or value heads, neighbours one."""
    if heads.shape[1] == n:
        return heads
    return merge(tracer, (heads, tracer.fresh(n // heads.shape[1])))


@rule(
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_attention_math_for_mps",
)
def attention(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """(.., L, E), (.., S, E), (.., S, V) -> (.., L, V); E is summed over, S goes through softmax.

    The default scale, which follows E, is seen where Python calls it.
    """
    query, key, value = args[:3]
    *batch, length, _ = tracer.dims(query)
    *_, source, _ = tracer.dims(key)
    *_, values, width = tracer.dims(value)
    for slots in (source, values):
        tracer.freeze(slots, "every position attends to all others")
    for d, slots in enumerate(batch):
        for other in (tracer.dims(key)[d], tracer.dims(value)[d]):
            tracer.unify(slots, _repeated(tracer, other, slots.shape[1]))
    batch = [
        slots
        if len(slots)
        else tracer.dims(value)[d]
        if value.shape[d] == slots.shape[1]
        else slots
        for d, slots in enumerate(batch)
    ]
    contract(tracer, (query, query.dim() - 1), (key, key.dim() - 1))
    mask = next((m for m in (*args[3:], kwargs.get("attn_mask")) if isinstance(m, Tensor)), None)
    if mask is not None:
        offset = query.dim() - mask.dim()
        for slots, d in zip([*batch, length, source], range(query.dim()), strict=True):
            own = tracer.dims(mask)[d - offset] if d >= offset else slots
            if own.shape[1] == slots.shape[1]:
                tracer.unify(slots, own)
            else:
                tracer.freeze(own, "one channel is broadcast against many")
    for slots in batch:
        tracer.flag(slots, HEADS)
    for slots in (tracer.dims(query)[-1], width):
        tracer.flag(slots, HEAD_DIM)
    result, *extras = tensors_in(output)
    tracer.set(result, [*batch, length, width])
    for extra in extras:
        tracer.set(extra, [anonymous(n) for n in extra.shape])
    tracer.cost(1, *batch, length, source, tracer.dims(query)[-1])
    tracer.cost(1, *batch, length, source, width)

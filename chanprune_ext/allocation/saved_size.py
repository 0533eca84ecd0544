"""Bytes of a saved model, known before it is written: what a budget on the file's size counts."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import torch

from chanprune_ext.checkpoint import description, shared_names
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.plan import plans_of
from chanprune_ext.widths import shape_after

if TYPE_CHECKING:
    from torch import Tensor, nn

    from chanprune_ext.plan import PruningPlan

__all__ = ["saved_bytes", "tensor_bytes"]

# The dtypes of the safetensors format, in the order in which its writer puts them.
_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8


def saved_bytes(model: nn.Module, plan: PruningPlan | None = None) -> int:
    """Bytes of the file that :func:`chanprune_ext.save` would write, without writing it.

    Args:
        model: The model; it may be on the meta device.
        plan: Count the file of the model after this plan instead.

    Raises:
        InvalidArgumentError: The state dict holds something that the format can't.
    """
    state = model.state_dict(keep_vars=True)  # the tensors themselves: shared ones stay the same
    aliases = shared_names(state)
    plans = (*plans_of(model), *([] if plan is None else [plan]))
    stored = {name: tensor for name, tensor in state.items() if name not in aliases}
    ranks = list(_DTYPES)
    order = sorted(stored, key=lambda name: (ranks.index(_known(name, stored[name])), name))
    header: dict[str, Any] = {"__metadata__": description(model, aliases, plans)}
    end = 0
    for name in order:
        tensor = stored[name]
        shape = shape_after(tensor.shape, {} if plan is None else plan.kept.get(name, {}))
        start, end = end, end + math.prod(shape) * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return _ALIGNMENT + math.ceil(len(text) / _ALIGNMENT) * _ALIGNMENT + end


def tensor_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of one element of every tensor that a file of ``model`` stores, by name."""
    state = model.state_dict(keep_vars=True)
    aliases = shared_names(state)
    return {n: t.element_size() for n, t in state.items() if n not in aliases}


def _known(name: str, tensor: Tensor) -> torch.dtype:
    if tensor.dtype not in _DTYPES:
        raise InvalidArgumentError(
            f"model: its state dict entry {name!r} has dtype {tensor.dtype}, which safetensors "
            "files can't hold"
        )
    return tensor.dtype

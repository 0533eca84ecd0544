"""L1 norms of the output and input channels of a whole model.

Must move: every weight once, one float32 per channel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from weights import MODELS, matrices, total_bytes

from chanprune_ext.ops import channel_norms

if TYPE_CHECKING:
    from collections.abc import Callable


def ours(weights: list[Tensor], dim: int) -> list[Tensor]:
    return channel_norms(weights, [dim] * len(weights))


def eager(weights: list[Tensor], dim: int) -> list[Tensor]:
    return [w.abs().sum([d for d in range(w.dim()) if d != dim]) for w in weights]


def vector_norm(weights: list[Tensor], dim: int) -> list[Tensor]:
    return [
        torch.linalg.vector_norm(w, 1, [d for d in range(w.dim()) if d != dim]) for w in weights
    ]


def compiled(weights: list[Tensor], dim: int) -> list[Tensor]:
    return _compiled(weights, dim)


_compiled = torch.compile(eager, dynamic=False)


@pytest.mark.parametrize("run", [ours, eager, vector_norm, compiled])
@pytest.mark.parametrize("dim", [0, 1], ids=["output", "input"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def bench_channel_norms(moved, benchmark, device, dtype, model, dim, run: Callable):
    benchmark.group = f"channel_norms {model} {'input' if dim else 'output'} {dtype} {device}"
    if run is compiled:
        torch.compiler.reset()  # beyond a few shapes it would silently run the eager code
    weights = matrices(model, device, dtype)
    channels = sum(w.shape[dim] for w in weights)
    moved(total_bytes(weights) + 4 * channels, lambda: run(weights, dim))

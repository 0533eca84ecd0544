"""L1 norms of the output or input channels of a whole model.

Must move: every weight once, one float32 per channel.
"""

from __future__ import annotations

import pytest
import torch
from interleaved import Job
from torch import Tensor
from weights import MODELS, matrices, total_bytes

from chanprune_ext.ops import channel_norms


def _others(weight: Tensor, dim: int) -> list[int]:
    return [d for d in range(weight.dim()) if d != dim]


def ours(weights: list[Tensor], dim: int) -> list[Tensor]:
    return channel_norms(weights, [dim] * len(weights))


def eager(weights: list[Tensor], dim: int) -> list[Tensor]:
    return [w.abs().sum(_others(w, dim)) for w in weights]


def vector_norm(weights: list[Tensor], dim: int) -> list[Tensor]:
    return [torch.linalg.vector_norm(w, 1, _others(w, dim)) for w in weights]


def foreach(weights: list[Tensor], dim: int) -> list[Tensor]:
    return [w.sum(_others(w, dim)) for w in torch._foreach_abs(weights)]  # noqa: SLF001


def read(weights: list[Tensor], dim: int) -> list[Tensor]:  # noqa: ARG001
    """No norms: one sum for each weight, the fastest that torch reads this very memory."""
    return [w.sum() for w in weights]


compiled = torch.compile(eager, dynamic=False)
VARIANTS = {
    "ours": ours,
    "eager": eager,
    "vector_norm": vector_norm,
    "foreach": foreach,
    "compiled": compiled,
    "read": read,
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dim", [0, 1], ids=["output", "input"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def bench_channel_norms(compare, device, dtype, model, dim, variant):
    def make() -> Job:
        weights = matrices(model, device, dtype)
        moved = total_bytes(weights) + 4 * sum(w.shape[dim] for w in weights)
        calls = {name: lambda run=run: run(weights, dim) for name, run in VARIANTS.items()}
        return Job(moved, calls)

    direction = "input" if dim else "output"
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    compare(f"channel_norms {model} {direction} {name} {device}", variant, make)

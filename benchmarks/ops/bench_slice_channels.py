"""Half of the output and of the input channels of a whole model kept, chosen at random.

Must move: every kept element read and written once, the index lists read once.
"""

from __future__ import annotations

import pytest
import torch
from interleaved import Job
from torch import Tensor
from weights import MODELS, matrices, total_bytes

from chanprune_ext.ops import slice_channels


def index_select(weights: list[Tensor], rows: list[Tensor], cols: list[Tensor]) -> list[Tensor]:
    return [
        w.index_select(0, r).index_select(1, c) for w, r, c in zip(weights, rows, cols, strict=True)
    ]


def indexing(weights: list[Tensor], rows: list[Tensor], cols: list[Tensor]) -> list[Tensor]:
    return [w[r[:, None], c] for w, r, c in zip(weights, rows, cols, strict=True)]


compiled = torch.compile(index_select, dynamic=False)
VARIANTS = {
    "ours": slice_channels,
    "index_select": index_select,
    "indexing": indexing,
    "compiled": compiled,
}


def _half(size: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(size, generator=generator)[: (size + 1) // 2].sort().values


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
def bench_slice_channels(compare, device, model, variant):
    def make() -> Job:
        weights = matrices(model, device)
        generator = torch.Generator().manual_seed(1)
        rows = [_half(w.shape[0], generator) for w in weights]
        cols = [_half(w.shape[1], generator) for w in weights]
        kept = total_bytes(slice_channels(weights, rows, cols))
        lists = total_bytes(rows) + total_bytes(cols)
        # Ours takes its lists from the host, where the ranking leaves them.
        there = [r.to(device) for r in rows], [c.to(device) for c in cols]
        calls = {
            name: lambda run=run: run(weights, *((rows, cols) if run is slice_channels else there))
            for name, run in VARIANTS.items()
        }
        return Job(2 * kept + lists, calls)

    compare(f"slice_channels {model} {device}", variant, make)

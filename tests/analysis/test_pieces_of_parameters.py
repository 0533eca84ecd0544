"""Layers whose weights are pieces of one parameter, as in attention to another sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from models import randomised, relative_error, run, zeroed
from torch import Tensor, nn

import chanprune_ext as cpx

if TYPE_CHECKING:
    from collections.abc import Callable


class CrossAttention(nn.Module):
    """Queries of one sequence, keys and values of another: torch cuts the packed weights up."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.query, self.memory = nn.Linear(6, 32), nn.Linear(7, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 3)
        self.shared = shared

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        keys = self.memory(y)
        values = keys if self.shared else keys.tanh()
        return self.head(self.attention(self.query(x), keys, values, need_weights=False)[0])


@pytest.mark.parametrize("shared", [True, False])
def test_attention_to_another_sequence(shared: bool) -> None:
    torch.manual_seed(0)
    model = randomised(CrossAttention(shared))
    inputs = torch.randn(2, 5, 6), torch.randn(2, 4, 7)
    plan = cpx.plan(model, inputs, 0.5)
    small = plan.apply(model, verify="numeric")
    assert small.attention.in_proj_weight.shape == (48, 16)
    assert plan.params_after < 0.35 * plan.params_before
    assert relative_error(run(small, inputs), run(zeroed(model, plan), inputs)) < 1e-9


class Pieces(nn.Module):
    """A gate: two matrices, cut out of one parameter, are applied to the same features."""

    def __init__(self, shape: tuple[int, ...], gate: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.features, self.head = nn.Linear(6, 8), nn.Linear(16, 3)
        self.weight, self.width = nn.Parameter(torch.randn(shape)), 16
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gate(self, self.features(x).relu()))


def gated(x: Tensor, pieces: Any) -> Tensor:
    value, gate = pieces
    return F.linear(x, value) * F.linear(x, gate).sigmoid()


PIECES: dict[str, tuple[tuple[int, ...], Callable[[Any, Tensor], Tensor]]] = {
    "chunk": ((32, 8), lambda m, x: gated(x, m.weight.chunk(2))),
    "split": ((32, 8), lambda m, x: gated(x, m.weight.split(m.width))),
    "slices": ((32, 8), lambda m, x: gated(x, (m.weight[: m.width], m.weight[m.width :]))),
    "narrow": (
        (32, 8),
        lambda m, x: gated(x, [m.weight.narrow(0, k * m.width, m.width) for k in range(2)]),
    ),
    "columns": ((8, 32), lambda m, x: gated(x, [w.T for w in m.weight.chunk(2, 1)])),
    "stacked": ((2, 16, 8), lambda m, x: gated(x, (m.weight[0], m.weight[1]))),
    "stacked last": ((16, 8, 2), lambda m, x: gated(x, m.weight.unbind(2))),
}


@pytest.mark.parametrize(("shape", "gate"), PIECES.values(), ids=PIECES)
def test_pieces_of_a_parameter_make_channels(
    shape: tuple[int, ...], gate: Callable[[Any, Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    model, x = randomised(Pieces(shape, gate)), torch.randn(5, 6)
    plan = cpx.plan(model, x, 0.5)
    small = plan.apply(model, verify="numeric")
    assert small.head.in_features == 8
    assert small.weight.shape == tuple(n if n == 2 else n // 2 for n in shape)
    assert relative_error(run(small, x), run(zeroed(model, plan), x)) < 1e-9

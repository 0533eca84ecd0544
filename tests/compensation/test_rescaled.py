"""Weights that a plan has multiplied, for a constant that follows a width, stay multiplied."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_networks import error, seeded_norm, state
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext.compensation import compensate
from chanprune_ext.reconstruction import reconstruct

HEADS, WIDTH, INNER = 2, 12, 16


class Attention(nn.Module):
    """Attention whose default scale follows the head width, and a linear output."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, INNER) for _ in range(3))
        self.out = nn.Linear(INNER, WIDTH)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def query(self, x: Tensor) -> Tensor:
        return self.q(x)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(y) for y in (self.query(x), self.k(x), self.v(x)))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class NormedQuery(Attention):
    """The norm behind the query is what gets multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Conv1d(WIDTH, INNER, 1)
        self.norm = seeded_norm(INNER, nn.BatchNorm1d)

    def query(self, x: Tensor) -> Tensor:
        return self.norm(self.q(x.transpose(1, 2))).transpose(1, 2)


class AddedQuery(Attention):
    """What is added to the query is multiplied along with it, and is fitted for the same sum."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Linear(WIDTH, INNER)

    def query(self, x: Tensor) -> Tensor:
        return self.q(x) + self.position(x.flip(1))


def without_half_of_the_head_dims(kind: type[Attention]) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network in which the head dims that go do nothing, and it without them."""
    torch.manual_seed(0)
    model = kind().eval()
    half = torch.arange(INNER) % (INNER // HEADS) < INNER // HEADS // 2
    with torch.no_grad():
        for name in ("q", "k", "v", "norm", "position"):
            layer = getattr(model, name, None)
            if layer is not None:
                layer.weight[~half] = 0
                layer.bias[~half] = 0
                layer.weight *= 2
        model.out.weight[:, ~half] = 0
    x = torch.randn(64, 5, WIDTH)
    plan = cpx.plan(model, x[:2], 0.5, kinds=("head_dim",))
    assert plan.rescalings
    return plan.apply(model), model, x


@pytest.mark.parametrize("kind", [Attention, NormedQuery, AddedQuery])
def test_an_exact_removal_stays_exact(kind):
    pruned, model, x = without_half_of_the_head_dims(kind)
    report = compensate(pruned, model, x, held_back=0.0)
    reasons = {layer.module: layer.skipped for layer in report.layers}
    assert reasons["q"] == "nothing to repair"
    assert error(pruned, model, x) < 1e-5


def test_a_multiplied_layer_is_fitted_to_multiplied_values():
    pruned, model, x = without_half_of_the_head_dims(Attention)
    with torch.no_grad():
        pruned.q.weight += 0.1 * torch.randn_like(pruned.q.weight)
    before = error(pruned, model, x)
    compensate(pruned, model, x, held_back=0.0, ridge=0.0)
    assert before > 1e-3
    assert error(pruned, model, x) < 1e-4


def test_parts_that_were_pruned_on_their_own():
    _, model, x = without_half_of_the_head_dims(Attention)
    whole, pruned = (nn.Sequential(nn.Identity(), part) for part in (model, model))
    pruned[1] = cpx.plan(model, x[:2], 0.5, kinds=("head_dim",)).apply(model)
    compensate(pruned, whole, x, held_back=0.0)
    assert error(pruned, whole, x) < 1e-5


def test_a_block_that_returns_multiplied_values_is_not_tuned():
    class Apart(nn.Module):
        """The query has a block to itself, since the layers around it are too many for one."""

        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()
            self.more = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(12))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.more[:6]:
                x = layer(x)
            a = self.attention
            q, k, v = (a.split(y(x)) for y in (a.q, a.k, a.v))
            x = a.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            for layer in self.more[6:]:
                x = x + layer(x)
            return x

    torch.manual_seed(0)
    model = Apart().eval()
    x = torch.randn(16, 5, WIDTH)
    pruned = cpx.prune(model, x[:2], 0.5, kinds=("head_dim",))
    before = state(pruned)
    report = reconstruct(pruned, model, x, epochs=1, tune_outputs=False, progress=False)
    left = {block.name: block.left or "" for block in report.blocks}
    assert "a scale that follows a pruned width" in left["attention.q"]
    assert "scale" not in left["attention.k"]
    assert torch.equal(pruned.attention.q.weight, before["attention.q.weight"])

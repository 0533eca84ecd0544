"""Elimination on attention, where heads and their width are rivals for the same inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext.analysis import analyse
from chanprune_ext.elimination.probes import convex_steps

WIDTH, HEADS, DIM, HIDDEN = 16, 4, 4, 24


class Attention(nn.Module):
    """Self-attention; ``keys`` says how many key heads the query heads share."""

    def __init__(self, keys: int = HEADS) -> None:
        super().__init__()
        self.dim = DIM
        self.q = nn.Linear(WIDTH, HEADS * DIM)
        self.k = nn.Linear(WIDTH, keys * DIM)
        self.v = nn.Linear(WIDTH, keys * DIM)
        self.out = nn.Linear(HEADS * DIM, WIDTH)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        b, n, _ = x.shape
        return tuple(layer(x).view(b, n, -1, self.dim) for layer in (self.q, self.k, self.v))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.heads(x))
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Packed(Attention):
    """One layer makes queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        del self.q, self.k, self.v
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * DIM)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        b, n, _ = x.shape
        return self.qkv(x).view(b, n, 3, -1, self.dim).unbind(2)


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.before, self.attention = nn.LayerNorm(WIDTH), attention
        self.between = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.down(F.gelu(self.up(self.between(x))))


class VisionTransformer(nn.Module):
    """Patches, a class token, blocks, and a head that reads the class token."""

    def __init__(self, *attentions: nn.Module) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH) / 4)
        self.blocks = nn.Sequential(*map(Block, attentions))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.norm(self.blocks(x))[:, 0])


def images(n: int = 96, seed: int = 0) -> Tensor:
    """Smooth images, so that what the layers read is correlated."""
    coarse = torch.randn(n, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (8, 8), mode="bilinear")


def transformer(make=Attention, **options) -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(make(**options), make(**options)).eval()


def scores_of(model: nn.Module, x: Tensor, **options) -> list:
    groups = analyse(model, x[:1]).groups
    return list(zip(groups, cpx.elimination(x, **options)(model, groups, 0), strict=True))


@pytest.mark.parametrize("probe", [False, True])
@pytest.mark.parametrize(
    ("make", "options"),
    [*((Attention, {"keys": keys}) for keys in (4, 2, 1)), (Packed, {})],
)
def test_rival_groups_get_scores_of_their_own(make, options, probe):
    found = scores_of(transformer(make, **options), images(), probe=probe)
    assert {group.kind for group, _ in found} >= {"heads", "head_dim", "mlp", "residual"}
    for group, score in found:
        assert score.shape == (group.units,)
        assert np.isfinite(score).all()
        assert (score > 0).any()


def read_by(layer: nn.Module, model: nn.Module, x: Tensor) -> Tensor:
    """What a layer reads, one column for each sample and position."""
    caught: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        model(x)
    hook.remove()
    return caught[0].flatten(0, -2).T.double()


def greedy_steps(columns: Tensor, weight: Tensor, units: np.ndarray) -> tuple[list[int], list]:
    """Always the unit without which a least-squares fit to the layer's outputs is best."""
    columns = columns - columns.mean(1, keepdim=True)
    outputs = weight.double() @ columns
    left, order, losses = list(range(len(units))), [], []
    while left:

        def loss(unit: int, among: list[int]) -> float:
            keep = np.concatenate([np.empty(0, int), *(units[u] for u in among if u != unit)])
            kept = columns[keep].T
            fitted = kept @ torch.linalg.lstsq(kept, outputs.T, driver="gelsd").solution
            return float((outputs.T - fitted).square().sum() / columns.shape[1])

        best = min(left, key=lambda unit: loss(unit, left))
        losses.append(loss(best, left))
        order.append(best)
        left.remove(best)
    return order, losses


@pytest.mark.parametrize("keys", [4, 2])
def test_heads_and_their_width_score_as_by_brute_force(keys):
    model, x = transformer(keys=keys), images()
    entry = "blocks.0.attention.out.weight"
    out = model.get_parameter(entry).detach()
    columns = read_by(model.blocks[0].attention.out, model, x)
    stream = read_by(model.blocks[0].between, model, x)
    energy = float((stream - stream.mean(1, keepdim=True)).square().mean(1).sum())
    seen = set()
    for group, score in scores_of(model, x, ridge=1e-10):
        member = next((m for m in group.members if m.entry == entry and m.dim == 1), None)
        if member is None:
            continue
        seen.add((group.kind, group.units))
        order, losses = greedy_steps(columns, out, member.indices)
        expected = np.empty(group.units)
        expected[order] = convex_steps(np.array(losses) / energy)
        np.testing.assert_allclose(score, expected, rtol=1e-4, atol=1e-9)
    assert seen == (
        {("heads", 4), ("head_dim", 4)} if keys == 4 else {("heads", 2), ("head_dim", 4)}
    )


def test_a_head_that_says_what_another_says_goes_for_nothing():
    """The other one takes its place; by norm both are large."""
    model, x = transformer(), images()
    attention = model.blocks[0].attention
    with torch.no_grad():
        for layer in (attention.q, attention.k, attention.v):
            layer.weight[3 * DIM :] = layer.weight[DIM : 2 * DIM]
            layer.bias[3 * DIM :] = layer.bias[DIM : 2 * DIM]
        attention.out.weight[:, 3 * DIM :] *= 3
        attention.v.weight[DIM : 2 * DIM] *= 2
        attention.v.bias[DIM : 2 * DIM] *= 2
    pruned = {}
    for name, criterion in (("l1", "l1"), ("elimination", cpx.elimination(x, ridge=1e-6))):
        plan = cpx.plan(
            model,
            x[:1],
            0.0,
            kinds=("heads",),
            ratios={"blocks.0.attention.[qkv]": 0.25},
            criterion=criterion,
        )
        pruned[name] = plan.apply(model)
        cpx.compensate(pruned[name], model, x, progress=False, ridge=1e-6)
    fresh = images(seed=1)
    with torch.no_grad():
        expected = model(fresh)
        errors = {
            n: float((m(fresh) - expected).norm() / expected.norm()) for n, m in pruned.items()
        }
    assert errors["elimination"] < 1e-3 < errors["l1"]


def test_the_smallest_transformer_within_a_tolerance():
    model, x = transformer(Packed), images()
    found = cpx.prune_within(model, x[:1], x, tolerance=0.2, steps=3)
    assert found.loss <= 0.2
    assert found.plan.macs_after < 0.8 * found.plan.macs_before
    assert found.model(x).shape == (len(x), 5)

"""What may be pruned, chosen by kind, and which outputs must keep their shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import randomised, relative_error, run, zeroed
from torch import Tensor, nn

import chanprune_ext as cpx

WIDTH, HEADS, GROUPS, DIM, HIDDEN = 24, 4, 2, 6, 20


class Block(nn.Module):
    """Attention with shared key heads and a gated MLP, both added to a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = DIM
        self.q = nn.Linear(WIDTH, HEADS * DIM)
        self.k = nn.Linear(WIDTH, GROUPS * DIM)
        self.v = nn.Linear(WIDTH, GROUPS * DIM)
        self.out = nn.Linear(HEADS * DIM, WIDTH)
        self.gate = nn.Linear(WIDTH, HIDDEN)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (
            layer(x).view(b, n, -1, self.head_dim).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        repeat = q.shape[1] // k.shape[1]
        k, v = (t[:, :, None].expand(-1, -1, repeat, -1, -1).flatten(1, 2) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.blocks(self.stem(x))
        return {"logits": self.head(hidden), "hidden": hidden}


@pytest.fixture
def decoder() -> nn.Module:
    torch.manual_seed(0)
    return randomised(Decoder()).double()


X = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(1)).double()


def logits(output: dict[str, Tensor]) -> Any:
    return output["logits"]


def kept_widths(plan: cpx.PruningPlan, name: str, dim: int) -> list[int]:
    entry = plan.kept.get(f"blocks.0.{name}.weight", {})
    return entry[dim].tolist() if dim in entry else []


def assert_exact(model: nn.Module, plan: cpx.PruningPlan) -> None:
    pruned = plan.apply(model)
    assert relative_error(run(pruned, X)[:1], run(zeroed(model, plan), X)[:1]) < 1e-12


def test_every_group_says_what_it_is(decoder: nn.Module) -> None:
    plan = cpx.plan(decoder, X, 0.5, outputs=logits)
    kinds = {g.name: g.kind for g in plan.groups}
    assert kinds["stem"] == "residual"
    assert kinds["blocks.0.gate"] == "mlp"
    assert {g.kind for g in plan.groups if g.name == "blocks.0.q"} == {"heads", "head_dim"}
    assert "head_dim" in str(plan)


def test_heads_go_whole_and_with_their_group(decoder: nn.Module) -> None:
    plan = cpx.plan(decoder, X, 0.5, kinds="heads")
    queries, keys = kept_widths(plan, "q", 0), kept_widths(plan, "k", 0)
    assert len(queries) == HEADS * DIM // 2
    assert {len([i for i in queries if i // DIM == head]) for head in range(HEADS)} == {0, DIM}
    # Either a key head goes with its query heads, or the same query head of every key head.
    assert len(keys) in (0, GROUPS * DIM // 2)
    assert not kept_widths(plan, "gate", 0)
    assert not kept_widths(plan, "q", 1)
    assert not plan.rescalings
    assert_exact(decoder, plan)


def test_width_of_every_head(decoder: nn.Module) -> None:
    plan = cpx.plan(decoder, X, 0.5, kinds=("head_dim",))
    queries = kept_widths(plan, "q", 0)
    assert [len([i for i in queries if i // DIM == head]) for head in range(HEADS)] == [
        DIM // 2
    ] * 4
    assert len(plan.rescalings) == 4  # weight and bias of two query layers
    assert_exact(decoder, plan)


def test_hidden_width_and_a_glob_beside_it(decoder: nn.Module) -> None:
    plan = cpx.plan(decoder, X, 0.5, kinds=["mlp"], ratios={"stem": 0.25}, outputs=logits)
    assert len(kept_widths(plan, "gate", 0)) == HIDDEN // 2
    assert not kept_widths(plan, "q", 0)
    assert len(plan.kept["stem.weight"][0]) == WIDTH * 3 // 4
    assert_exact(decoder, plan)


def test_the_stream_stays_where_it_is_returned(decoder: nn.Module) -> None:
    plan = cpx.plan(decoder, X, 0.5)
    assert "stem.weight" not in plan.kept
    assert any(f.entry == "stem.weight" and "output" in f.why for f in plan.frozen)
    assert plan.apply(decoder)(X)["hidden"].shape[-1] == WIDTH


def test_the_stream_shrinks_where_its_output_is_not_wanted(decoder: nn.Module) -> None:
    plan = cpx.plan(decoder, X, 0.5, outputs=logits)
    assert len(plan.kept["stem.weight"][0]) == WIDTH // 2
    assert_exact(decoder, plan)
    plan.apply(decoder, verify="numeric")


def test_budget_over_some_kinds(decoder: nn.Module) -> None:
    plan = cpx.plan(decoder, X, budget=cpx.Budget(params=0.8), kinds=("mlp", "heads"))
    assert plan.params_after / plan.params_before <= 0.8
    assert not any(g.width_after < g.width_before for g in plan.groups if g.kind == "head_dim")


def test_unknown_kind_is_named(decoder: nn.Module) -> None:
    with pytest.raises(cpx.ChanpruneError, match=r"kinds must be some of .*'mlp'.* got \['ffn'\]"):
        cpx.plan(decoder, X, 0.5, kinds=("ffn",))


def test_kind_the_model_has_not_is_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    with pytest.raises(cpx.ChanpruneError, match=r"kinds=\('heads',\); the model has \['hidden'\]"):
        cpx.plan(model, torch.randn(1, 3, 8, 8), 0.5, kinds="heads")


def test_heads_that_a_size_ties_to_the_stream_are_told() -> None:
    class Tied(Block):
        """The width of all heads is that of the stream, by a reshape."""

        def forward(self, x: Tensor) -> Tensor:
            b, n, width = x.shape
            q, k, v = (
                layer(x).view(b, n, HEADS, width // HEADS).transpose(1, 2)
                for layer in (self.q, self.k, self.v)
            )
            y = F.scaled_dot_product_attention(q, k, v)
            return x + self.out(y.transpose(1, 2).reshape(b, n, width))

    block = Tied()
    block.q, block.k, block.v, block.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
    model = nn.Sequential(nn.Linear(8, WIDTH), block, nn.Linear(WIDTH, 3)).double()
    with pytest.raises(cpx.ChanpruneError, match=r"tied to those of '0' \(residual\).*choose both"):
        cpx.plan(model, X, 0.5, kinds="head_dim")
    assert cpx.plan(model, X, 0.5, kinds=("head_dim", "residual")).params_after


def test_a_ratio_of_heads_for_one_layer(decoder: nn.Module) -> None:
    """The layer's name stands for heads and for their width: the kinds say which."""
    ratios = {"blocks.0.q": 0.5, "blocks.1.q": 0.25}
    plan = cpx.plan(decoder, X, 0.0, kinds=("heads",), ratios=ratios)
    assert {g.kind for g in plan.groups if g.width_after < g.width_before} == {"heads"}
    assert len(plan.kept["blocks.0.q.weight"][0]) == HEADS * DIM // 2
    assert_exact(decoder, plan)


class Rotary(nn.Module):
    """Packed queries, keys and values; rotary positions keep the width of queries and keys."""

    def __init__(self, mlp: bool) -> None:
        super().__init__()
        self.heads, self.dim = HEADS, DIM
        self.qkv, self.out = nn.Linear(8, 3 * HEADS * DIM), nn.Linear(HEADS * DIM, 8)
        self.up, self.down = (nn.Linear(8, 16), nn.Linear(16, 8)) if mlp else (None, None)
        self.head = nn.Linear(8, 3)
        angles = torch.outer(torch.arange(20.0), torch.rand(DIM // 2)).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def rotated(self, x: Tensor) -> Tensor:
        cos, sin = (t[: x.shape[1], None] for t in (self.cos, self.sin))
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, self.heads, self.dim) for t in self.qkv(x).chunk(3, -1))
        q, k = self.rotated(q), self.rotated(k)
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.head(x if self.up is None else x + self.down(F.gelu(self.up(x))))


@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {"ratio": 0.5},
        {"budget": cpx.Budget(params=0.7)},
        {"ratio": 0.5, "kinds": ("heads", "head_dim")},
    ],
)
def test_heads_go_where_their_width_cannot(mlp: bool, how: dict[str, Any]) -> None:
    """Chunks stay equal, and those of queries and keys cannot become narrower."""
    torch.manual_seed(0)
    model = randomised(Rotary(mlp)).double()
    plan = cpx.plan(model, X, **how)
    assert [g.kind for g in plan.groups if g.width_after < g.width_before][:1] == ["heads"]
    assert not any(f.entry == "qkv.weight" for f in plan.frozen)
    assert relative_error(run(plan.apply(model), X), run(zeroed(model, plan), X)) < 1e-12


class Stream(nn.Module):
    """torch's attention, whose heads fill the width of the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x + self.down(F.gelu(self.up(x))))


def test_heads_that_stay_beside_what_goes_are_told() -> None:
    plan = cpx.plan(Stream(), X.float(), 0.5, kinds=("heads", "mlp"))
    (told,) = (f for f in plan.frozen if f.entry == "attention.in_proj_weight")
    assert told.channels == 3 * WIDTH
    assert "tied to those of 'stem' (residual), which stay, by a size" in str(plan)
    (held,) = {g.held for g in plan.explain("attention").groups if g.held is not None}
    assert held == told
    both = cpx.plan(Stream(), X.float(), 0.5, kinds=("heads", "mlp", "residual"))
    assert not any(f.entry == "attention.in_proj_weight" for f in both.frozen)
    assert {g.width_after for g in both.groups if g.kind == "heads"} == {3 * WIDTH // 2}


@pytest.mark.parametrize("kinds", [("heads",), ("head_dim",), ("heads", "head_dim")])
def test_nobody_is_told_to_choose_both_of_two_rivals(kinds: tuple[str, ...]) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()  # the stream is an input: it stays
    with pytest.raises(cpx.ChanpruneError, match="part of a size that must stay") as caught:
        cpx.plan(model, torch.randn(2, 7, WIDTH), 0.5, kinds=kinds)
    assert "choose both" not in str(caught.value)

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
    with pytest.raises(cpx.ChanpruneError, match=r"tied by a size to those of '0' \(residual\)"):
        cpx.plan(model, X, 0.5, kinds="head_dim")
    assert cpx.plan(model, X, 0.5, kinds=("head_dim", "residual")).params_after

"""Channels removed by their indices: just these, what hangs together with them, or a reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import randomised
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext.errors import InvalidArgumentError, NothingToPruneError, VerificationError

if TYPE_CHECKING:
    from pathlib import Path

IMAGES = torch.zeros(1, 3, 8, 8)


class Net(nn.Module):
    """A stream of eight channels with one block of sixteen beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.wide, self.norm = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.back = nn.Conv2d(16, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.back(self.norm(self.wide(x)).relu())
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return randomised(Net())


@settings(max_examples=10, deadline=None)
@given(st.sets(st.integers(0, 14)), st.sets(st.integers(0, 6), min_size=1))
def test_just_these_channels_go(inner: set[int], stream: set[int]) -> None:
    model = randomised(Net())
    plan = cpx.plan(model, IMAGES, remove={"wide": inner, "stem": sorted(stream)})
    pruned = plan.apply(model, verify="numeric")  # what the original does with them zeroed
    rows, columns = ([i for i in range(n) if i not in out] for n, out in ((16, inner), (8, stream)))
    assert torch.equal(pruned.wide.weight, model.wide.weight[rows][:, columns])
    assert torch.equal(pruned.norm.weight, model.norm.weight[rows])
    assert torch.equal(pruned.back.weight, model.back.weight[columns][:, rows])
    assert torch.equal(pruned.head.weight, model.head.weight[:, columns])


@pytest.mark.parametrize(
    "channels",
    [3, [3], (3, 3), {3}, range(3, 4), np.array([3]), torch.tensor([3]), np.int64(3)],
    ids=str,
)
def test_indices_come_in_any_form(net: nn.Module, channels: object) -> None:
    plan = cpx.plan(net, IMAGES, remove={"wide": channels})
    kept = plan.kept["wide.weight"][0].tolist()
    assert kept == [i for i in range(16) if i != 3]
    assert plan.options["remove"] == {"wide": [3]}


def test_such_a_plan_is_kept_in_a_file(net: nn.Module, tmp_path: Path) -> None:
    plan = cpx.plan(net, IMAGES, remove={"wide": [3], "back": []})
    plan.save(tmp_path / "plan.json")
    again = cpx.PruningPlan.load(tmp_path / "plan.json")
    assert again.options["remove"] == {"wide": [3], "back": []}
    assert again.apply(net).wide.out_channels == 15


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ({"head": [0]}, "10 channels of 'head.weight' are kept: the model's output"),
        ({"nothing": [0]}, "no such module makes channels"),
        ({"wide": [16]}, "it has channels 0 to 15, got 16"),
        ({"wide": [-1]}, "it has channels 0 to 15, got -1"),
        ({"wide": [0.5]}, "indices of channels, integers"),
        ({"wide": "0"}, "indices of channels, integers"),
        ({"wide": None}, "indices of channels, integers"),
        ({"wide": [True] * 16}, "of a mask, give the positions"),
        ({"wide": range(16)}, "nothing would be left of 'wide.weight'"),
        ({0: [0]}, "the name of a module, got 0"),
        (["wide"], "must map names of modules to channels"),
    ],
)
def test_what_cannot_go_is_told(net: nn.Module, remove: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        cpx.plan(net, IMAGES, remove=remove)


def test_nothing_named_is_nothing_to_do(net: nn.Module) -> None:
    with pytest.raises(NothingToPruneError, match="remove names no channel"):
        cpx.plan(net, IMAGES, remove={})


@pytest.mark.parametrize(
    "beside",
    [
        {"ratio": 0.5},
        {"ratios": {"stem": 0.5}},
        {"threshold": 1.0},
        {"budget": cpx.Budget(macs=0.5)},
        {"ignore": ["stem"]},
    ],
)
def test_nothing_else_says_what_goes(net: nn.Module, beside: dict[str, Any]) -> None:
    (name,) = beside
    with pytest.raises(InvalidArgumentError, match=f"either {name} or remove, not both"):
        cpx.plan(net, IMAGES, remove={"wide": [0]}, **beside)


def test_no_criterion_is_asked(net: nn.Module) -> None:
    def criterion(*_: object) -> list[np.ndarray]:
        raise AssertionError

    cpx.plan(net, IMAGES, remove={"wide": [0]}, criterion=criterion)


def test_kinds_must_agree(net: nn.Module) -> None:
    with pytest.raises(InvalidArgumentError, match=r"none of kinds=\('residual',\).*\['hidden'\]"):
        cpx.plan(net, IMAGES, remove={"wide": [0]}, kinds=["residual"])


def test_stages_would_choose_others(net: nn.Module) -> None:
    data = [(IMAGES, torch.zeros(1, dtype=torch.long))]
    with pytest.raises(InvalidArgumentError, match="stages choose their channels anew"):
        cpx.prune_progressively(net, IMAGES, remove={"wide": [0]}, train=data)


class Attention(nn.Module):
    """Four heads of eight, scaled by a size that is read again at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.out = nn.Linear(32, 32)
        self.head_dim = 8

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def attention() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Attention().eval(), torch.randn(2, 5, 32)


def test_a_head_goes_where_the_channels_are_a_head() -> None:
    model, tokens = attention()
    plan = cpx.plan(model, tokens, remove={"q": range(8, 16)})
    assert {(g.kind, g.width_after) for g in plan.groups if g.width_after < g.width_before} == {
        ("heads", 24)
    }
    small = plan.apply(model, verify="numeric")
    left = [*range(8), *range(16, 32)]
    assert torch.equal(small.v.weight, model.v.weight[left])


def test_head_width_goes_where_every_head_loses_the_same() -> None:
    model, tokens = attention()
    rows = [h * 8 + i for h in range(4) for i in (0, 5)]
    plan = cpx.plan(model, tokens, remove={"q": rows, "v": [0, 8, 16, 24, 1, 9, 17, 25]})
    small = plan.apply(model, verify="numeric")
    assert small.head_dim == 6
    assert torch.equal(small.k.weight, model.k.weight[[i for i in range(32) if i not in rows]])
    assert torch.equal(small.v.weight[0], model.v.weight[2])


def test_sizes_that_tie_other_channels_are_named() -> None:
    model, tokens = attention()
    with pytest.raises(VerificationError, match=r"ties these channels to 'v' \(head_dim\)"):
        cpx.plan(model, tokens, remove={"q": [0, 8, 16, 24]})


class Halves(nn.Module):
    """Two halves of one layer that go different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.more, self.out = nn.Linear(6, 16), nn.Linear(8, 8), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.both(x).chunk(2, -1)
        return self.out(torch.cat([a, self.more(b)], -1))


def test_pieces_that_must_stay_of_one_size_are_told() -> None:
    model, x = Halves().eval(), torch.randn(2, 6)
    with pytest.raises(VerificationError, match="name as many channels in each piece"):
        cpx.plan(model, x, remove={"both": [0, 1, 9]})
    with pytest.raises(VerificationError, match=r"ties these channels to others of 'both' \(mlp\)"):
        cpx.plan(model, x, remove={"both": [0]})
    pruned = cpx.plan(model, x, remove={"both": [0, 9]}).apply(model, verify="numeric")
    assert pruned.more.in_features == 7

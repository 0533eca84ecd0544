"""Bilinear layers and tables of distances: what is summed over goes on both sides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from models import randomised, relative_error, run, zeroed
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext.analysis.rules.registry import _RULES
from chanprune_ext.errors import NothingToPruneError

if TYPE_CHECKING:
    from collections.abc import Callable


class Bilinear(nn.Module):
    """Two layers of their own widths, or twice the same, meet in a third."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.left = nn.Linear(6, 16)
        self.right = self.left if shared else nn.Linear(6, 12)
        self.both = nn.Bilinear(16, self.right.out_features, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.both(self.left(x).relu(), self.right(x).relu()).relu())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", [(4, 6), (2, 5, 6)], ids=str)
def test_all_three_widths_of_a_bilinear_layer(shape: tuple[int, ...], shared: bool) -> None:
    torch.manual_seed(0)
    model, x = randomised(Bilinear(shared)), torch.randn(shape)
    plan = cpx.plan(model, x, 0.5)
    small = plan.apply(model, verify="numeric")
    assert small.both.weight.shape == (5, 8, 8 if shared else 6)
    assert relative_error(run(small, x), run(zeroed(model, plan), x)) < 1e-9
    products = x[..., 0].numel() * 10 * 16 * (16 if shared else 12)
    assert plan.macs_before >= products > 0


class Distances(nn.Module):
    """How far features are from rows of a table, a parameter or what ``table`` makes."""

    def __init__(self, table: Callable[[Tensor], Tensor] | None, p: float, rows: int) -> None:
        super().__init__()
        self.features, self.head = nn.Linear(6, 16), nn.Linear(rows, 3)
        self.rows = nn.Parameter(torch.randn(rows, 16))
        self.table, self.p = table, p
        self.act: Callable[[Tensor], Tensor] = torch.relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.features(x))
        return self.head(torch.cdist(x, self.rows if self.table is None else self.table(x), self.p))


# Few rows and many, one batch dim and none, take different operations.
@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("shape", [(30, 6), (2, 9, 6)], ids=str)
def test_both_sides_of_a_distance(shape: tuple[int, ...], p: float, rows: int) -> None:
    torch.manual_seed(0)
    model, x = randomised(Distances(None, p, rows)), torch.randn(shape)
    plan = cpx.plan(model, x, 0.5)
    small = plan.apply(model, verify="numeric")
    assert small.rows.shape == (rows, 8)
    assert relative_error(run(small, x), run(zeroed(model, plan), x)) < 1e-9


def test_distances_to_what_is_not_zeroed_are_others() -> None:
    x = torch.randn(2, 9, 6)
    model = randomised(Distances(lambda x: x.new_ones(5, x.shape[-1]), 2.0, 5))
    assert any(g.normalised for g in cpx.plan(model, x, 0.5).groups)
    model = randomised(Distances(None, 2.0, 5))
    model.act = torch.sigmoid  # one half where a feature is zeroed
    assert any(g.normalised for g in cpx.plan(model, x, 0.5).groups)
    constant = torch.ones(5, 16)
    with pytest.raises(NothingToPruneError, match="meet others that cannot be removed"):
        cpx.plan(randomised(Distances(constant.to, 2.0, 5)), x, 0.5)


@pytest.mark.parametrize("name", ["aten::_trilinear", "aten::_cdist_forward"])
def test_the_rules_are_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(_RULES, name)
    model = Bilinear(False) if name == "aten::_trilinear" else Distances(None, 2.0, 5)
    with pytest.raises(NothingToPruneError, match=f"no rule for {name}"):
        cpx.plan(randomised(model), torch.randn(4, 6), 0.5)

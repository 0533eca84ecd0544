"""Tensors that modules hold as plain attributes are cut like buffers, unless they are caches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext.analysis.attribute_tensors import attribute_tensors_of
from chanprune_ext.errors import PlanMismatchError

if TYPE_CHECKING:
    from pathlib import Path

X = torch.randn(2, 3, 16, 16)


class Patches(nn.Module):
    """A stream of tokens with positions added, and one MLP."""

    positions: Any

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.up, self.down, self.classes = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)

    def positions_of(self, x: Tensor) -> Any:
        return self.positions.to(x.device, dtype=x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT
        x = x + self.positions_of(x)
        x = x + self.down(self.up(x).relu())
        out: Tensor = self.classes(x.mean(1))
        return out


class Plain(Patches):
    def __init__(self) -> None:
        super().__init__()
        self.positions = torch.randn(16, 16)


class Cached(Patches):
    """Positions are made where there are none, or too few."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = None

    def positions_of(self, x: Tensor) -> Any:
        if self.positions is None or len(self.positions) < x.shape[1]:
            self.positions = torch.linspace(0, 1, x.shape[1] * 16).view(-1, 16)
        return self.positions[: x.shape[1]]


class Shared(Patches):
    """A view of a parameter is no tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 16))
        self.positions = self.table.data


def made(kind: type[Patches]) -> Patches:
    torch.manual_seed(0)
    return kind().eval()


def test_plain_attributes_are_cut_along(tmp_path: Path) -> None:
    model = made(Plain)
    plan = cpx.plan(model, X, 0.5)
    assert [entry.entry for entry in plan.frozen] == ["classes.weight"]
    small = plan.apply(model, verify="numeric")
    assert small.positions.shape == (16, 8)
    assert type(small.positions) is Tensor
    assert torch.equal(small.positions, model.positions[:, plan.kept["embed.weight"][0]])
    again = cpx.PruningPlan.from_dict(plan.to_dict())
    assert torch.equal(again.apply(model)(X), small(X))
    cpx.save(small, tmp_path / "small.safetensors")
    assert torch.equal(cpx.load(tmp_path / "small.safetensors", made(Plain))(X), small(X))
    assert torch.equal(plan.apply(model, inplace=True)(X), small(X))
    assert model.positions.shape == (16, 8)
    assert cpx.prune(model, X, 0.5, verify="numeric").positions.shape == (16, 4)


def test_another_shape_is_told() -> None:
    plan, other = cpx.plan(made(Plain), X, 0.5), made(Plain)
    other.positions = torch.randn(20, 16)
    with pytest.raises(PlanMismatchError, match=r"'positions' is \[20, 16\]"):
        plan.apply(other)


@pytest.mark.parametrize("kind", [Cached, Shared])
def test_caches_and_views_are_left_alone(kind: type[Patches]) -> None:
    model = made(kind)
    model(X)
    assert isinstance(model.positions, Tensor)
    assert attribute_tensors_of(model, model.parameters()) == {}
    plan = cpx.plan(model, X, 0.5)
    assert "positions" not in plan.kept
    assert "embed.weight" in {entry.entry for entry in plan.frozen}
    plan.apply(model, verify="numeric")


def test_what_a_forward_leaves_behind_does_not_matter() -> None:
    class Leaving(Plain):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            self.last = out.detach()
            return out

    model = Leaving().eval()
    plan = cpx.plan(model, X, 0.5)
    with torch.no_grad():
        model(X[:1])
    assert plan.apply(model, verify="numeric").positions.shape == (16, 8)

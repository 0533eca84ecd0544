"""Networks written with einops: its functions remember shapes, its layers keep numbers."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chanprune_ext as cpx

if TYPE_CHECKING:
    from pathlib import Path

einops = pytest.importorskip("einops")
X = torch.randn(2, 5, 16)


class WithFunctions(nn.Module):
    """Attention whose heads are an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.qkv, self.out = nn.Linear(16, 96), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1)
        y = F.scaled_dot_product_attention(*(self.divided(part) for part in parts))
        out: Tensor = self.out(einops.rearrange(y, "b h n d -> b n (h d)"))
        return x + out

    def divided(self, x: Tensor) -> Tensor:
        parts: Tensor = einops.rearrange(x, "b n (h d) -> b h n d", h=self.heads)
        return parts


class WithLayers(WithFunctions):
    """Attention whose heads only a layer knows, twice."""

    def __init__(self) -> None:
        super().__init__()
        from einops.layers.torch import Rearrange

        del self.heads
        self.split = Rearrange("b n (h d) -> b h n d", h=4)

    def divided(self, x: Tensor) -> Tensor:
        parts: Tensor = self.split(x)
        return parts


def network(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(kind(), kind(), nn.Linear(16, 16)).eval()


@pytest.mark.parametrize("choice", ["heads", "head_dim"])
@pytest.mark.parametrize("kind", [WithFunctions, WithLayers])
def test_heads_and_their_width(kind: type[nn.Module], choice: str, tmp_path: Path) -> None:
    model = network(kind)
    expected = model(X)
    plan = cpx.plan(model, X, 0.5, kinds=(choice,))
    small = plan.apply(model, verify="numeric")
    assert small[0].out.in_features == small[1].out.in_features == 16
    assert torch.equal(model(X), expected)
    result = small(X)
    assert torch.equal(copy.deepcopy(small)(X), result)
    cpx.save(small, tmp_path / "small.safetensors")
    assert torch.equal(cpx.load(tmp_path / "small.safetensors", network(kind))(X), result)
    assert torch.equal(plan.apply(model, inplace=True)(X), result)


def test_layers_tell_their_new_number() -> None:
    small = cpx.prune(network(WithLayers), X, 0.5, kinds=("heads",))
    assert repr(small[0].split) == "Rearrange('b n (h d) -> b h n d', h=2)"


@pytest.mark.parametrize("kind", [WithFunctions, WithLayers])
def test_what_ran_before_makes_no_difference(kind: type[nn.Module]) -> None:
    plans = []
    for ran_before in (False, True):
        model = network(kind)
        if ran_before:
            model(X)
        plans.append(cpx.plan(model, X, 0.5).to_dict())
    assert plans[0] == plans[1]

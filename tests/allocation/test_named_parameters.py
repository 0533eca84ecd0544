"""Channels named by what they pass through, or by the parameter that holds them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import randomised
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext.errors import InvalidArgumentError

IMAGES = torch.zeros(1, 3, 6, 6)


class Branches(nn.Module):
    """Two layers side by side behind one norm; a scale, and two matrices of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.norm, self.act = nn.BatchNorm2d(8), nn.PReLU(8)
        self.scale = nn.Parameter(torch.ones(8))
        self.block = Block()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(torch.cat([self.left(x), self.right(x)], 1)))
        return self.head(self.block(x.mean((2, 3)) * self.scale))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(6, 16))
        self.out = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(F.linear(x, self.wide).relu(), self.back).relu())


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return randomised(Branches())


@pytest.mark.parametrize("name", ["norm", "norm.weight", "norm.running_mean", "act", "scale"])
def test_a_norm_stands_for_what_passes_through_it(net: nn.Module, name: str) -> None:
    plan = cpx.plan(net, IMAGES, remove={name: [1, 6]})
    small = plan.apply(net, verify="numeric")
    left, right = [0, 2, 3], [0, 1, 3]
    assert torch.equal(small.left.weight, net.left.weight[left])
    assert torch.equal(small.right.weight, net.right.weight[right])
    assert torch.equal(small.norm.weight, net.norm.weight[[0, 2, 3, 4, 5, 7]])
    assert plan.options["remove"] == {name: [1, 6]}


@pytest.mark.parametrize("name", ["left.weight", "left.bias", "left"])
def test_a_parameter_stands_for_its_own_channels(net: nn.Module, name: str) -> None:
    small = cpx.plan(net, IMAGES, remove={name: [1]}).apply(net, verify="numeric")
    assert torch.equal(small.left.weight, net.left.weight[[0, 2, 3]])
    assert small.right.out_channels == 4


def test_one_matrix_of_a_module_is_named(net: nn.Module) -> None:
    small = cpx.plan(net, IMAGES, remove={"block.back": [5]}).apply(net, verify="numeric")
    assert torch.equal(small.block.back, net.block.back[:5])
    small = cpx.plan(net, IMAGES, remove={"block.wide": [7]}).apply(net, verify="numeric")
    assert torch.equal(small.block.back, net.block.back[:, [i for i in range(16) if i != 7]])


@pytest.mark.parametrize("channel", [2, 10, 20])
def test_a_module_of_several_widths_is_refused(net: nn.Module, channel: int) -> None:
    message = r"channels along 'block.wide' \(dim 0\) and 'block.back' \(dim 0\); give the name"
    with pytest.raises(InvalidArgumentError, match=message):
        cpx.plan(net, IMAGES, remove={"block": [channel]})


def test_beyond_a_norm(net: nn.Module) -> None:
    with pytest.raises(InvalidArgumentError, match="it has channels 0 to 7, got 8"):
        cpx.plan(net, IMAGES, remove={"norm": [8]})

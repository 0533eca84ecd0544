"""Weights that a forward joins from several parameters: each of them makes its channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chanprune_ext as cpx


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 12)
        self.query, self.key, self.value = (nn.Parameter(torch.randn(8, 12)) for _ in range(3))
        self.offsets = nn.ParameterList([nn.Parameter(torch.randn(8)) for _ in range(3)])
        self.out = nn.Linear(8, 5)

    def attend(self, joined: Tensor) -> Tensor:
        q, k, v = joined.chunk(3, -1)
        return self.out(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)


class Joined(Base):
    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat([self.query, self.key, self.value])
        return self.attend(F.linear(self.inner(x).relu(), weight, torch.cat([*self.offsets])))


class JoinedAndTurned(Base):
    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat([self.query, self.key, self.value])
        return self.attend(self.inner(x).relu() @ weight.t())


class JoinedTwice(Base):
    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat([torch.cat([self.query, self.key]), self.value])
        return self.attend(F.linear(self.inner(x).relu(), weight))


class JoinedKernels(nn.Module):
    """Channels made by two kernels, side by side, and read by two others, stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(n, 3, 3, 3)) for n in (6, 10))
        self.c, self.d = (nn.Parameter(torch.randn(16, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, torch.cat([self.a, self.b])).relu()
        return F.conv2d(x, torch.stack([self.c, self.d]))


@pytest.mark.parametrize("make", [Joined, JoinedAndTurned, JoinedTwice])
def test_each_parameter_makes_its_channels(make: type[Base]) -> None:
    torch.manual_seed(0)
    model = make()
    plan = cpx.plan(model, torch.randn(2, 4, 5), 0.5)
    groups = {group.name: group for group in plan.groups}
    assert {"inner", "query", "value"} <= groups.keys()
    assert "out" in groups["value"].consumers
    for name in ("query", "key", "value"):
        assert {dim: len(index) for dim, index in plan.kept[name].items()} == {0: 4, 1: 6}
    pruned = plan.apply(model, verify="numeric")
    assert pruned.query.shape == pruned.value.shape == (4, 6)


def test_kernels_side_by_side_and_stacked() -> None:
    torch.manual_seed(0)
    model = JoinedKernels()
    plan = cpx.plan(model, torch.randn(2, 3, 6, 6), 0.5)
    pruned = plan.apply(model, verify="numeric")
    assert (len(pruned.a), len(pruned.b)) == (3, 5)
    assert pruned.c.shape == pruned.d.shape == (8, 1, 1)


class JoinedWithAnother(JoinedKernels):
    """The second kernel is computed from the input: only the first one is a parameter."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, torch.cat([self.a, self.b * x.mean().sigmoid()])).relu()
        return F.conv2d(x, torch.stack([self.c, self.d]))


def test_a_parameter_beside_what_is_computed() -> None:
    torch.manual_seed(0)
    model = JoinedWithAnother()
    plan = cpx.plan(model, torch.randn(2, 3, 6, 6), 0.5)
    assert len(plan.kept["a"][0]) == 3
    plan.apply(model, verify="numeric")

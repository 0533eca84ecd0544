"""One operation between two convolutions, and the things its rule can promise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from models import randomised, relative_error, run, zeroed
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext.analysis import analyse
from chanprune_ext.analysis.rules.registry import _RULES
from chanprune_ext.errors import NothingToPruneError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "WIDTH",
    "assert_needed",
    "assert_normalises",
    "assert_passes",
    "assert_stays",
    "between",
]

WIDTH = 8


class Between(nn.Module):
    """Convolution, an operation on [N, 8, 4, 6], convolution."""

    def __init__(self, operation: Callable[..., Tensor], width: int, parts: nn.Module) -> None:
        super().__init__()
        self.operation = operation
        self.parts = parts
        self.half = WIDTH // 2
        self.a = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.b = nn.Conv2d(width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.operation(self, self.a(x)))


class Parts(nn.Module):
    """Vectors and matrices as wide as the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.randn(WIDTH))
        self.matrix = nn.Parameter(torch.randn(WIDTH, 6))
        self.one = nn.Parameter(torch.randn(1))
        self.register_buffer("fixed", torch.rand(WIDTH) + 0.5)


def between(operation: Callable[..., Tensor]) -> tuple[nn.Module, Tensor]:
    """The network around ``operation``, whose second convolution is as wide as the result."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 4, 6)
    probe = Between(operation, 1, Parts())
    with torch.no_grad():
        channels = operation(probe, probe.a(images)).shape[1]
    return randomised(Between(operation, channels, Parts())), images


def assert_passes(operation: Callable[..., Tensor]) -> None:
    """All channels can go by themselves, and the result is exact."""
    model, images = between(operation)
    plan = cpx.plan(model, images, 0.5)
    assert plan.kept["a.weight"][0].shape == (WIDTH // 2,)
    assert not any(g.normalised for g in plan.groups)
    assert [f.entry for f in plan.frozen if f.entry in ("a.weight", "b.weight")] == ["b.weight"]
    before = run(zeroed(model, plan), images)
    assert before[0].abs().max() > 0
    assert relative_error(run(plan.apply(model), images), before) < 1e-9


def assert_normalises(operation: Callable[..., Tensor]) -> None:
    """Channels go; a statistic over them is then one over those that stay."""
    model, images = between(operation)
    plan = cpx.plan(model, images, 0.5)
    assert plan.kept["a.weight"][0].shape == (WIDTH // 2,)
    assert any(g.normalised for g in plan.groups)
    pruned = plan.apply(model)
    (output,) = run(pruned, images)
    # The formula itself, run on the kept channels of the original.
    with torch.no_grad():
        kept = plan.kept["a.weight"][0]
        x = model.double().a(images.double())[:, kept]
        middle = operation(model, x)
        expected = F.conv2d(middle, model.b.weight[:, kept], model.b.bias)
    assert relative_error([output], [expected]) < 1e-9


def assert_stays(operation: Callable[..., Any], reason: str) -> None:
    """Nothing of the first convolution may go, and the plan says why and where."""
    model, images = between(operation)
    told = [f for f in analyse(model, images).frozen if f.entry == "a.weight"]
    assert sum(f.channels for f in told) == WIDTH
    assert all(reason in f.why for f in told), [f.why for f in told]
    here = Path(operation.__code__.co_filename).name
    assert {f.source.split(":")[0] for f in told} == {here}
    with pytest.raises(NothingToPruneError):
        cpx.plan(model, images, 0.5)


def assert_needed(
    operation: Callable[..., Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the rule called ``name`` the channels stay, and that operation is named."""
    monkeypatch.delitem(_RULES, name)
    model, images = between(operation)
    told = [f for f in analyse(model, images).frozen if f.entry == "a.weight"]
    assert {f.op for f in told} == {name}
    assert all(f"no rule for {name}" in f.why for f in told)

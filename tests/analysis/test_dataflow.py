"""Training mode is followed only where it computes something else of something else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from models import randomised, relative_error, run, zeroed
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

import chanprune_ext as cpx
from chanprune_ext.analysis import analyse, trace

if TYPE_CHECKING:
    from collections.abc import Callable

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A residual block whose branch a subclass changes in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.c = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def branch(self, y: Tensor) -> Tensor:
        return F.dropout(y, 0.5, self.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.c(y + self.branch(self.norm(self.b(y))))


class StochasticDepth(Net):
    def branch(self, y: Tensor) -> Tensor:
        return stochastic_depth(y, 0.5, "row", self.training)


class DropPath(Net):
    def branch(self, y: Tensor) -> Tensor:
        if not self.training:
            return y
        kept = y.new_empty((y.shape[0], 1, 1, 1)).bernoulli_(0.5)
        return y * kept.div_(0.5)


class DropsChannels(Net):
    """Noise with a channel dimension: its size is one more thing that must follow."""

    def branch(self, y: Tensor) -> Tensor:
        if not self.training:
            return y
        return y * torch.rand(y.shape[0], y.shape[1], 1, 1)


class AnotherOperand(Net):
    """The same calls, of the same shapes, of another tensor."""

    def branch(self, y: Tensor) -> Tensor:
        z = y.relu()
        return (z if self.training else y).tanh()


class ScaledByWeight(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 8, 1, 1))

    def branch(self, y: Tensor) -> Tensor:
        return y * self.scale if self.training else y * 2


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], bool]:
    def follows(model: nn.Module) -> bool:
        seen: list[bool] = []
        original = trace._watch_training

        def watching(*args: object) -> None:
            seen.append(True)
            original(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(trace, "_watch_training", watching)
        analyse(model.eval(), X)
        return bool(seen)

    return follows


@pytest.mark.parametrize("kind", [Net, StochasticDepth, DropPath], ids=lambda kind: kind.__name__)
def test_noise_on_whole_values_needs_no_second_look(
    kind: type[Net], followed: Callable[[nn.Module], bool]
) -> None:
    assert not followed(kind())


@pytest.mark.parametrize(
    "kind", [DropsChannels, AnotherOperand, ScaledByWeight], ids=lambda kind: kind.__name__
)
def test_another_computation_is_followed(
    kind: type[Net], followed: Callable[[nn.Module], bool]
) -> None:
    assert followed(kind())


@pytest.mark.parametrize(
    "kind",
    [Net, StochasticDepth, DropPath, DropsChannels, AnotherOperand, ScaledByWeight],
    ids=lambda kind: kind.__name__,
)
def test_pruned_networks_are_exact_and_train(kind: type[Net]) -> None:
    torch.manual_seed(0)
    model = randomised(kind())
    plan = cpx.plan(model, X, 0.5)
    pruned = plan.apply(model)
    assert relative_error(run(pruned, X), run(zeroed(model, plan), X)) < 1e-9
    pruned.train()(X).sum().backward()
    assert all(p.grad is not None for n, p in pruned.named_parameters() if n != "scale")
    assert pruned.a.out_channels == 4

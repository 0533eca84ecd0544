"""Ways in which modules and forwards are put together."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from toy_registry import TOYS, Head, Toy, block, conv, toy


class _Pair(NamedTuple):
    logits: Tensor
    features: Tensor


@dataclass
class _Result:
    logits: Tensor
    hidden: Tensor | None = None


class _Backbone(nn.Module):
    """Hands over a dataclass, of which only a part is used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(3, 16), block(16, 24)

    def forward(self, x: Tensor) -> _Result:
        a = self.a(x)
        return _Result(self.b(a), hidden=a)


@toy()
class InnerDataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = _Backbone()
        self.join = block(40, 12, 1)
        self.head = Head(12)

    def forward(self, x: Tensor) -> dict[str, Any]:
        result = self.backbone(x)
        y = self.join(torch.cat([result.logits, result.hidden], 1))
        return {"pair": _Pair(self.head(y), result.hidden.sum((1, 2, 3)))}


@toy()
class MovingAverageCopy(nn.Module):
    """A second encoder follows the first one, as an average, in training (BYOL)."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Sequential(block(3, 16), conv(16, 12), nn.Flatten(2))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.project = nn.Linear(12, 4)

    @torch.no_grad()
    def _follow(self) -> None:
        for mine, theirs in zip(self.target.parameters(), self.online.parameters(), strict=True):
            mine.mul_(0.9).add_(theirs, alpha=0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            self._follow()
        online, target = self.online(x).mean(2), self.target(x).mean(2)
        return self.project(online), (online * target).sum(1)


def _materialised() -> nn.Module:
    model = nn.Sequential(
        nn.LazyConv2d(16, 3, padding=1),
        nn.LazyBatchNorm2d(),
        nn.ReLU(),
        nn.LazyConv2d(12, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.LazyLinear(20),
        nn.ReLU(),
        nn.LazyLinear(4),
    )
    with torch.no_grad():
        model(torch.randn(2, 3, 8, 8))
    return model


TOYS["LazyOnce"] = Toy("LazyOnce", _materialised)


class _Clipped(nn.Module):
    """Weights inside a box: each by itself."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.clamp(-0.5, 0.5)


class _Scaled(nn.Module):
    """A learnt gain for every output channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.gain.view(-1, *[1] * (weight.dim() - 1))


@toy()
class Parametrised(nn.Module):
    """Weights are computed from others, by one and by two parametrisations in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 16), conv(16, 12)
        parametrize.register_parametrization(self.a, "weight", _Clipped())
        parametrize.register_parametrization(self.b, "weight", _Clipped())
        parametrize.register_parametrization(self.b, "weight", _Scaled(12))
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.a(x)))))


@toy()
class AsksOneChannel(nn.Module):
    """One channel is cut out, but only to ask for its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(3, 16), block(16, 24)
        self.head = Head(24)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        n, h, w = a[:, 0].shape
        return self.head(self.b(a).reshape(n, -1, h, w))


@toy()
class BuffersOfState(nn.Module):
    """A module that writes into its own buffers and reads them again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(3, 16), block(16, 12)
        self.register_buffer("mean", torch.zeros(16))
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(a.mean((0, 2, 3)), 0.1)
        return self.head(self.b(a - self.mean.view(1, -1, 1, 1)))


@toy()
class UnequalChunks(nn.Module):
    """Three chunks of twenty channels: seven, seven and six."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 20)
        self.b = nn.ModuleList([conv(7, 8), conv(7, 8), conv(6, 8)])
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(sum(b(p) for b, p in zip(self.b, self.a(x).chunk(3, 1), strict=True)))

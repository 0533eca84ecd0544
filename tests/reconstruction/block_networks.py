"""Small networks of every kind of block, with their inputs."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from models import randomised
from torch import Tensor, nn

import chanprune_ext

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["NETWORKS", "images", "output_error", "pair"]


class Residual(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.relu(y)


class Bottleneck(nn.Module):
    def __init__(self, channels: int, inner: int, out: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, inner, 1)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1)
        self.expand = nn.Conv2d(inner, out, 1)
        self.skip = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(torch.relu(self.reduce(x))))
        return torch.relu(self.expand(y) + self.skip(x))


class Inverted(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Sequential(nn.Conv2d(channels, inner, 1), nn.ReLU6()),
            nn.Sequential(nn.Conv2d(inner, inner, 3, padding=1, groups=inner), nn.ReLU6()),
            nn.Conv2d(inner, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class TransformerLayer(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Classifier(nn.Module):
    """Stem, blocks, pooling, classifier."""

    def __init__(self, blocks: nn.Sequential, channels: int, out: int | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = blocks
        self.fc = nn.Linear(channels if out is None else out, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 2, stride=2)
        self.layers = nn.ModuleList([TransformerLayer(16, 32) for _ in range(2)])
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def _plain() -> nn.Module:
    convs = [nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.ReLU()) for _ in range(4)]
    return Classifier(nn.Sequential(*convs), 12)


def _residual() -> nn.Module:
    return Classifier(nn.Sequential(Residual(8, 12), Residual(8, 12)), 8)


def _bottleneck() -> nn.Module:
    return Classifier(nn.Sequential(Bottleneck(8, 8, 16), Bottleneck(16, 8, 16)), 8, 16)


def _inverted() -> nn.Module:
    return Classifier(nn.Sequential(Inverted(8, 24), Inverted(8, 24)), 8)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, float]]] = {
    "plain": (_plain, {"blocks.*": 0.25}),
    "residual": (_residual, {"blocks.*.conv1": 0.5}),
    "bottleneck": (_bottleneck, {"blocks.*.reduce": 0.4, "blocks.*.conv": 0.4}),
    "inverted": (_inverted, {"blocks.*.conv.0.0": 0.4}),
    "transformer": (Transformer, {"layers.*.mlp.0": 0.4}),
}
"""Name -> constructor, and what to prune of it."""


def images(count: int, seed: int = 0, side: int = 8) -> Tensor:
    """Smooth random images: neighbouring pixels are alike, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, side // 2, side // 2, generator=generator)
    return nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")


def pair(name: str, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """A network and its pruned copy, not compensated."""
    make, ratios = NETWORKS[name]
    torch.manual_seed(seed)
    model = randomised(make(), seed)
    with torch.no_grad():  # logits that tell the images apart
        list(model.children())[-1].weight.mul_(10)
    plan = chanprune_ext.plan(model, images(2), ratio=0, ratios=ratios)
    return plan.apply(copy.deepcopy(model)), model


@torch.no_grad()
def output_error(pruned: nn.Module, original: nn.Module, inputs: Tensor) -> float:
    """Mean KL divergence of the class probabilities, written out."""
    p, q = (model.eval()(inputs).double().softmax(1) for model in (original, pruned))
    return float((p * (p.log() - q.log())).sum(1).mean())

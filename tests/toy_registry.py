"""What every toy network is registered as, and the parts most of them are built from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["TOYS", "Head", "Toy", "block", "conv", "images", "toy"]


@dataclass(frozen=True)
class Toy:
    """One nasty network.

    Attributes:
        make: Builds the module.
        inputs: Builds its example inputs.
        expects: ``"exact"``, ``"normalised"`` or ``"frozen"``.
        kept_whole: Weights whose output channels must all stay.
        reason: What the frozen entry of those weights must mention.
        min_removed: Least fraction of the parameters that must go at ratio 0.5.
        also_kept: Reasons for which other channels may stay, besides being the output.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any] = field(default=lambda: torch.randn(2, 3, 8, 8))
    expects: str = "exact"
    kept_whole: tuple[str, ...] = ()
    reason: str = ""
    min_removed: float = 0.25
    also_kept: tuple[str, ...] = ()


TOYS: dict[str, Toy] = {}


def toy(**settings: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a module class under its own name."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        assert cls.__name__ not in TOYS, f"two toys are called {cls.__name__}"
        TOYS[cls.__name__] = Toy(cls.__name__, cls, **settings)
        return cls

    return register


def images(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def conv(i: int, o: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def block(i: int, o: int, k: int = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(conv(i, o, k, bias=False, **options), nn.BatchNorm2d(o), nn.ReLU())


class Head(nn.Module):
    """Global pooling and a classifier: what most toys end in."""

    def __init__(self, channels: int, classes: int = 5) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))

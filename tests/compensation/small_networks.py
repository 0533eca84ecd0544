"""Small networks and a plain way of cutting channels out, for the compensation tests."""

from __future__ import annotations

import copy
import threading
from types import SimpleNamespace

import torch
from torch import Tensor, nn

KEEP = [0, 2, 3, 6]  # inner channels that the pair of residual networks keeps


def cut(
    model: nn.Module, kept: dict[str, dict[int, list[int]]]
) -> tuple[nn.Module, SimpleNamespace]:
    """A copy of ``model`` with only the kept indices, and something with a plan's ``kept``."""
    pruned = copy.deepcopy(model)
    indices = {e: {d: torch.tensor(i) for d, i in dims.items()} for e, dims in kept.items()}
    for entry, dims in indices.items():
        path, _, name = entry.rpartition(".")
        module = pruned.get_submodule(path)
        tensor = getattr(module, name)
        value = tensor.detach()
        for dim, index in dims.items():
            value = value.index_select(dim, index)
        value = value.clone()
        setattr(module, name, nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value)
        if getattr(module, "groups", 1) > 1 and name == "weight":
            module.groups = value.shape[0] // (tensor.shape[0] // module.groups)
    return pruned, SimpleNamespace(kept=indices)


def rows(*names: str, keep: list[int]) -> dict[str, dict[int, list[int]]]:
    """Kept output channels of several entries."""
    return {name: {0: keep} for name in names}


def duplicate_channels(weight: Tensor, bias: Tensor | None, half: int) -> None:
    """Makes output channels ``half:`` positive multiples of those before."""
    factors = torch.linspace(0.5, 2.0, half, dtype=weight.dtype)
    with torch.no_grad():
        weight[half:] = weight[:half] * factors.view(-1, *[1] * (weight.ndim - 1))
        if bias is not None:
            bias[half:] = bias[:half] * factors


def seeded_norm(channels: int, cls: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """A batch norm whose statistics and weights are not the trivial ones."""
    norm = cls(channels)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return norm


class ResidualBlock(nn.Module):
    """conv-norm-relu-conv-norm plus a skip, then ReLU; with or without a projection in the skip."""

    def __init__(self, channels: int, inner: int, out: int | None = None) -> None:
        super().__init__()
        out = out or channels
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.bn1 = seeded_norm(inner)
        self.conv2 = nn.Conv2d(inner, out, 3, padding=1, bias=False)
        self.bn2 = seeded_norm(out)
        self.skip = nn.Conv2d(channels, out, 1, bias=False) if out != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.skip(x)
        return torch.relu_(y)


class ResidualNet(nn.Module):
    """Stem, residual blocks, pooling, classifier."""

    def __init__(self, blocks: int = 3, channels: int = 6, inner: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(channels, inner) for _ in range(blocks))
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def cut_blocks(net: ResidualNet, keep: list[int]) -> tuple[nn.Module, SimpleNamespace]:
    """Keeps the inner channels ``keep`` of every block."""
    kept: dict[str, dict[int, list[int]]] = {}
    for i in range(len(net.blocks)):
        name = f"blocks.{i}"
        kept |= rows(
            f"{name}.conv1.weight",
            *(f"{name}.bn1.{part}" for part in ("weight", "bias", "running_mean", "running_var")),
            keep=keep,
        )
        kept[f"{name}.conv2.weight"] = {1: keep}
    return cut(net, kept)


class ConcatNet(nn.Module):
    """Two branches put together, as in a dense block or an inception block."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 6, 3, padding=1)
        self.right = nn.Conv2d(3, 4, 1)
        self.mix = nn.Conv2d(10, 7, 3, bias=False)
        self.norm = seeded_norm(7)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
        return torch.tanh(self.norm(self.mix(both)))


class InvertedResidual(nn.Module):
    """Expansion, depthwise, projection without a non-linearity behind it, and a sum."""

    def __init__(self, channels: int = 4, hidden: int = 8) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm1 = seeded_norm(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.norm2 = seeded_norm(hidden)
        self.project = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm3 = seeded_norm(channels)
        self.act = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.expand(x)))
        y = self.act(self.norm2(self.depthwise(y)))
        return x + self.norm3(self.project(y))


def images(count: int = 60, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def error(pruned: nn.Module, original: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        y = original.eval()(x)
        return float((pruned.eval()(x) - y).norm() / y.norm())


def no_forward_is_left() -> bool:
    return not [t for t in threading.enumerate() if t.name == "chanprune-forward"]

"""Random networks: a directed graph of layers and bare tensor operations over a few channels.

The graph is drawn through one function ``choose(options)``, so that the same code serves hypothesis
(which shrinks a failing network to a small one) and plain random seeds (which run faster).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RandomNet", "random_net"]

Choose = Callable[[Sequence[Any]], Any]
SIDE = 4  # every map is SIDE x SIDE


class Step(nn.Module):
    """One step: reads some values of the table, appends new ones."""

    def __init__(self, reads: Sequence[int]) -> None:
        super().__init__()
        self.reads = tuple(reads)
        # Positions in the table are no widths; a string keeps them out of the size equations.
        self.reads_text = ",".join(map(str, reads))
        del self.reads

    def forward(self, table: list[Tensor]) -> list[Tensor]:
        return self.compute(*(table[int(i)] for i in self.reads_text.split(",")))

    def compute(self, *values: Tensor) -> list[Tensor]:
        raise NotImplementedError


class Layer(Step):
    """A module on one value, with or without batch norm and an activation behind it."""

    def __init__(self, reads: Sequence[int], layer: nn.Module, width: int, tail: str) -> None:
        super().__init__(reads)
        self.layer = layer
        self.norm = nn.BatchNorm2d(width) if "n" in tail else nn.Identity()
        self.act = nn.ReLU(inplace="i" in tail) if "r" in tail else nn.Identity()

    def compute(self, x: Tensor) -> list[Tensor]:
        return [self.act(self.norm(self.layer(x)))]


class Formula(Step):
    """A function of the values and of this step's own attributes and parameters."""

    def __init__(self, reads: Sequence[int], formula: Callable[..., Any], **parts: Any) -> None:
        super().__init__(reads)
        self.formula = formula
        for name, part in parts.items():
            setattr(self, name, part)

    def compute(self, *values: Tensor) -> list[Tensor]:
        result = self.formula(self, *values)
        return list(result) if isinstance(result, (tuple, list)) else [result]


class RandomNet(nn.Module):
    """Steps over a table of values; some of the values are read out by linear heads."""

    def __init__(self, steps: list[Step], heads: list[tuple[int, nn.Module, bool]]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.heads = nn.ModuleList(h for _, h, _ in heads)
        self.plan = ";".join(f"{i},{int(flat)}" for i, _, flat in heads)

    def forward(self, x: Tensor) -> Tensor:
        table = [x]
        for step in self.steps:
            table.extend(step(table))
        out: Any = 0
        for head, spec in zip(self.heads, self.plan.split(";"), strict=True):
            index, flat = spec.split(",")
            value = table[int(index)]
            out = out + head(value.flatten(1) if flat == "1" else value.mean((2, 3)))
        return out


def _divisors(*numbers: int) -> list[int]:
    return [d for d in range(1, min(numbers) + 1) if all(n % d == 0 for n in numbers)]


def _shuffle(self: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def _gate(self: Any, x: Tensor) -> Tensor:
    n, c = x.shape[:2]
    return x * self.up(F.relu(self.down(x.mean((2, 3))))).sigmoid().view(n, c, 1, 1)


def _mix_last(self: Any, x: Tensor) -> Tensor:
    return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _half(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    half = x.shape[1] // 2
    return x[:, :half], x[:, half:]


def _pad(self: Any, x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, self.front, self.back))


def _written(self: Any, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x[:, : self.cut] += y[:, : self.cut]
    return x


def _affinity(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(q.flatten(2).transpose(1, 2) @ k.flatten(2), -1)
    return (v.flatten(2) @ weights).view_as(v)


def _raised(self: Any, x: Tensor) -> Tensor:
    """A copy changed through a view of it."""
    x = x.clone()
    x[:, : self.cut].add_(1)
    return x


class _Builder:
    def __init__(self, choose: Choose, images: int) -> None:
        self.choose = choose
        self.widths = [images]
        self.steps: list[Step] = []
        self.convs: list[tuple[nn.Module, int, int]] = []

    def pick(self, *, narrow: int = 64) -> int:
        """A value, later ones more often, not wider than ``narrow``."""
        fit = [i for i, w in enumerate(self.widths) if w <= narrow]
        return self.choose(fit[-4:] + fit[1:] if len(fit) > 1 else fit)

    def pick_like(self, index: int) -> int:
        width = self.widths[index]
        return self.choose([i for i, w in enumerate(self.widths) if w == width])

    def add(self, step: Step, *widths: int) -> None:
        self.steps.append(step)
        self.widths.extend(widths)

    def layer(self, reads: int, layer: nn.Module, width: int) -> None:
        self.add(Layer([reads], layer, width, self.choose(["nr", "n", "r", "nri", ""])), width)

    # -- one method per kind of step ---------------------------------------------------------

    def conv(self) -> None:
        i = self.pick()
        width, k = self.choose([4, 6, 8, 12]), self.choose([1, 3])
        groups = self.choose(_divisors(self.widths[i], width))
        conv = nn.Conv2d(
            self.widths[i], width, k, padding=k // 2, groups=groups, bias=self.choose([True, False])
        )
        self.convs.append((conv, self.widths[i], width))
        self.layer(i, conv, width)

    def plain_conv(self) -> None:
        i = self.pick()
        width = self.choose([4, 6, 8, 12])
        conv = nn.Conv2d(self.widths[i], width, 3, padding=1)
        self.convs.append((conv, self.widths[i], width))
        self.layer(i, conv, width)

    def matching_conv(self) -> None:
        """A convolution as wide as some value, so that sums are possible."""
        i, j = self.pick(), self.pick()
        width = self.widths[j]
        self.layer(i, nn.Conv2d(self.widths[i], width, 1), width)

    def depthwise(self) -> None:
        i = self.pick(narrow=16)
        c = self.widths[i]
        width = c * self.choose([1, 1, 2])
        self.layer(i, nn.Conv2d(c, width, 3, padding=1, groups=c), width)

    def transposed(self) -> None:
        i = self.pick()
        width = self.choose([4, 6, 8])
        groups = self.choose(_divisors(self.widths[i], width))
        layer = nn.ConvTranspose2d(self.widths[i], width, 3, padding=1, groups=groups)
        self.layer(i, layer, width)

    def shared(self) -> None:
        fitting = [
            (conv, o, i)
            for conv, c, o in self.convs
            for i, w in enumerate(self.widths)
            if w == c and i
        ]
        if fitting:
            conv, width, i = self.choose(fitting)
            self.layer(i, conv, width)

    def plus(self) -> None:
        i = self.pick()
        j = self.pick_like(i)
        self.add(Formula([i, j], lambda self, a, b: a + b), self.widths[i])

    def times(self) -> None:
        i = self.pick()
        j = self.pick_like(i)
        self.add(Formula([i, j], lambda self, a, b: a * b.sigmoid()), self.widths[i])

    def joined(self) -> None:
        parts = [self.pick(narrow=16) for _ in range(self.choose([2, 2, 3]))]
        width = sum(self.widths[i] for i in parts)
        self.add(Formula(parts, lambda self, *v: torch.cat(v, 1)), width)

    def chunked(self) -> None:
        i = self.pick()
        pieces = self.choose([p for p in (2, 3, 4) if self.widths[i] % p == 0] or [1])
        width = self.widths[i] // pieces
        self.add(Formula([i], lambda self, x: x.chunk(pieces, 1)), *[width] * pieces)

    def split(self) -> None:
        i = self.pick()
        if self.widths[i] >= 2:
            cut = self.choose(range(1, self.widths[i]))
            sizes = [cut, self.widths[i] - cut]
            self.add(Formula([i], lambda self, x: x.split(self.sizes, 1), sizes=sizes), *sizes)

    def sliced(self) -> None:
        i = self.pick()
        if self.widths[i] >= 2:
            cut = self.choose(range(1, self.widths[i]))
            step = Formula([i], lambda self, x: (x[:, : self.cut], x[:, self.cut :]), cut=cut)
            self.add(step, cut, self.widths[i] - cut)

    def halved(self) -> None:
        i = self.pick()
        if self.widths[i] >= 2:
            half = self.widths[i] // 2
            self.add(Formula([i], _half), half, self.widths[i] - half)

    def written(self) -> None:
        i = self.pick()
        if self.widths[i] >= 2:
            cut = self.choose(range(1, self.widths[i]))
            self.add(Formula([i, self.pick_like(i)], _written, cut=cut), self.widths[i])

    def shuffled(self) -> None:
        i = self.pick()
        groups = self.choose(_divisors(self.widths[i]))
        self.add(Formula([i], _shuffle, groups=groups), self.widths[i])

    def pooled(self) -> None:
        i = self.pick()
        layer = self.choose([nn.MaxPool2d, nn.AvgPool2d])(3, stride=1, padding=1)
        self.add(Formula([i], lambda self, x: self.layer(x), layer=layer), self.widths[i])

    def gated(self) -> None:
        i = self.pick()
        c, inner = self.widths[i], self.choose([2, 4])
        self.add(Formula([i], _gate, down=nn.Linear(c, inner), up=nn.Linear(inner, c)), c)

    def vector(self) -> None:
        i = self.pick()
        c = self.widths[i]
        scale, shift = nn.Parameter(torch.rand(c) + 0.5), nn.Parameter(torch.randn(1, c, 1, 1))
        formula = lambda self, x: x * self.scale[:, None, None] + self.shift  # noqa: E731
        self.add(Formula([i], formula, scale=scale, shift=shift), c)

    def prelu(self) -> None:
        i = self.pick()
        c = self.widths[i]
        self.add(Formula([i], lambda self, x: self.act(x), act=nn.PReLU(c)), c)

    def padded(self) -> None:
        i = self.pick(narrow=12)
        front, back = self.choose([0, 1, 2]), self.choose([0, 2, 3])
        self.add(Formula([i], _pad, front=front, back=back), self.widths[i] + front + back)

    def glu(self) -> None:
        i = self.pick()
        if self.widths[i] % 2 == 0:
            self.add(Formula([i], lambda self, x: F.glu(x, 1)), self.widths[i] // 2)

    def unshuffled(self) -> None:
        i = self.pick(narrow=4)
        formula = lambda self, x: F.interpolate(F.pixel_unshuffle(x, 2), scale_factor=2)  # noqa: E731
        self.add(Formula([i], formula), self.widths[i] * 4)

    def pixel_shuffled(self) -> None:
        i = self.pick()
        if self.widths[i] % 4 == 0:
            formula = lambda self, x: F.avg_pool2d(F.pixel_shuffle(x, 2), 2)  # noqa: E731
            self.add(Formula([i], formula), self.widths[i] // 4)

    def turned(self) -> None:
        i = self.pick()
        self.add(Formula([i], lambda self, x: x.flip(1)), self.widths[i])

    def repeated(self) -> None:
        i = self.pick(narrow=8)
        self.add(Formula([i], lambda self, x: x.repeat(1, 2, 1, 1)), self.widths[i] * 2)

    def stacked(self) -> None:
        i = self.pick()
        j = self.pick_like(i)
        self.add(Formula([i, j], lambda self, a, b: torch.stack([a, b]).sum(0)), self.widths[i])

    def mixed_last(self) -> None:
        i = self.pick()
        width = self.choose([4, 6, 8])
        self.add(Formula([i], _mix_last, linear=nn.Linear(self.widths[i], width)), width)

    def summed(self) -> None:
        """A sum over channels, which are zero where they are zeroed or not."""
        i, j = self.pick(), self.pick()
        change = self.choose([F.relu, torch.sigmoid, torch.tanh, F.softplus, torch.square])
        formula = lambda self, a, b: change(a).sum(1, keepdim=True) / 8 + b  # noqa: E731
        self.add(Formula([i, j], formula), self.widths[j])

    def affine(self) -> None:
        i = self.pick()
        change = self.choose([torch.sigmoid, lambda x: x + 1, lambda x: 2 * x, torch.cos])
        self.add(Formula([i], lambda self, x: change(x)), self.widths[i])

    def raised(self) -> None:
        i = self.pick()
        if self.widths[i] >= 2:
            cut = self.choose(range(1, self.widths[i]))
            self.add(Formula([i], _raised, cut=cut), self.widths[i])

    def affinity(self) -> None:
        i, v = self.pick(narrow=16), self.pick()
        self.add(Formula([i, self.pick_like(i), v], _affinity), self.widths[v])

    def computed_kernel(self) -> None:
        i = self.pick()
        width = self.choose([4, 6, 8])
        change = self.choose([torch.sigmoid, torch.tanh, lambda w: w - w.mean(1, keepdim=True)])
        kernel = nn.Parameter(torch.randn(width, self.widths[i], 1, 1) / 2)
        formula = lambda self, x: F.conv2d(x, change(self.kernel))  # noqa: E731
        self.add(Formula([i], formula, kernel=kernel), width)

    def cut_to_one(self) -> None:
        """One channel scales all of another value."""
        i, j = self.pick(), self.pick()
        self.add(Formula([i, j], lambda self, a, b: a[:, : self.one] * b, one=1), self.widths[j])


_KINDS = [
    *["plain_conv"] * 4,
    *["conv"] * 3,
    *["matching_conv"] * 2,
    *["plus"] * 3,
    *["joined"] * 2,
    *["chunked", "split", "sliced", "halved", "written", "shuffled", "depthwise", "transposed"],
    *["shared", "times", "pooled", "gated", "vector", "prelu", "padded", "glu", "unshuffled"],
    *["summed", "affine", "raised", "affinity", "computed_kernel"],
    *["pixel_shuffled", "turned", "repeated", "stacked", "mixed_last", "cut_to_one"],
]


def random_net(choose: Choose, steps: int) -> RandomNet:
    """Draw a network of about ``steps`` steps.

    Args:
        choose: Picks one of a sequence of options.
        steps: Number of steps after the stem.
    """
    build = _Builder(choose, 3)
    build.plain_conv()
    for _ in range(steps):
        getattr(build, choose(_KINDS))()
    heads = []
    read = {int(i) for step in build.steps for i in step.reads_text.split(",")}
    for i in range(1, len(build.widths)):
        # Everything that nothing else reads goes out, so that no step is dead.
        if i not in read:
            flat = choose([True, False])
            size = build.widths[i] * (SIDE * SIDE if flat else 1)
            heads.append((i, nn.Linear(size, 3), flat))
    return RandomNet(build.steps, heads)

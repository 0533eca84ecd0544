"""Sizes that code computes from attributes: which number changes, and what must stay in step."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from models import randomised, relative_error, run, zeroed
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext import surgery
from chanprune_ext.allocation.links import pinned_groups, solve_linked_counts
from chanprune_ext.analysis import analyse
from chanprune_ext.errors import ChanpruneError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chanprune_ext.analysis import CouplingGroup

LENGTH = 7


class Heads(nn.Module):
    """Four heads of width six; how they are cut out and joined again is given."""

    def __init__(
        self,
        cut: Callable[[Any, Tensor], Tensor],
        join: Callable[[Any, Tensor], Tensor],
        **attributes: Any,
    ) -> None:
        super().__init__()
        self.cut, self.join = cut, join
        for name, value in attributes.items():
            setattr(self, name, value)
        self.stem = nn.Linear(5, 24)
        self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))
        self.o, self.out = nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        q, k, v = (self.cut(self, layer(x)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = ((q @ k.mT * 0.3).softmax(-1) @ v).transpose(1, 2)
        return self.out(x + self.o(self.join(self, y)))


def flat(m: Any, y: Tensor) -> Tensor:
    return y.flatten(2)


def checked(m: Any, z: Tensor) -> Tensor:
    assert m.embed == m.heads * m.width, "heads do not fill the width"
    return z.view(2, LENGTH, m.heads, m.width)


def remainder(m: Any, z: Tensor) -> Tensor:
    if m.dim % m.heads:
        raise ValueError("heads do not divide the width")
    return z.view(2, LENGTH, m.heads, m.dim // m.heads)


Style = tuple[
    "Callable[[Any, Tensor], Tensor]",
    "Callable[[Any, Tensor], Tensor]",
    dict[str, Any],
    dict[str, Any],
    dict[str, Any],
]

# How it is written, its attributes, and what they are with half of the heads or half their width.
STYLES: dict[str, Style] = {
    "two attributes": (
        lambda m, z: z.view(2, LENGTH, m.heads, m.width),
        lambda m, y: y.reshape(2, LENGTH, m.heads * m.width),
        {"heads": 4, "width": 6},
        {"heads": 2, "width": 6},
        {"heads": 4, "width": 3},
    ),
    "a list": (
        lambda m, z: z.view(2, LENGTH, m.sizes[0], m.sizes[1]),
        lambda m, y: y.reshape(2, LENGTH, m.sizes[0] * m.sizes[1]),
        {"sizes": [4, 6]},
        {"sizes": [2, 6]},
        {"sizes": [4, 3]},
    ),
    "a quotient of two unknowns": (
        lambda m, z: z.view(2, LENGTH, m.heads, m.dim // m.heads),
        lambda m, y: y.reshape(2, LENGTH, m.dim),
        {"heads": 4, "dim": 24},
        {"heads": 2, "dim": 12},
        {"heads": 4, "dim": 12},
    ),
    "a quotient without remainder": (
        remainder,
        lambda m, y: y.reshape(2, LENGTH, m.dim),
        {"heads": 4, "dim": 24},
        {"heads": 2, "dim": 12},
        {"heads": 4, "dim": 12},
    ),
    "a number of heads computed from widths": (
        lambda m, z: z.view(2, LENGTH, m.embed // m.width, m.width),
        flat,
        {"embed": 24, "width": 6},
        {"embed": 12, "width": 6},
        {"embed": 12, "width": 3},
    ),
    "a product that is checked": (
        checked,
        lambda m, y: y.reshape(2, LENGTH, m.embed),
        {"embed": 24, "heads": 4, "width": 6},
        {"embed": 12, "heads": 2, "width": 6},
        {"embed": 12, "heads": 4, "width": 3},
    ),
    "one open size": (
        lambda m, z: z.unflatten(-1, (m.heads, -1)),
        flat,
        {"heads": 4},
        {"heads": 2},
        {"heads": 4},
    ),
}


def made(style: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    cut, join, attributes, *_ = STYLES[style]
    model = randomised(Heads(cut, join, **attributes).double())
    return model, torch.randn(2, LENGTH, 5, dtype=torch.float64)


def check(model: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    """The pruned model; it equals the zeroed one, and the original keeps its attributes."""
    before = {k: v for k, v in vars(model).items() if not k.startswith("_")}
    plan = cpx.plan(model, x, 0.5, **options)
    pruned = plan.apply(model)
    assert not any(g.normalised for g in plan.groups)
    assert relative_error(run(pruned, x), run(zeroed(model, plan), x)) < 1e-9
    assert {k: v for k, v in vars(model).items() if not k.startswith("_")} == before
    return pruned


@pytest.mark.parametrize("style", STYLES)
def test_half_of_the_heads(style: str) -> None:
    pruned = check(*made(style), kinds=("heads",))
    assert pruned.q.weight.shape == (12, 24)
    assert {k: getattr(pruned, k) for k in STYLES[style][3]} == STYLES[style][3]
    assert all(type(getattr(pruned, k)) is type(v) for k, v in STYLES[style][3].items())


@pytest.mark.parametrize("style", STYLES)
def test_half_of_their_width(style: str) -> None:
    pruned = check(*made(style), kinds=("head_dim",))
    assert pruned.v.weight.shape == pruned.q.weight.shape == (12, 24)
    assert {k: getattr(pruned, k) for k in STYLES[style][4]} == STYLES[style][4]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.7])
def test_other_ratios_end_at_whole_numbers(style: str, ratio: float) -> None:
    """Everything at once: the counts that come out satisfy all sizes, and nothing is held back."""
    model, x = made(style)
    plan = cpx.plan(model, x, ratio)
    assert {f.why for f in plan.frozen} == {"the model's output"}
    assert plan.params_after < plan.params_before
    assert relative_error(run(plan.apply(model), x), run(zeroed(model, plan), x)) < 1e-9


class Reshaped(nn.Module):
    """Channels are laid out by what ``shape`` computes from sizes and attributes."""

    def __init__(self, shape: Callable[[Any, Tensor], tuple[int, ...]], **attributes: int) -> None:
        super().__init__()
        self.shape = shape
        for name, value in attributes.items():
            setattr(self, name, value)
        self.a, self.b = nn.Linear(5, 24), nn.Linear(24, 16)
        self.c, self.out = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).relu()
        a = (a.view(self.shape(self, a)) * 2).view(a.shape)
        return self.out(self.c(self.b(a).relu()).relu())


def reshaped(shape: Callable[[Any, Tensor], tuple[int, ...]], **attributes: int) -> Any:
    torch.manual_seed(0)
    return randomised(Reshaped(shape, **attributes).double()), torch.randn(4, 5).double()


@pytest.mark.parametrize("name", ["dim", "width", "n"])
def test_an_attribute_may_be_called_anything(name: str) -> None:
    """Torch's own modules call an axis ``dim``; here it is a width."""
    model, x = reshaped(lambda m, a: (-1, getattr(m, name)), **{name: 24})
    pruned = check(model, x)
    assert getattr(pruned, name) == 12
    assert pruned.a.weight.shape[0] == 12


def test_an_axis_of_a_torch_module_is_not_a_width() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(5, 24), nn.Linear(24, 3)
            self.soft, self.cut = nn.Softmax(dim=1), nn.Flatten(1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.out(y * self.soft(y.T).T)

    torch.manual_seed(0)
    pruned = check(randomised(Sorted().double()), torch.randn(4, 5).double(), kinds=None)
    assert pruned.soft.dim == 1
    assert pruned.cut.start_dim == 1


def test_a_bound_attribute_stays() -> None:
    """A number that is also a fixed number of positions cannot follow the channels."""

    def shape(m: Any, a: Tensor) -> tuple[int, ...]:
        torch.zeros(m.parts, 1).view(24, 1)
        return (4, m.parts)

    model, x = reshaped(shape, parts=24)
    plan = cpx.plan(model, x, 0.5)
    assert 0 not in plan.kept.get("a.weight", {})
    assert plan.kept["b.weight"][0].shape == (8,)
    assert any(f.entry == "a.weight" and f.source.startswith("test_links.py") for f in plan.frozen)


def test_sizes_found_different_stay_different() -> None:
    """Half of 24 would be 12, for which the forward takes another path."""

    def shape(m: Any, a: Tensor) -> tuple[int, ...]:
        return (4, a.shape[1]) if a.shape[1] != m.small else (4, 1, a.shape[1])

    model, x = reshaped(shape, small=12)
    plan = cpx.plan(model, x, 0.5)
    kept = plan.kept.get("a.weight", {}).get(0, torch.arange(24))
    assert len(kept) != 12
    assert plan.kept["b.weight"][0].shape == (8,)
    assert relative_error(run(plan.apply(model), x), run(zeroed(model, plan), x)) < 1e-9


class Looping(nn.Module):
    """As many steps as there are groups of six channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        for _ in range(a.shape[1] // 6):
            a = a.sin()
        return self.b(a)


def test_a_loop_over_a_width_keeps_its_length() -> None:
    """The plan that would shorten it is refused; what lies outside that module is pruned."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 5), Looping(), nn.ReLU(), nn.Linear(16, 12), nn.Linear(12, 3)
    )
    model, x = randomised(model.double()), torch.randn(4, 5).double()
    plan = cpx.plan(model, x, 0.5)
    assert 0 not in plan.kept.get("1.a.weight", {})
    assert plan.kept["3.weight"][0].shape == (6,)
    (told,) = [f for f in plan.frozen if f.entry == "1.a.weight"]
    assert told.module.startswith("1")
    assert "the pruned model" in told.why
    assert relative_error(run(plan.apply(model), x), run(zeroed(model, plan), x)) < 1e-9


def test_what_cannot_be_solved_is_refused_in_words() -> None:
    """The only group would end at a width that the forward tells apart."""

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            return self.out(a if a.shape[1] != 4 else a * 2)

    with pytest.raises(ChanpruneError, match="different"):
        cpx.plan(Narrow(), torch.randn(4, 5), 0.5)


class Configured(nn.Module):
    """Attention that reads the number of its heads from an object or a dict for all layers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.width = config, 6
        self.qkv, self.o = nn.Linear(5, 3 * 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).split(self.heads() * self.width, -1)
        q, k, v = (z.unflatten(-1, (-1, self.width)).transpose(1, 2) for z in parts)
        y = ((q @ k.mT * 0.3).softmax(-1) @ v).transpose(1, 2)
        return x + self.o(y.flatten(2))

    def heads(self) -> int:
        return heads_of(self.config)


def heads_of(config: Any) -> int:
    heads: int = config["heads"] if isinstance(config, dict) else config.heads
    return heads


@dataclass(frozen=True)
class Frozen:
    heads: int = 4
    layers: int = 2


class Plain:
    def __init__(self) -> None:
        self.heads, self.layers = 4, 2


@pytest.mark.parametrize(
    "kind", [Frozen, Plain, lambda: SimpleNamespace(heads=4), lambda: {"heads": 4, 7: 1, "a b": 2}]
)
def test_numbers_of_settings_follow(kind: Callable[[], Any], tmp_path: Path) -> None:
    config, x = kind(), torch.randn(2, LENGTH, 5)
    model, other = (nn.Sequential(*(Configured(config) for _ in range(2))).eval() for _ in "ab")
    plan = cpx.plan(model, x, 0.5, kinds=("heads",))
    assert {(str(a), a.value): n for a, n in plan.attributes.items()} == {("0.config.heads", 4): 2}
    small = plan.apply(model, verify="numeric")
    assert [heads_of(layer.config) for layer in small] == [2, 2]
    assert small[0].config is small[1].config
    assert type(small[0].config) is type(config)
    cpx.save(small, tmp_path / "small.safetensors")
    fresh = nn.Sequential(*(Configured(config) for _ in range(2))).eval()
    assert torch.equal(cpx.load(tmp_path / "small.safetensors", fresh)(x), small(x))
    assert torch.equal(plan.apply(model, inplace=True)(x), small(x))
    assert heads_of(model[1].config) == 2
    # What other models share stays as it was.
    assert heads_of(config) == 4
    assert other[0].config is config
    assert other(x).shape == x.shape
    with pytest.raises(ChanpruneError, match=r"0\.config\.heads is 3, the plan expects 4"):
        plan.apply(nn.Sequential(*(Configured(SimpleNamespace(heads=3)) for _ in range(2))))


class Held(nn.Module):
    """Attention whose settings the outer module holds too, within its own."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.inner = config, Configured(config.inner)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y * (self.config.inner.heads == heads_of(self.inner.config))


class Nested(Configured):
    """Attention whose settings are within others', and held by no module alone."""

    def heads(self) -> int:
        return heads_of(self.config.inner)


@pytest.mark.parametrize(
    ("kind", "name"), [(Held, "inner.config.heads"), (Nested, "config.inner.heads")]
)
def test_settings_within_settings_follow(kind: Callable[[Any], nn.Module], name: str) -> None:
    config, x = SimpleNamespace(inner=Plain(), other=SimpleNamespace()), torch.randn(2, LENGTH, 5)
    config.other.outer, config.rest = config, SimpleNamespace(layers=2)  # no end
    model = kind(config).eval()
    plan = cpx.plan(model, x, 0.5, kinds=("heads",))
    assert [str(a) for a in plan.attributes] == [name]
    small = plan.apply(model, verify="numeric")
    assert small.config.inner.heads == 2
    assert small(x).abs().max() > 0
    plan.apply(model, inplace=True)
    assert model.config.inner.heads == 2
    # What other models share stays as it was.
    assert config.inner.heads == 4
    assert config.other.outer is config
    assert model.config.other.outer is model.config
    assert model.config.rest is config.rest


def test_settings_are_put_back_where_a_cut_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    config, x = Plain(), torch.randn(2, LENGTH, 5)
    model = nn.Sequential(Configured(config), Configured(config)).eval()
    plan = cpx.plan(model, x, 0.5, kinds=("heads",))
    monkeypatch.setattr(surgery, "verify_runs", broken)
    with pytest.raises(ZeroDivisionError):
        plan.apply(model, inplace=True)
    assert model[0].config is model[1].config is config
    assert config.heads == 4
    assert model(x).shape == x.shape


def broken(*_: Any) -> None:
    raise ZeroDivisionError


class Deep(nn.Module):
    """Many blocks whose heads are cut by attributes of their own, each with a wide layer beside."""

    def __init__(self, blocks: int, wide: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Heads(remainder, flat, heads=4, dim=24) for _ in range(blocks))
        self.wide = nn.ModuleList(nn.Linear(3, wide) for _ in range(blocks))
        self.back = nn.ModuleList(nn.Linear(wide, 5) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block, wide, back in zip(self.blocks, self.wide, self.back, strict=True):
            x = x + back(wide(block(x)).relu())
        return x


def test_memory_does_not_grow_with_links_times_widths() -> None:
    blocks, wide = 12, 20_000
    with torch.device("meta"):
        model = Deep(blocks, wide)
    analysis = analyse(model, torch.empty(2, LENGTH, 5, device="meta"))
    chosen: dict[str, CouplingGroup] = {}
    for group in analysis.groups:  # of heads and their width the first
        chosen.setdefault(group.name, group)
    active = list(chosen.values())
    wanted = {g.index: g.units / 2 for g in active}
    tracemalloc.start()
    buckets = solve_linked_counts(analysis, active, wanted, {}, 1)
    pinned_groups(analysis, active)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    kept = {i: sum(count for _, count in parts) for i, parts in buckets.items()}
    assert sum(kept[g.index] == wide / 2 for g in active) == blocks
    assert peak < 20 * 8 * blocks * wide  # that many rows of the matrix of all links

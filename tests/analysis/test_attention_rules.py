"""Fused attention: which heads and widths go, what masks are tied to, and the numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from models import randomised, relative_error, run, zeroed
from torch import Tensor, nn
from toys import TOYS

import chanprune_ext as cpx
from chanprune_ext.analysis import analyse
from chanprune_ext.analysis.rules.registry import _RULES

if TYPE_CHECKING:
    from collections.abc import Callable

LENGTH = 7


class Attention(nn.Module):
    """Projections, a core (module, q, k, v) -> heads, and a way out; biases make nothing zero."""

    def __init__(
        self,
        core: Callable[..., Tensor],
        heads: int = 4,
        kv_heads: int = 4,
        width: int = 6,
        value_width: int = 6,
        extra: tuple[int, ...] = (),
        substrate: str = "meta",
    ) -> None:
        super().__init__()
        self.core = core
        # On meta tensors torch takes attention apart; only elsewhere is it one operation.
        self.plain = [] if substrate == "meta" else [torch.ones(5, dtype=torch.float64)]
        self.by_value = substrate == "real"
        self.heads, self.kv_heads = heads, kv_heads
        self.stem = nn.Linear(5, 12)
        self.q, self.k = nn.Linear(12, heads * width), nn.Linear(12, kv_heads * width)
        self.v = nn.Linear(12, kv_heads * value_width)
        self.o, self.out = nn.Linear(heads * value_width, 12), nn.Linear(12, 3)
        self.extra = nn.Parameter(torch.randn(extra)) if extra else None

    def forward(self, x: Tensor) -> Tensor:
        for tensor in self.plain:
            x = x * tensor  # it stays on the CPU, where no meta run can use it
        if self.by_value:
            x = x[x.mean((1, 2)) > -1e9]  # a shape that depends on values
        x = self.stem(x)
        n, t, _ = x.shape
        q = self.q(x).view(n, t, self.heads, -1).transpose(1, 2)
        k = self.k(x).view(n, t, self.kv_heads, -1).transpose(1, 2)
        v = self.v(x).view(n, t, self.kv_heads, -1).transpose(1, 2)
        y = self.core(self, q, k, v)
        return self.out(x + self.o(y.transpose(1, 2).reshape(n, t, -1)))


def attend(*args: Any, **kwargs: Any) -> Tensor:
    """With a scale of its own, so that no weight has to be rescaled."""
    return F.scaled_dot_product_attention(*args, **{"scale": 0.4, **kwargs})


def tokens() -> Tensor:
    return torch.randn(2, LENGTH, 5, dtype=torch.float64)


def made(core: Callable[..., Tensor], **options: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return randomised(Attention(core, **options).double()), tokens()


def check(model: nn.Module, x: Tensor, *, exact: bool = True) -> cpx.PruningPlan:
    """Widths of queries and of values go; the result is the zeroed original's."""
    plan = cpx.plan(model, x, 0.5)
    assert plan.params_after < 0.6 * plan.params_before
    shrunk = [g for g in plan.groups if g.width_after < g.width_before]
    assert {m for g in shrunk for m in ("q", "v") if f"{m}.weight" in plan.kept} == {"q", "v"}
    assert any(g.normalised for g in shrunk) != exact
    if exact:
        error = relative_error(run(plan.apply(model), x), run(zeroed(model, plan), x))
        assert error < 1e-9
    return plan


EXACT: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "plain": (lambda m, q, k, v: attend(q, k, v), {}),
    "causal": (lambda m, q, k, v: attend(q, k, v, is_causal=True), {}),
    "by keyword": (lambda m, q, k, v: attend(query=q, key=k, value=v), {}),
    "dropout in training": (
        lambda m, q, k, v: attend(q, k, v, dropout_p=0.1 if m.training else 0.0),
        {},
    ),
    "mask of positions": (
        lambda m, q, k, v: attend(q, k, v, attn_mask=m.extra),
        {"extra": (LENGTH, LENGTH)},
    ),
    "mask of truth values": (
        lambda m, q, k, v: attend(
            q, k, v, torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=q.device).tril()
        ),
        {},
    ),
    "mask of each image": (
        lambda m, q, k, v: attend(q, k, v, attn_mask=m.extra),
        {"extra": (2, 1, LENGTH, LENGTH)},
    ),
    "mask of heads": (
        lambda m, q, k, v: attend(q, k, v, attn_mask=m.extra),
        {"extra": (4, LENGTH, LENGTH)},
    ),
    "mask of heads and keys": (
        lambda m, q, k, v: attend(q, k, v, attn_mask=m.extra),
        {"extra": (1, 4, 1, LENGTH)},
    ),
    "wider values": (lambda m, q, k, v: attend(q, k, v), {"value_width": 10}),
    "narrower values": (lambda m, q, k, v: attend(q, k, v), {"value_width": 2}),
    "grouped queries": (lambda m, q, k, v: attend(q, k, v, enable_gqa=True), {"kv_heads": 2}),
    "one key": (lambda m, q, k, v: attend(q, k, v, enable_gqa=True), {"kv_heads": 1}),
    "one key stretched": (
        lambda m, q, k, v: attend(q, *(z.expand(-1, m.heads, -1, -1) for z in (k, v))),
        {"kv_heads": 1},
    ),
    "keys repeated": (
        lambda m, q, k, v: attend(
            q, *(z.repeat_interleave(m.heads // m.kv_heads, 1) for z in (k, v))
        ),
        {"kv_heads": 2},
    ),
    "three dims": (
        lambda m, q, k, v: attend(*(z.flatten(0, 1) for z in (q, k, v))).view(
            q.shape[0], q.shape[1], LENGTH, -1
        ),
        {},
    ),
    "five dims": (lambda m, q, k, v: attend(q[None], k[None], v[None])[0], {}),
    "one query": (
        lambda m, q, k, v: attend(q[:, :, :1], k, v).expand(-1, -1, LENGTH, -1),
        {},
    ),
    "heads turned around": (lambda m, q, k, v: attend(q, k.flip(1), v), {}),
    "heads gated": (
        lambda m, q, k, v: attend(q, k, v) * m.extra.view(-1, 1, 1),
        {"extra": (4,)},
    ),
    "values that are not zero": (lambda m, q, k, v: attend(q, k, v.sigmoid()), {}),
    "sum over widths of values": (
        lambda m, q, k, v: v * attend(q, k, v).sum(-1, keepdim=True),
        {},
    ),
}


@pytest.mark.parametrize("substrate", ["meta", "fake"])
@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str, substrate: str) -> None:
    core, options = EXACT[name]
    model, x = made(core, **options, substrate=substrate)
    assert analyse(model, x).trace.substrate == substrate
    check(model, x)


@pytest.mark.parametrize("name", ["plain", "mask of heads", "grouped queries", "three dims"])
def test_exact_on_real_tensors(name: str) -> None:
    core, options = EXACT[name]
    model, x = made(core, **options, substrate="real")
    assert analyse(model, x).trace.substrate == "real"
    check(model, x)


def test_the_fused_rule_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in _RULES if "_scaled_dot_product" in n]:
        monkeypatch.delitem(_RULES, name)
    for name in ("plain", "mask of heads and keys"):
        core, options = EXACT[name]
        (told, *_) = analyse(*made(core, **options, substrate="fake")).trace.unknown
        assert told.op.startswith("aten::_scaled_dot_product")
        assert analyse(*made(core, **options)).trace.unknown == []


@pytest.mark.parametrize(
    ("name", "core"),
    [
        ("sigmoids", lambda m, q, k, v: attend(q.sigmoid(), k.sigmoid(), v)),
        ("unit length", lambda m, q, k, v: attend(F.normalize(q, dim=-1), k, v)),
    ],
)
@pytest.mark.parametrize("substrate", ["meta", "fake"])
def test_queries_that_are_not_zero_are_told(
    name: str, core: Callable[..., Tensor], substrate: str
) -> None:
    """A removed index of a sigmoid still counts in the product: no equality is claimed."""
    check(*made(core, substrate=substrate), exact=False)


@pytest.mark.parametrize("substrate", ["meta", "fake"])
@pytest.mark.parametrize("options", [{}, {"value_width": 10}, {"kv_heads": 2}])
def test_the_default_scale_keeps_its_effect(options: dict[str, Any], substrate: str) -> None:
    """It follows the width of a query, which halves: that is folded into a weight."""

    def core(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=m.kv_heads != m.heads)

    plan = check(*made(core, **options, substrate=substrate))
    assert plan.rescalings


@pytest.mark.parametrize("substrate", ["meta", "fake"])
def test_a_mask_of_heads_goes_with_them(substrate: str) -> None:
    """Where heads go, the mask's go too; where they stay, so do the mask's."""
    model, x = made(EXACT["mask of heads"][0], extra=(4, LENGTH, LENGTH), substrate=substrate)
    analysis = analyse(model, x)
    (group,) = [g for g in analysis.groups if any(m.entry == "extra" for m in g.members)]
    assert group.units == 4
    (mine,) = [m for m in group.members if m.entry == "extra"]
    assert mine.dim == 0
    assert {m.entry for m in group.members} >= {"q.weight", "k.weight", "v.weight", "o.weight"}


@pytest.mark.parametrize(
    ("core", "entry"),
    [
        # Positions of one head attend to those of others: heads are keys.
        (lambda m, q, k, v: attend(*(z.transpose(1, 2) for z in (q, k, v))).transpose(1, 2), "v"),
        # Widths attend to widths.
        (lambda m, q, k, v: attend(q.mT, k.mT, v.mT).mT, "v"),
    ],
)
@pytest.mark.parametrize("substrate", ["meta", "fake"])
def test_what_is_attended_to_stays(core: Callable[..., Tensor], entry: str, substrate: str) -> None:
    """The dim of the keys goes through the softmax: of that only the other factor may go."""
    model, x = made(core, substrate=substrate)
    analysis = analyse(model, x)
    units = [
        g.units
        for g in analysis.groups
        if any(m.entry == f"{entry}.weight" and m.dim == 0 for m in g.members)
    ]
    assert len(units) == 1
    plan = cpx.plan(model, x, 0.5)
    assert relative_error(run(plan.apply(model), x), run(zeroed(model, plan), x)) < 1e-9


def shares_keys(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As code does that repeats keys by hand where the operation can't share them."""
    if m.sharing > 1 and not m.by_hand:
        return attend(query=q, key=k, value=v, enable_gqa=True)
    return attend(q, *(z.repeat_interleave(m.sharing, 1) for z in (k, v)))


@pytest.mark.parametrize("substrate", ["meta", "fake", "real"])
@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_both_ways_to_share_keys_stay_right(substrate: str, ratio: float) -> None:
    model, x = made(shares_keys, heads=8, kv_heads=2, substrate=substrate)
    model.sharing, model.by_hand = 4, False
    plan = cpx.plan(model, x, ratio, kinds=("heads",))
    assert plan.params_after < plan.params_before
    pruned = plan.apply(model)
    expected = run(zeroed(model, plan), x)
    for by_hand in (False, True):
        pruned.by_hand = by_hand
        assert relative_error(run(pruned, x), expected) < 1e-9


@pytest.mark.parametrize("substrate", ["meta", "fake", "real"])
def test_a_number_that_nobody_tells_keeps_queries_and_keys_together(substrate: str) -> None:
    core, _ = EXACT["grouped queries"]
    model, x = made(core, heads=8, kv_heads=4, substrate=substrate)
    plan = cpx.plan(model, x, 0.5, kinds=("heads",))
    kept = {name: len(plan.kept[f"{name}.weight"][0]) // 6 for name in ("q", "k", "v")}
    assert kept == {"q": 4, "k": 2, "v": 2}
    assert relative_error(run(plan.apply(model), x), run(zeroed(model, plan), x)) < 1e-9
    # All queries share one key: none can go.
    model, x = made(EXACT["one key"][0], kv_heads=1, substrate=substrate)
    assert "heads" not in {group.kind for group in analyse(model, x).groups}


@pytest.mark.parametrize("kind", ["heads", "head_dim"])
@pytest.mark.parametrize(
    ("toy", "heads", "width"),
    [
        ("DecoderWithoutNorms", {"heads": 2}, {"head_dim": 4}),
        ("BiasSharedByLayers", {"heads": 2, "inner": 12}, {"width": 3, "inner": 12}),
        ("CachedBias", {"heads": 2}, {"key_dim": 2, "value_dim": 4}),
    ],
)
def test_heads_or_their_width_in_every_layer(
    toy: str, heads: dict[str, int], width: dict[str, int], kind: str
) -> None:
    """Grouped and rotated queries, a shared bias, a cached one: what goes is told by attributes."""
    torch.manual_seed(0)
    model, x = randomised(TOYS[toy].make()).double(), TOYS[toy].inputs()
    x = x.double() if x.is_floating_point() else x
    plan = cpx.plan(model, x, 0.5, kinds=(kind,))
    modules = {a.module for a in plan.attributes}
    wanted = heads if kind == "heads" else width
    changed = {(a.module, a.name): value for a, value in plan.attributes.items()}
    # Half of the queries of each key, or half of the keys: both halve the heads.
    assert {k: v for k, v in changed.items() if k[1] != "kv_heads"} == {
        (module, name): value for module in modules for name, value in wanted.items()
    }
    assert len(modules) == len(getattr(model, "layers", [model]))
    assert relative_error(run(plan.apply(model), x), run(zeroed(model, plan), x)) < 1e-9

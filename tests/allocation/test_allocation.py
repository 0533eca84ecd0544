"""How many channels each group keeps, and which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models import network, randomised, relative_error, run, zeroed
from torch import Tensor, nn
from toys import TOYS

import chanprune_ext as cpx
from chanprune_ext.allocation.links import solve_linked_counts
from chanprune_ext.allocation.normalisation import NORMALISATIONS
from chanprune_ext.analysis import analyse
from chanprune_ext.criteria import magnitude
from chanprune_ext.errors import BudgetError, InvalidArgumentError, NothingToPruneError

if TYPE_CHECKING:
    from pathlib import Path

IMAGES = torch.randn(2, 3, 8, 8)


class Chain(nn.Module):
    """Convolutions of the given widths, one after the other."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1) for i, o in zip((3, *widths), widths, strict=False)
        )
        self.fc = nn.Linear(widths[-1], 4)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.fc(x.mean((2, 3)))


def chain(*widths: int) -> nn.Module:
    torch.manual_seed(0)
    return Chain(*widths)


def kept_widths(plan: cpx.PruningPlan) -> list[int]:
    return [g.width_after for g in plan.groups]


# -- local ratios --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(0.5, [8, 5, 4]), (0.25, [12, 8, 5]), (0.3, [11, 7, 5]), (0.7, [5, 3, 2]), (0.99, [1, 1, 1])],
)
def test_every_group_loses_the_ratio(ratio: float, expected: list[int]) -> None:
    """The nearest whole number, of two equally near ones the larger; never nothing."""
    assert kept_widths(cpx.plan(chain(16, 10, 7), IMAGES, ratio)) == expected


def test_ratios_by_glob() -> None:
    model = chain(16, 10, 8)
    plan = cpx.plan(model, IMAGES, 0.0, ratios={"convs.*": 0.5, "convs.2": 0.25})
    assert kept_widths(plan) == [8, 5, 6]
    plan = cpx.plan(model, IMAGES, 0.5, ratios={"convs.1": 0.0})
    assert kept_widths(plan) == [8, 10, 4]
    plan = cpx.plan(model, IMAGES, 0.5, ratios={"*.0": 0.75}, ignore=["convs.2"])
    assert kept_widths(plan) == [4, 5, 8]


def test_any_producer_of_a_group_names_it() -> None:
    torch.manual_seed(0)
    model = TOYS["Residual"].make()
    plan = cpx.plan(model, IMAGES, 0.0, ratios={"b": 0.5})
    assert plan.kept["stem.0.weight"][0].shape == (8,)
    assert "a.0.weight" not in plan.kept or 0 not in plan.kept["a.0.weight"]
    with pytest.raises(NothingToPruneError):
        cpx.plan(model, IMAGES, 0.0, ratios={"b": 0.5}, ignore="stem*")


@pytest.mark.parametrize("round_to", [2, 4, 8, 5])
def test_rounding(round_to: int) -> None:
    """Multiples where a group is wide enough; a narrower one keeps its width."""
    plan = cpx.plan(chain(32, 20, 3), IMAGES, 0.4, round_to=round_to)
    wide = kept_widths(plan)
    for group, width in zip(plan.groups, wide, strict=True):
        if group.width_before < round_to:
            assert width == group.width_before
        else:
            assert width % round_to == 0
            assert abs(width - 0.6 * group.width_before) <= max(round_to / 2, round_to - 1)


def test_rounding_counts_channels_not_units() -> None:
    """Each channel of a depthwise multiplier's input stands for two of its output."""
    torch.manual_seed(0)
    plan = cpx.plan(TOYS["DepthwiseMultiplier"].make(), IMAGES, 0.3, round_to=4)
    assert plan.kept["a.0.weight"][0].shape[0] % 4 == 0
    assert plan.kept["dw.0.weight"][0].shape[0] == 2 * plan.kept["a.0.weight"][0].shape[0]


# -- linked counts -------------------------------------------------------------------------------


class Cut(nn.Module):
    """A convolution cut into equal parts that are read by different layers."""

    def __init__(self, parts: int, width: int) -> None:
        super().__init__()
        self.count = str(parts)  # a number in a string has no width to follow
        self.a = nn.Conv2d(3, parts * width, 1)
        self.b = nn.ModuleList(nn.Conv2d(width, 8, 1) for _ in range(parts))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.a(x).chunk(int(self.count), 1)
        y = sum(b(p) for b, p in zip(self.b, pieces, strict=True))
        return self.fc(y.mean((2, 3)))


@pytest.mark.parametrize("round_to", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("parts", [2, 3])
def test_equal_parts_stay_equal_and_are_rounded(parts: int, round_to: int) -> None:
    torch.manual_seed(0)
    model = Cut(parts, 12)
    plan = cpx.plan(model, IMAGES, 0.45, round_to=round_to, criterion="random")
    pruned = plan.apply(model)
    widths = {b.in_channels for b in pruned.b}
    assert len(widths) == 1
    (width,) = widths
    assert width % round_to == 0
    assert abs(width - 0.55 * 12) <= round_to
    assert relative_error(run(pruned, IMAGES), run(zeroed(model, plan), IMAGES)) < 1e-9


def test_equal_parts_choose_their_own_channels() -> None:
    torch.manual_seed(0)
    model = Cut(2, 12)
    with torch.no_grad():
        model.a.weight.fill_(1)
        model.a.weight[[0, 1, 2, 3, 4, 5, 18, 19, 20, 21, 22, 23]] = 0.1
    plan = cpx.plan(model, IMAGES, 0.5)
    assert plan.kept["a.weight"][0].tolist() == list(range(6, 18))


def test_one_part_at_a_ratio_of_its_own() -> None:
    """Parts that must be equal meet between the ratios asked for."""
    torch.manual_seed(0)
    model = Cut(2, 12)
    analysis = analyse(model, IMAGES)
    first, second = (g for g in analysis.groups if g.name == "a")
    wanted = {g.index: float(g.units) for g in analysis.groups}
    wanted[first.index], wanted[second.index] = 4.0, 8.0
    counts = solve_linked_counts(analysis, analysis.groups, wanted, {}, 1)
    ((_, a),), ((_, b),) = counts[first.index], counts[second.index]
    assert a == b
    assert 4 <= a <= 8


def test_equal_parts_keep_the_least_of_each() -> None:
    torch.manual_seed(0)
    analysis = analyse(Cut(2, 12), IMAGES)
    first, second = (g for g in analysis.groups if g.name == "a")
    wanted = {g.index: 3.0 for g in analysis.groups}
    for least, expected in (({}, 3), ({first.index: 5.0}, 5)):
        counts = solve_linked_counts(analysis, analysis.groups, wanted, least, 1)
        assert [counts[g.index][0][1] for g in (first, second)] == [expected, expected]


def test_shared_attribute_keeps_layers_equal() -> None:
    """One int that two layers are reshaped by: both shrink by the same number."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 12
            self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 12, 1)
            self.c, self.d = nn.Linear(12, 8), nn.Linear(12, 8)
            self.fc = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x).mean((2, 3)).view(-1, self.width)
            b = self.b(x).mean((2, 3)).view(-1, self.width)
            return self.fc(self.c(a) + self.d(b))

    torch.manual_seed(0)
    model = Shared()
    plan = cpx.plan(model, IMAGES, 0.0, ratios={"a": 0.5, "b": 0.25})
    pruned = plan.apply(model)
    assert pruned.a.out_channels == pruned.b.out_channels == pruned.width
    assert 6 <= pruned.width <= 9
    assert relative_error(run(pruned, IMAGES), run(zeroed(model, plan), IMAGES)) < 1e-9
    with pytest.raises(NothingToPruneError):
        cpx.plan(model, IMAGES, 0.0, ratios={"a": 0.5})


def test_unrelated_links_do_not_disturb_each_other() -> None:
    """A component that cannot be rounded does not keep another from it."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.even, self.odd = Cut(2, 16), Cut(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.even(x) + self.odd(x)

    torch.manual_seed(0)
    model = Two()
    pruned = cpx.prune(model, IMAGES, 0.4, round_to=8)
    assert {b.in_channels for b in pruned.even.b} == {8}
    assert {b.in_channels for b in pruned.odd.b} <= {2, 3}


def test_single_channels_of_a_wide_layer_may_go() -> None:
    """A part of one channel is given up where the layer keeps others and a link asks for it."""

    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cut = 1
            self.a = nn.Conv2d(3, 8, 1)
            self.b, self.c = nn.Conv2d(1, 4, 1), nn.Conv2d(3, 4, 1)
            self.d = nn.Conv2d(4, 4, 1)
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.a(x).chunk(2, 1)
            y = self.b(left[:, : self.cut]) + self.c(left[:, self.cut :]) + self.d(right)
            return self.fc(y.mean((2, 3)))

    torch.manual_seed(0)
    model = Uneven()
    plan = cpx.plan(model, IMAGES, 0.5)
    pruned = plan.apply(model)
    assert pruned.b.in_channels == 1
    assert relative_error(run(pruned, IMAGES), run(zeroed(model, plan), IMAGES)) < 1e-9


# -- global ranking and thresholds ---------------------------------------------------------------

# The plain norm of each filter, so that the scores can be written down.
FILTERS = magnitude(members="makers", normalise=False)


def test_global_ranking_takes_the_lowest_of_all() -> None:
    model = chain(16, 16)
    with torch.no_grad():
        model.convs[0].weight.fill_(1)
        # Half of the second layer is worth next to nothing, relative to the layer's mean.
        model.convs[1].weight.fill_(1)
        model.convs[1].weight[::2] = 0.01
    plan = cpx.plan(model, IMAGES, 0.25, scope="global")
    assert kept_widths(plan) == [16, 8]
    assert plan.kept["convs.1.weight"][0].tolist() == list(range(1, 16, 2))


def test_a_named_ratio_is_no_part_of_a_global_ranking() -> None:
    model = chain(16, 16, 16)
    with torch.no_grad():
        model.convs[0].weight.mul_(1e-3)
    for ratio in (0.5, 0.5001):
        plan = cpx.plan(
            model, IMAGES, 0.5, ratios={"convs.0": ratio}, scope="global", criterion=FILTERS
        )
        assert kept_widths(plan)[0] == 8


@pytest.mark.parametrize(
    "asked", [{"threshold": 1e9}, {"budget": cpx.Budget(macs=0.3)}, {"ratio": 0.6}]
)
def test_rounding_takes_no_more_than_the_most(asked: dict[str, Any]) -> None:
    plan = cpx.plan(chain(64, 64, 40), IMAGES, scope="global", round_to=16, max_ratio=0.7, **asked)
    assert all(
        g.width_after >= 0.3 * g.width_before and (g.width_after % 16 == 0) for g in plan.groups
    )


@pytest.mark.parametrize(("max_ratio", "widths"), [(0.3, [32, 64]), (0.1, [40, 80])])
def test_a_group_without_a_multiple_in_reach_stays_whole(
    max_ratio: float, widths: list[int]
) -> None:
    """From 28 to 40 channels there is a multiple of 16, from 36 to 40 there is none."""
    plan = cpx.plan(chain(40, 88), IMAGES, threshold=1e9, round_to=16, max_ratio=max_ratio)
    assert kept_widths(plan) == widths


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8])
def test_global_ranking_removes_the_ratio_in_all(ratio: float) -> None:
    widths = [40, 24, 16]
    plan = cpx.plan(chain(*widths), IMAGES, ratio, scope="global", criterion="random")
    assert sum(kept_widths(plan)) == 80 - round(80 * ratio)


def test_global_ranking_leaves_something_everywhere() -> None:
    model = chain(20, 20)
    with torch.no_grad():
        model.convs[0].weight.copy_(torch.rand_like(model.convs[0].weight) + 1)
        model.convs[1].weight.zero_()
    plan = cpx.plan(model, IMAGES, 0.5, scope="global", max_ratio=0.8, criterion=FILTERS)
    assert kept_widths(plan)[1] == 4
    assert sum(kept_widths(plan)) == 20


def test_globally_ranked_scores_are_relative_to_their_group() -> None:
    """A layer with small weights throughout is not worth less."""
    model = chain(16, 16)
    before = kept_widths(cpx.plan(model, IMAGES, 0.5, scope="global"))
    with torch.no_grad():
        model.convs[0].weight.mul_(1e-3)
    assert kept_widths(cpx.plan(model, IMAGES, 0.5, scope="global")) == before


@given(scores=st.lists(st.floats(0, 1e6), min_size=1, max_size=12))
def test_lamp_is_the_square_over_all_that_are_no_smaller(scores: list[float]) -> None:
    """The paper's formula, unit by unit; of equal scores the earlier one goes first."""
    found = NORMALISATIONS["lamp"](np.array(scores))
    for u, score in enumerate(scores):
        left = [s**2 for v, s in enumerate(scores) if (s, v) >= (score, u)]
        assert found[u] == pytest.approx(score**2 / sum(left) if sum(left) else 0.0, rel=1e-6)


def test_lamp_ranks_across_layers_and_empties_none() -> None:
    model = chain(8, 8)
    with torch.no_grad():
        for conv, sizes in zip(model.convs, ([1, 2, 3, 4, 5, 6, 7, 8], [1] * 7 + [9]), strict=True):
            for filter_, size in zip(conv.weight, sizes, strict=True):
                filter_.mul_(size / filter_.norm())
    filters = magnitude(2, members="makers", normalise=False)
    ranked = {"criterion": filters, "scope": "global", "max_ratio": 0.99}
    # 1/204, 4/203, 9/199 ... of the first layer; 1/88 to 1/82 and 1 of the second.
    assert kept_widths(cpx.plan(model, IMAGES, 0.5, normalise="lamp", **ranked)) == [7, 1]
    assert kept_widths(cpx.plan(model, IMAGES, 0.8, normalise="lamp", **ranked)) == [2, 1]
    assert kept_widths(cpx.plan(model, IMAGES, 0.5, normalise="mean", **ranked)) == [6, 2]


def loudness(_: nn.Module, groups: Any, seed: int) -> list[np.ndarray]:
    """Scores of streams far below those of blocks, and of later groups below those of earlier."""
    generator = np.random.default_rng(seed)
    scale = {"residual": 1e-3, "hidden": 1.0}
    return [scale[g.kind] * generator.uniform(1, 2, g.units) / (1 + g.index) for g in groups]


@pytest.mark.parametrize("asked", [{"ratio": 0.25}, {"budget": cpx.Budget(macs=0.6)}])
def test_groups_of_one_build_compete_with_each_other_alone(asked: dict[str, Any]) -> None:
    options = {"criterion": loudness, "normalise": "none", **asked}
    shares = {}
    for scope in ("isomorphic", "global"):
        plan = cpx.plan(network("resnet18")[0], torch.zeros(1, 3, 64, 64), scope=scope, **options)
        for kind in ("residual", "hidden"):
            groups = [g for g in plan.groups if g.kind == kind]
            kept = sum(g.width_after for g in groups) / sum(g.width_before for g in groups)
            shares[scope, kind] = kept
            widths = [g.width_after / g.width_before for g in groups]
            assert scope == "global" or min(widths) < kept < max(widths), "one threshold a build"
    assert shares["isomorphic", "hidden"] == pytest.approx(
        shares["isomorphic", "residual"], abs=0.01
    )
    if "ratio" in asked:
        assert shares["isomorphic", "hidden"] == pytest.approx(0.75, abs=0.001)
        assert shares["global", "residual"] < 0.4 < 0.9 < shares["global", "hidden"]


def test_named_groups_keep_their_ratio_under_global_ranking() -> None:
    plan = cpx.plan(chain(16, 16, 16), IMAGES, 0.5, scope="global", ratios={"convs.1": 0.25})
    widths = kept_widths(plan)
    assert widths[1] == 12
    assert widths[0] + widths[2] == 16


def test_threshold() -> None:
    model = chain(8, 8)
    with torch.no_grad():
        for k, conv in enumerate(model.convs):
            conv.weight.zero_()
            for i in range(8):
                conv.weight[i, 0, 0, 0] = float(i + 4 * k)
    plan = cpx.plan(model, IMAGES, threshold=5.0, criterion=FILTERS)
    assert plan.kept["convs.0.weight"][0].tolist() == [5, 6, 7]
    assert plan.kept["convs.1.weight"][0].tolist() == list(range(1, 8))
    plan = cpx.plan(model, IMAGES, threshold=100.0, max_ratio=0.75, criterion=FILTERS)
    assert kept_widths(plan) == [2, 2]


def test_equal_scores_keep_the_first_channels() -> None:
    model = chain(8, 8)
    with torch.no_grad():
        for conv in model.convs:
            conv.weight.fill_(0.5)
    for scope in ("local", "global"):
        plan = cpx.plan(model, IMAGES, 0.5, scope=scope, criterion=FILTERS)
        for name in ("convs.0.weight", "convs.1.weight"):
            kept = plan.kept[name][0].tolist()
            assert kept == list(range(len(kept)))


def test_equal_scores_of_several_groups_lose_equal_shares() -> None:
    """None is emptied before another loses anything."""
    model = chain(8, 16, 8)
    with torch.no_grad():
        for conv, size in zip(model.convs, (0.5, 0.1, 0.3), strict=True):
            conv.weight.fill_(size)  # equal up to round-off, once divided by the group's mean
    plan = cpx.plan(model, IMAGES, 0.25, scope="global", criterion=FILTERS)
    assert kept_widths(plan) == [6, 12, 6]
    plan = cpx.plan(model, IMAGES, 0.5, scope="global", criterion=FILTERS)
    assert kept_widths(plan) == [4, 8, 4]


# -- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("name", ["resnet56", "mobilenet_v2"])
@pytest.mark.parametrize(
    "goal", [{"macs": 0.5}, {"params": 0.3}, {"macs": 0.7, "params": 0.6}], ids=str
)
def test_budget_is_met_closely_and_never_exceeded(
    name: str, goal: dict[str, float], scope: str
) -> None:
    model, inputs = network(name)
    plan = cpx.plan(model, inputs, budget=cpx.Budget(**goal), scope=scope)
    used = {
        "macs": plan.macs_after / plan.macs_before,
        "params": plan.params_after / plan.params_before,
    }
    assert all(used[k] <= v for k, v in goal.items())
    # One of the two is what stops it.
    assert max(used[k] / v for k, v in goal.items()) > 0.98


def test_coarse_rounding_wastes_less_than_a_common_ratio() -> None:
    """At multiples of 8, most groups of these nets change at the same ratio."""
    model, inputs = network("mobilenet_v2")
    plan = cpx.plan(model, inputs, budget=cpx.Budget(macs=0.5), round_to=8)
    assert 0.48 < plan.macs_after / plan.macs_before <= 0.5
    model, inputs = network("resnet56")
    plan = cpx.plan(model, inputs, budget=cpx.Budget(macs=0.5), round_to=8)
    assert 0.44 < plan.macs_after / plan.macs_before <= 0.5


def test_budget_respects_ignore() -> None:
    model = chain(16, 16, 16)
    plan = cpx.plan(model, IMAGES, budget=cpx.Budget(params=0.5), ignore="convs.1")
    assert plan.groups[1].width_after == 16
    assert plan.params_after <= 0.5 * plan.params_before


def test_a_whole_budget_removes_nothing() -> None:
    with pytest.raises(NothingToPruneError, match="nothing would be removed"):
        cpx.plan(chain(8, 8), IMAGES, budget=cpx.Budget(macs=1.0))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"threshold": -1.0}, r"under threshold=-1\.0, .* ask for a higher threshold"),
        ({"budget": cpx.Budget(macs=1.0)}, r"under Budget\(macs=1\.0\), .* a smaller budget"),
        ({"ratio": 0.01}, r"under ratio=0\.01, .* a larger ratio"),
        ({"ratio": 0.0, "ratios": {"convs.1": 0.01}}, r"ratios=\{'convs\.1': 0\.01\}"),
    ],
)
def test_what_was_asked_for_is_named_where_it_removes_nothing(
    asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(NothingToPruneError, match=message):
        cpx.plan(chain(8, 8), IMAGES, **asked)


# -- names ---------------------------------------------------------------------------------------


def test_names_that_look_like_globs_name_themselves() -> None:
    model = nn.ModuleDict({"a[0]": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(8, 4, 1)})
    model.forward = lambda x: model["b"](model["a[0]"](x))
    plan = cpx.plan(model, IMAGES, 0.0, ratios={"a[0]": 0.5})
    assert {g.name: g.width_after for g in plan.groups}["a[0]"] == 4
    with pytest.raises(NothingToPruneError):
        cpx.plan(model, IMAGES, ignore=["a[0]", "b"])


@pytest.mark.parametrize("option", [{"ignore": "convs"}, {"ratios": {"convs": 0.5}}])
def test_a_module_that_holds_layers_is_no_name_for_them(option: dict[str, Any]) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"'convs'.* names no .*'convs\.\*' names those in"
    ):
        cpx.plan(chain(8, 8), IMAGES, 0.5, **option)


# -- all together --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", ["ChunkDense", "ChannelShuffleResidual", "SplitByOneSize"])
def test_any_scores_give_a_network_that_works(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    model, inputs = randomised(TOYS[name].make(), seed), TOYS[name].inputs()
    generator = np.random.default_rng(seed)
    options: dict[str, Any] = {
        "ratio": float(generator.choice([0.2, 0.5, 0.9])),
        "scope": str(generator.choice(["local", "global"])),
        "round_to": int(generator.choice([1, 2, 3])),
    }
    plan = cpx.plan(model, inputs, criterion="random", seed=seed, **options)
    error = relative_error(run(plan.apply(model), inputs), run(zeroed(model, plan), inputs))
    assert error < 1e-9
    assert all(g.width_after >= 0 for g in plan.groups)
    assert all(len(i) for dims in plan.kept.values() for i in dims.values())


@pytest.mark.parametrize(
    ("given", "decides"),
    [
        ({"ratio": 0.3}, {"budget": cpx.Budget(macs=0.5)}),
        ({"ratio": 0.0}, {"budget": cpx.Budget(macs=0.5)}),
        ({"ratio": 0.3}, {"threshold": 0.1}),
        ({"ratios": {"convs.1": 0.0}}, {"threshold": 0.1}),
    ],
)
def test_a_ratio_beside_a_budget_or_threshold_is_refused(
    given: dict[str, object], decides: dict[str, object]
) -> None:
    """It would have no effect: the user asked for something else than what would happen."""
    message = f"give either {next(iter(given))} or {next(iter(decides))}, not both"
    with pytest.raises(InvalidArgumentError, match=message):
        cpx.plan(chain(8, 8), IMAGES, **given, **decides)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.95])
def test_groups_with_a_ratio_keep_it_and_the_others_meet_the_budget(
    scope: str, ratio: float
) -> None:
    """Also a ratio above ``max_ratio``: it was asked for by name."""
    budget, ratios = cpx.Budget(params=0.3), {"convs.1": ratio}
    plan = cpx.plan(chain(*[40] * 5), IMAGES, budget=budget, ratios=ratios, scope=scope)
    widths = {g.name: g.width_after for g in plan.groups}
    assert widths["convs.1"] == round(40 * (1 - ratio))
    assert 0.28 * plan.params_before < plan.params_after <= 0.3 * plan.params_before


def test_a_budget_that_the_ratios_rule_out_says_so() -> None:
    with pytest.raises(BudgetError, match=r"that ratios does not name .*; raise ratios or max_rat"):
        cpx.plan(chain(8, 8), IMAGES, budget=cpx.Budget(params=0.1), ratios={"convs.*": 0.25})


def test_ratios_go_with_a_budget_for_a_kind_that_is_not_theirs() -> None:
    """As without a budget: a group named by a glob is pruned whatever its kind."""
    plan = cpx.plan(
        chain(8, 8),
        IMAGES,
        budget=cpx.Budget(params=0.9),
        kinds="residual",
        ratios={"convs.1": 0.5},
    )
    assert {g.name: g.width_after for g in plan.groups} == {"convs.0": 8, "convs.1": 4}


def test_an_empty_mapping_of_ratios_goes_with_a_budget() -> None:
    plan = cpx.plan(chain(8, 8), IMAGES, ratios={}, budget=cpx.Budget(params=0.5))
    assert plan.params_after <= 0.5 * plan.params_before


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": np.float32(0.5)},
        {"ratios": {"convs.0": np.float32(0.5)}},
        {"threshold": np.float32(0.9)},
        {"budget": cpx.Budget(macs=np.float32(0.5), tolerance=np.float32(0.1))},
        {"budget": cpx.Budget(file_size=np.float32(0.6))},
        {"round_to": np.int64(2), "max_ratio": np.float32(0.8)},
        {"criterion": "random", "seed": np.int64(3)},
    ],
    ids=",".join,
)
def test_numbers_of_numpy_are_saved(options: dict[str, Any], tmp_path: Path) -> None:
    made = cpx.plan(chain(16, 10), IMAGES, **options)
    made.save(tmp_path / "plan.json")
    assert cpx.PruningPlan.load(tmp_path / "plan.json").options == made.options


def test_a_seed_is_an_integer() -> None:
    with pytest.raises(InvalidArgumentError, match="seed must be an int, got 'x'"):
        cpx.plan(chain(4), IMAGES, seed="x")  # type: ignore[arg-type]

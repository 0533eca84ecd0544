"""Elimination as a criterion: what goes first, and what is comparable."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import chanprune_ext as cpx
from chanprune_ext.analysis import analyse
from chanprune_ext.elimination.readers import find_readers, measure_readers


def inputs(n: int = 256, channels: int = 3, edge: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, channels, edge, edge, generator=torch.Generator().manual_seed(seed))


def scores_of(model: nn.Module, x: torch.Tensor, **options) -> dict[str, np.ndarray]:
    groups = analyse(model, x[:1]).groups
    found = cpx.elimination(x, **options)(model, groups, 0)
    return {group.name: score for group, score in zip(groups, found, strict=True)}


class Chain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 4, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * 36, 5),
        )


@pytest.fixture
def chain() -> nn.Module:
    torch.manual_seed(0)
    return Chain().eval()


def test_a_channel_nobody_reads_goes_first(chain):
    with torch.no_grad():
        chain[2].weight[:, 5] = 0
        chain[5].weight.view(5, 4, 36)[:, 2] = 0
    scores = scores_of(chain, inputs())
    assert scores["0"].argmin() == 5
    assert scores["2"].argmin() == 2
    assert scores["0"][5] < 1e-6 * scores["0"].max()


def test_of_two_proportional_channels_one_goes_first_and_costs_nothing(chain):
    with torch.no_grad():
        chain[0].weight[6] = 2 * chain[0].weight[1]
        chain[0].bias[6] = 2 * chain[0].bias[1]
    x = inputs()
    plan = cpx.plan(
        chain, x[:1], 0.0, ratios={"0": 0.125}, criterion=cpx.elimination(x, ridge=1e-8)
    )
    gone = plan.pruned["0.weight"][0].tolist()
    assert gone in ([1], [6])
    pruned = plan.apply(chain)
    cpx.compensate(pruned, chain, x, progress=False, ridge=1e-9)
    with torch.no_grad():
        fresh = inputs(seed=1)
        assert (pruned(fresh) - chain(fresh)).norm() < 1e-3 * chain(fresh).norm()


def test_l1_would_have_kept_both():
    """The counterpart of the test above: large filters, one of them superfluous."""
    torch.manual_seed(0)
    model = Chain().eval()
    with torch.no_grad():
        model[0].weight[1] *= 5
        model[0].weight[6] = 2 * model[0].weight[1]
        model[0].bias[6] = 2 * model[0].bias[1]
    by_norm = cpx.plan(model, inputs(1), 0.0, ratios={"0": 0.125}, criterion="l1")
    assert by_norm.pruned["0.weight"][0].tolist() not in ([1], [6])


class Branches(nn.Module):
    """Two branches added up, the second one hardly heard."""

    def __init__(self) -> None:
        super().__init__()
        self.loud = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
        self.soft = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head((self.loud(x) + self.soft(x)).mean((2, 3)))


@pytest.mark.parametrize("probe", [False, True])
def test_a_budget_takes_from_the_branch_that_is_hardly_heard(probe):
    torch.manual_seed(0)
    model = Branches().eval()
    with torch.no_grad():
        model.soft[2].weight *= 0.02
    x = inputs()
    plan = cpx.plan(
        model,
        x[:1],
        budget=cpx.Budget(macs=0.7),
        criterion=cpx.elimination(x, probe=probe),
        scope="global",
        kinds=("hidden",),
    )
    assert plan.macs_after <= 0.7 * plan.macs_before
    assert len(plan.pruned["soft.0.weight"][0]) >= 4
    assert "loud.0.weight" not in plan.pruned or len(plan.pruned["loud.0.weight"][0]) <= 1


def test_losses_are_weighed_against_what_a_unit_saves():
    """Equal losses: the layer whose units cost more MACs gives first."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cheap = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
            self.dear = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 4, 1))

        def forward(self, x):
            return (self.cheap(x) + self.dear(x)).mean((2, 3))

    def equal(model, groups, seed):
        return [np.linspace(1.0, 1.1, g.units) for g in groups]

    equal.comparable = True
    plan = cpx.plan(
        Two(), inputs(1), budget=cpx.Budget(macs=0.7), criterion=equal, scope="global",
        kinds=("hidden",),
    )  # fmt: skip
    assert "dear.0.weight" in plan.pruned
    assert "cheap.0.weight" not in plan.pruned
    assert plan.options["normalise"] == "none"


class Kinds(nn.Module):
    """A residual stream with several readers, a grouped and a depthwise convolution, norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.expand = nn.Conv2d(8, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.project = nn.Conv2d(12, 8, 1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.grouped(x)
        y = nn.functional.relu6(self.depthwise(nn.functional.relu6(self.expand(x))))
        x = x + self.project(y)
        return self.head(torch.relu(self.up(x)).mean((2, 3)))


@pytest.mark.parametrize("probe", [False, True])
@pytest.mark.parametrize("most_columns", [4, 2400])
def test_every_kind_of_group_gets_finite_scores_and_nothing_changes(probe, most_columns):
    torch.manual_seed(0)
    model = Kinds().eval()
    with torch.no_grad():
        model.project.weight[:, 7] = 0
    before = copy.deepcopy(model.state_dict())
    scores = scores_of(model, inputs(), probe=probe, most_columns=most_columns)
    assert all(np.isfinite(s).all() and (s >= 0).all() for s in scores.values())
    assert scores["expand"].argmin() == 7
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    plan = cpx.plan(model, inputs(1), 0.5, criterion=cpx.elimination(inputs()))
    pruned = plan.apply(model, verify="numeric")
    assert pruned.expand.out_channels == 6


def test_double_and_half_models(chain):
    x = inputs()
    single = scores_of(chain, x)
    double = scores_of(chain.double(), x.double())
    for name, score in single.items():
        np.testing.assert_allclose(score, double[name], rtol=1e-3, atol=1e-6)
    half = scores_of(chain.bfloat16(), x.bfloat16())
    assert all(np.isfinite(score).all() for score in half.values())


@pytest.mark.parametrize(
    ("option", "value"),
    [("ridge", 0.0), ("ridge", float("nan")), ("most_columns", 0), ("held_back", 1.0)],
)
def test_options_out_of_range(option, value):
    with pytest.raises(cpx.ChanpruneError, match=option):
        cpx.elimination(inputs(), **{option: value})


def test_data_that_are_not_finite_are_refused(chain):
    x = inputs()
    x[3, 0, 0, 0] = float("nan")
    with pytest.raises(cpx.ChanpruneError, match="NaN"):
        cpx.plan(chain, inputs(1), 0.5, criterion=cpx.elimination(x))


def test_unknown_normalisation(chain):
    with pytest.raises(cpx.ChanpruneError, match="normalise"):
        cpx.plan(chain, inputs(1), 0.5, scope="global", normalise="median")


def test_the_first_batch_decides_for_all_how_much_is_looked_at():
    """Batches that differ in size must not be looked at by rules of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 20, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 5)
    ).eval()
    x = inputs(79)  # less than four samples a column: windows help

    def moments(*batches: torch.Tensor):
        readers = find_readers(model, x, {"4.weight": True}, 2400)
        measure_readers(model, readers, batches)
        return readers["4.weight"].moments

    whole, cut = moments(x), moments(x[:32], x[32:64], x[64:])
    assert cut.samples == pytest.approx(whole.samples) == pytest.approx(2 * 79)
    torch.testing.assert_close(cut.gram, whole.gram, rtol=1e-5, atol=1e-5)

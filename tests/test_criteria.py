"""Scores of channels: checked against sums written out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import network, randomised
from torch import Tensor, nn
from toys import TOYS

import chanprune_ext as cpx
from chanprune_ext.analysis import CouplingGroup, analyse
from chanprune_ext.criteria import CRITERIA, score_groups
from chanprune_ext.errors import InvalidArgumentError


class Skip(nn.Module):
    """Two convolutions that make the same channels, each with its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.na, self.nb = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.na(self.a(x)))
        return self.fc((x + self.nb(self.b(x))).mean((2, 3)))


IMAGES = torch.randn(2, 3, 8, 8)


def skip() -> tuple[nn.Module, tuple[CouplingGroup, ...]]:
    torch.manual_seed(0)
    model = randomised(Skip())
    return model, analyse(model, IMAGES).groups


def expected(model: nn.Module, norm: str) -> np.ndarray:
    rows = torch.cat([model.a.weight.flatten(1), model.b.weight.flatten(1)], 1).detach().double()
    return {
        "l1": rows.abs().sum(1),
        "l2": rows.square().sum(1).sqrt(),
        "linf": rows.abs().amax(1),
        "bn_scale": sum(n.weight.detach().double().abs() for n in (model.na, model.nb)),
    }[norm].numpy()


@pytest.mark.parametrize("criterion", ["l1", "l2", "linf", "bn_scale"])
def test_a_score_takes_all_producers_together(criterion: str) -> None:
    model, groups = skip()
    (score,) = score_groups(model, groups, criterion)
    assert score.dtype == np.float64
    np.testing.assert_allclose(score, expected(model, criterion), rtol=1e-6)


@pytest.mark.parametrize("criterion", ["l1", "l2", "linf", "bn_scale"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(criterion: str, dtype: torch.dtype) -> None:
    model, groups = skip()
    model.to(dtype)
    (score,) = score_groups(model, groups, criterion)
    np.testing.assert_allclose(score, expected(model, criterion), rtol=1e-5)


def test_units_of_several_channels() -> None:
    """A channel with 16 features behind a flatten, a group of a grouped convolution."""
    torch.manual_seed(0)
    model, inputs = TOYS["UnflattenLayer"].make(), TOYS["UnflattenLayer"].inputs()
    groups = analyse(model, inputs).groups
    scores = score_groups(model, groups, "l1")
    rows = model.fc.weight.detach().double().abs().sum(1).view(12, 16).sum(1)
    np.testing.assert_allclose(scores[0], rows.numpy(), rtol=1e-6)
    assert groups[0].multiplicity == 16


def test_without_scales_bn_scale_is_l1() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    groups = analyse(model, IMAGES).groups
    (scaled,) = score_groups(model, groups, "bn_scale")
    (l1,) = score_groups(model, groups, "l1")
    np.testing.assert_array_equal(scaled, l1)


def test_random_depends_on_the_seed_only() -> None:
    model, groups = skip()
    (first,), (again,), (other,) = (score_groups(model, groups, "random", s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
    assert first.min() >= 0
    assert first.max() <= 1


def test_own_criterion() -> None:
    def last_is_best(model: nn.Module, groups: Any, seed: int) -> list[np.ndarray]:
        return [np.arange(g.units) for g in groups]

    model, _ = skip()
    plan = cpx.plan(model, IMAGES, 0.5, criterion=last_is_best)
    assert plan.kept["a.weight"][0].tolist() == [3, 4, 5]
    assert plan.criterion == "last_is_best"
    assert cpx.PruningPlan.from_dict(plan.to_dict()).criterion == "last_is_best"


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda g: np.zeros(g.units + 1), r"shape \(7,\) for group 'a'.*expected 6"),
        (lambda g: np.full(g.units, np.nan), "not all finite"),
        (lambda g: np.zeros((g.units, 2)), r"shape \(6, 2\)"),
    ],
)
def test_own_criterion_that_is_wrong(scores: Any, message: str) -> None:
    model, _ = skip()
    with pytest.raises(InvalidArgumentError, match=message):
        cpx.plan(model, IMAGES, criterion=lambda _m, groups, _s: [scores(g) for g in groups])


def test_own_criterion_that_forgets_a_group() -> None:
    model = TOYS["Residual"].make()
    with pytest.raises(InvalidArgumentError, match="2 groups"):
        cpx.plan(model, IMAGES, criterion=lambda _m, groups, _s: [np.zeros(groups[0].units)])


def test_own_criterion_without_a_name() -> None:
    class Constant:
        def __call__(self, model: nn.Module, groups: Any, seed: int) -> list[np.ndarray]:
            return [np.ones(g.units) for g in groups]

    model, _ = skip()
    assert cpx.plan(model, IMAGES, criterion=Constant()).criterion == "Constant"


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_every_group_of_a_real_network_gets_scores(criterion: str) -> None:
    model, inputs = network("shufflenet_v2_x1_0")
    groups = analyse(model, inputs).groups
    scores = score_groups(model, groups, criterion)
    assert [s.shape for s in scores] == [(g.units,) for g in groups]
    assert all((s > 0).all() for s in scores)


def test_scores_follow_the_weights() -> None:
    """Channels whose filters are small are the ones that go, in every member of their group.

    The stream of ResNet-56 runs through three stages; zero padding moves channel c to c + 8 in the
    second and c + 24 in the third.
    """
    model, inputs = network("resnet56")
    offsets = {"conv1": 0, "layer1": 0, "layer2": 8, "layer3": 24}
    weak = torch.tensor([2, 9, 13])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "conv1.weight" or name.endswith("conv2.weight"):
                parameter[weak + offsets[name.split(".")[0]]] *= 1e-3
    plan = cpx.plan(model, inputs, 0.0, ratios={"conv1": 3 / 16})
    for entry, dim in (("conv1.weight", 0), ("layer1.4.bn2.bias", 0), ("layer1.8.conv1.weight", 1)):
        assert plan.pruned[entry][dim].tolist() == [2, 9, 13]
    assert plan.pruned["layer2.0.conv2.weight"][0].tolist() == [10, 17, 21]
    assert plan.pruned["layer3.8.bn2.running_var"][0].tolist() == [26, 33, 37]
    assert plan.pruned["linear.weight"][1].tolist() == [26, 33, 37]

"""Scores of channels: checked against sums written out by hand."""

from __future__ import annotations

import copy
import math
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
from chanprune_ext.criteria import CRITERIA, magnitude, score_groups
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


NORMS = {
    "l1": lambda rows: rows.abs().sum(1),
    "l2": lambda rows: rows.square().sum(1).sqrt(),
    "linf": lambda rows: rows.abs().amax(1),
}
ORDERS = {"l1": 1, "l2": 2, "linf": math.inf}


def filters(model: nn.Module) -> list[Tensor]:
    """What each of two layers makes the six channels with, and what the classifier reads them."""
    weights = [model.a.weight.flatten(1), model.b.weight.flatten(1), model.fc.weight.T]
    return [w.detach().double() for w in weights]


def scaled(norms: Tensor) -> np.ndarray:
    return (norms / norms.mean()).numpy()


@pytest.mark.parametrize("criterion", ["l1", "l2", "linf"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_a_magnitude_is_the_norm_of_what_makes_and_what_reads_the_channel(
    criterion: str, dtype: torch.dtype
) -> None:
    model, groups = skip()
    model.to(dtype)
    (score,) = score_groups(model, groups, criterion)
    assert score.dtype == np.float64
    # The second convolution reads the channels of the first, and so does the classifier.
    readers = [model.b.weight.transpose(0, 1).flatten(1), model.fc.weight.T]
    norms = [scaled(NORMS[criterion](w.detach().double())) for w in readers]
    makers = [scaled(NORMS[criterion](w)) for w in filters(model)[:2]]
    np.testing.assert_allclose(score, np.sqrt(sum(norms) / 2 * sum(makers) / 2), rtol=1e-5)


@pytest.mark.parametrize("criterion", ["l1", "l2", "linf"])
def test_members_reductions_and_normalisation(criterion: str) -> None:
    model, groups = skip()
    a, b, _ = (NORMS[criterion](w) for w in filters(model))
    p = ORDERS[criterion]
    options: dict[str, Any] = {"members": "makers"}
    for reduction, expected in (
        ("sum", a + b),
        ("mean", (a + b) / 2),
        ("max", torch.maximum(a, b)),
    ):
        plain = magnitude(p, reduction=reduction, normalise=False, **options)
        (score,) = score_groups(model, groups, plain)
        np.testing.assert_allclose(score, expected.numpy(), rtol=1e-6)
    (score,) = score_groups(model, groups, magnitude(p, reduction="sum", **options))
    np.testing.assert_allclose(score, scaled(a) + scaled(b), rtol=1e-6)
    readers = [model.b.weight.transpose(0, 1).flatten(1), model.fc.weight.T]
    rest = sum(scaled(NORMS[criterion](w.detach().double())) for w in readers)
    (score,) = score_groups(model, groups, magnitude(p, members="readers", reduction="sum"))
    np.testing.assert_allclose(score, rest, rtol=1e-6)
    (score,) = score_groups(model, groups, magnitude(p, reduction="sum"))
    np.testing.assert_allclose(score, np.sqrt((scaled(a) + scaled(b)) * rest), rtol=1e-6)


def test_a_factor_moved_from_a_filter_to_its_reader_changes_no_score() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8, bias=False), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(2, 3)
    groups = analyse(model, x).groups
    (before,) = score_groups(model, groups, magnitude(normalise=False))
    output = model(x)
    factors = torch.rand(8) + 0.5
    with torch.no_grad():
        model[0].weight *= factors[:, None]
        model[2].weight /= factors
    torch.testing.assert_close(model(x), output)
    (after,) = score_groups(model, groups, magnitude(normalise=False))
    np.testing.assert_allclose(after, before, rtol=1e-5)


def test_a_folded_batch_norm_does_not_change_the_ranking() -> None:
    """What a filter's norm says hangs on how its batch norm was folded, a reader's does not."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()
    )
    randomised(model)
    folded = copy.deepcopy(model)
    folded[0] = torch.nn.utils.fuse_conv_bn_eval(model[0], model[1])
    folded[1] = nn.Identity()
    both = [analyse(m, IMAGES[:, :, :3, :3]).groups for m in (model, folded)]
    for criterion, agrees in (
        (magnitude(members="readers"), True),
        (magnitude(members="makers"), False),
    ):
        (one,) = score_groups(model, both[0], criterion)
        (two,) = score_groups(folded, both[1], criterion)
        assert np.array_equal(np.argsort(one), np.argsort(two)) == agrees


def test_bn_scale_adds_the_scales_of_all_batch_norms() -> None:
    model, groups = skip()
    (score,) = score_groups(model, groups, "bn_scale")
    expected = sum(n.weight.detach().double().abs() for n in (model.na, model.nb))
    np.testing.assert_allclose(score, expected.numpy(), rtol=1e-6)


def test_fpgm_is_the_sum_of_distances_to_the_other_filters() -> None:
    model, groups = skip()
    (score,) = score_groups(model, groups, "fpgm")
    parts = []
    for rows in filters(model)[:2]:
        sums = [sum((u - v).norm() for v in rows) for u in rows]
        parts.append(scaled(torch.stack(sums)))
    np.testing.assert_allclose(score, sum(parts) / 2, rtol=1e-5)


def test_fpgm_drops_a_copy_rather_than_a_small_filter() -> None:
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight.copy_(3 * torch.eye(5, 4))
        model[0].weight[4] = 0.9 * model[0].weight[0]
        model[0].weight[3] *= 0.5
    groups = analyse(model, torch.randn(1, 4)).groups
    (score,) = score_groups(model, groups, "fpgm")
    assert score.argmin() in (0, 3, 4)
    assert score[[1, 2]].min() > score.min()


def test_units_of_several_channels() -> None:
    """A channel with 16 features behind a flatten, a group of a grouped convolution."""
    torch.manual_seed(0)
    model, inputs = TOYS["UnflattenLayer"].make(), TOYS["UnflattenLayer"].inputs()
    groups = analyse(model, inputs).groups
    scores = score_groups(model, groups, magnitude(members="makers"))
    rows = model.fc.weight.detach().double().abs().sum(1).view(12, 16).sum(1)
    np.testing.assert_allclose(scores[0], scaled(rows), rtol=1e-6)
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
    # A single filter is at no distance from any other.
    assert all((s > 0).all() for s in scores if criterion != "fpgm" or len(s) > 1)


def test_scores_follow_the_weights() -> None:
    """Channels that are made and read weakly are the ones that go, in every member of their group.

    The stream of ResNet-56 runs through three stages; zero padding moves channel c to c + 8 in the
    second and c + 24 in the third.
    """
    model, inputs = network("resnet56")
    offsets = {"conv1": 0, "layer1": 0, "layer2": 8, "layer3": 24}
    weak = torch.tensor([2, 9, 13])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stage = name.split(".")[0]
            if name == "conv1.weight" or name.endswith("conv2.weight"):
                parameter[weak + offsets[stage]] *= 1e-3
            elif name == "linear.weight":
                parameter[:, weak + offsets["layer3"]] *= 1e-3
            elif name.endswith("conv1.weight"):
                # The first block of a stage reads the stream of the stage before.
                first = name.split(".")[1] == "0"
                before = {"layer1": "conv1", "layer2": "layer1", "layer3": "layer2"}
                parameter[:, weak + offsets[before[stage] if first else stage]] *= 1e-3
    plan = cpx.plan(model, inputs, 0.0, ratios={"conv1": 3 / 16})
    for entry, dim in (("conv1.weight", 0), ("layer1.4.bn2.bias", 0), ("layer1.8.conv1.weight", 1)):
        assert plan.pruned[entry][dim].tolist() == [2, 9, 13]
    assert plan.pruned["layer2.0.conv2.weight"][0].tolist() == [10, 17, 21]
    assert plan.pruned["layer3.8.bn2.running_var"][0].tolist() == [26, 33, 37]
    assert plan.pruned["linear.weight"][1].tolist() == [26, 33, 37]


def complex_linear() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"dtype": torch.complex64, "bias": False}
    return nn.Sequential(nn.Linear(3, 6, **sizes), nn.Linear(6, 4, **sizes))


@pytest.mark.parametrize("criterion", ["l1", "l2", "linf", "bn_scale"])
def test_complex_weights_count_by_their_absolute_values(criterion: str) -> None:
    model = complex_linear()
    x = torch.randn(2, 3, dtype=torch.complex64)
    (score,) = score_groups(model, analyse(model, x).groups, criterion)
    norm = {"l2": 2, "linf": math.inf}.get(criterion, 1)
    made, read = (
        scaled(torch.linalg.vector_norm(w.detach(), norm, dim=1))
        for w in (model[0].weight, model[1].weight.T)
    )
    np.testing.assert_allclose(score, np.sqrt(made * read), rtol=1e-5)


def test_fpgm_measures_distances_of_complex_filters() -> None:
    model = complex_linear()
    x = torch.randn(2, 3, dtype=torch.complex64)
    (score,) = score_groups(model, analyse(model, x).groups, "fpgm")
    rows = model[0].weight.detach()
    sums = [sum(torch.linalg.vector_norm(u - v) for v in rows) for u in rows]
    np.testing.assert_allclose(score, scaled(torch.stack(sums)), rtol=1e-5)


def test_weights_of_integers_have_a_norm() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.arange(18, dtype=torch.int8).view(6, 3))
            self.fc = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(F.linear(x, self.codes.to(x.dtype))))

    model = Quantised()
    groups = analyse(model, torch.randn(2, 3)).groups
    (score,) = score_groups(model, groups, magnitude(members="makers", normalise=False))
    np.testing.assert_array_equal(score, [3, 12, 21, 30, 39, 48])


def test_a_complex_weight_that_is_not_finite_is_named() -> None:
    model = complex_linear()
    groups = analyse(model, torch.randn(2, 3, dtype=torch.complex64)).groups
    with torch.no_grad():
        model[1].weight[0, 0] = complex(1, math.nan)
    with pytest.raises(InvalidArgumentError, match=r"'1\.weight' contains NaN or Inf"):
        score_groups(model, groups, "l1")

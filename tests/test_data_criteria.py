"""Criteria that need data: against sums, gradients and quadratic forms written out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import network, randomised
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext import criteria
from chanprune_ext.analysis import analyse
from chanprune_ext.criteria import score_groups
from chanprune_ext.errors import InvalidArgumentError


class Block(nn.Module):
    """A stem, a residual convolution, and an inner layer that two others read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.inner = nn.Conv2d(5, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        self.back = nn.Conv2d(6, 5, 3, padding=1)
        self.head = nn.Linear(6, 4)
        self.last = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.norm(self.inner(x)).relu()
        x = x + self.back(y)
        return self.head(y.mean((2, 3))) + self.last(x.mean((2, 3)))


def block() -> tuple[nn.Module, Any, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = randomised(Block()).double()
    batches = [(torch.randn(4, 3, 6, 6).double(), torch.randint(0, 4, (4,))) for _ in range(2)]
    return model, analyse(model, batches[0][0]).groups, batches


def inner(groups: Any) -> int:
    return next(i for i, g in enumerate(groups) if g.name == "inner")


def gated(model: nn.Module, x: Tensor, gate: Tensor) -> Tensor:
    """The network with a factor on each inner channel."""
    x = model.stem(x).relu()
    y = model.norm(model.inner(x)).relu() * gate[:, None, None]
    return model.head(y.mean((2, 3))) + model.last((x + model.back(y)).mean((2, 3)))


def test_taylor_is_the_squared_derivative_by_a_gate_on_the_channel() -> None:
    model, groups, batches = block()
    scores = score_groups(model, groups, criteria.taylor(batches))
    expected = np.zeros(6)
    for x, y in batches:
        gate = torch.ones(6, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(F.cross_entropy(gated(model, x, gate), y), gate)
        expected += slope.numpy() ** 2 / 2
    np.testing.assert_allclose(scores[inner(groups)], expected, rtol=1e-9)


def test_hessian_is_the_second_order_change_on_average_over_signs() -> None:
    model, groups, batches = block()
    many = criteria.hessian(batches[:1], probes=400)
    (found,) = score_groups(model, [groups[inner(groups)]], many)
    x, y = batches[0]
    one = torch.ones(6, dtype=torch.float64)

    def loss(gate: Tensor) -> Tensor:
        return F.cross_entropy(gated(model, x, gate), y)

    slope = torch.autograd.functional.jacobian(loss, one)
    curvature = torch.autograd.functional.hessian(loss, one).diagonal()
    expected = (-slope + curvature / 2).numpy()
    np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())


def test_hessian_of_a_quadratic_predicts_the_loss_exactly() -> None:
    """Units that do not interact: one probe is exact, and the score is the true increase."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, bias=False)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])))
    x, y = torch.randn(8, 3).double(), torch.randn(8, 4).double()
    groups = analyse(model, x).groups
    (score,) = score_groups(model, groups, criteria.hessian([(x, y)], F.mse_loss))
    before = F.mse_loss(model(x), y)
    for unit in range(4):
        cut = model[1].weight.detach().clone()
        cut[:, unit] = 0
        after = F.mse_loss(F.linear(model[0](x), cut), y)
        assert score[unit] == pytest.approx((after - before).item(), rel=1e-9)


@pytest.mark.parametrize("statistic", ["mean", "std", "apoz"])
def test_activation_statistics(statistic: str) -> None:
    model, groups, batches = block()
    criterion = criteria.activation([x for x, _ in batches], statistic)
    found = score_groups(model, groups, criterion)[inner(groups)]
    with torch.no_grad():
        y = torch.cat([model.norm(model.inner(model.stem(x).relu())).relu() for x, _ in batches])

    def measure(values: Tensor) -> np.ndarray:
        rows = values.transpose(0, 1).flatten(1)
        measured = {
            "mean": rows.abs().mean(1),
            "std": rows.std(1, correction=0),
            "apoz": (rows != 0).double().mean(1),
        }[statistic]
        return (measured / measured.mean()).numpy()

    # The convolution reads all positions, the head their mean.
    expected = (measure(y) + measure(y.mean((2, 3)))) / 2
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_fluctuation_is_the_error_of_replacing_a_channel_by_its_mean() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    x = torch.randn(200, 3).double()
    (score,) = score_groups(model, analyse(model, x).groups, criteria.fluctuation(x))
    with torch.no_grad():
        hidden = model[:2](x)
        errors = []
        for unit in range(6):
            fixed = hidden.clone()
            fixed[:, unit] = hidden[:, unit].mean()
            errors.append((model[2](hidden) - model[2](fixed)).square().sum(1).mean())
    errors = torch.stack(errors)
    np.testing.assert_allclose(score, (errors / errors.mean()).numpy(), rtol=1e-9)


class ByKeyword(nn.Module):
    """Gives a layer its input by keyword."""

    def __init__(self, first: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = first, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(input=self.first(x).relu())


def test_layers_called_with_keywords_are_watched_too() -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(3, 6), nn.Linear(6, 4)
    x = torch.randn(50, 3)
    models = nn.Sequential(first, nn.ReLU(), last), ByKeyword(first, last)
    for criterion in (criteria.activation(x), criteria.fluctuation(x)):
        (a,), (b,) = (score_groups(m, analyse(m, x).groups, criterion) for m in models)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("make", [criteria.taylor, criteria.hessian])
def test_gradients_inside_inference_mode(make: Any) -> None:
    model, groups, batches = block()
    expected = score_groups(model, groups, make(batches))
    with torch.inference_mode():
        copies = [(x.clone(), y.clone()) for x, y in batches]
        found = score_groups(model, groups, make(copies))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b)


def test_weights_made_in_inference_mode_have_no_gradients() -> None:
    _, groups, batches = block()
    with torch.inference_mode():
        made = Block().double()
    with pytest.raises(InvalidArgumentError, match="made inside torch"):
        score_groups(made, groups, criteria.taylor(batches))


def grouped() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU()]
    layers += [nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * 16, 5)), torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("name", ["shufflenet_v2_x1_0", "grouped"])
@pytest.mark.parametrize("which", ["taylor", "hessian", "activation", "fluctuation"])
def test_every_group_of_real_networks_gets_scores(name: str, which: str) -> None:
    model, inputs = grouped() if name == "grouped" else network(name)
    groups = analyse(model, inputs).groups
    labelled = [(inputs, torch.tensor([1, 2]))]
    data = labelled if which in ("taylor", "hessian") else [inputs]
    scores = score_groups(model, groups, getattr(criteria, which)(data))
    assert [s.shape for s in scores] == [(g.units,) for g in groups]
    assert all(s.std() > 0 for s in scores if len(s) > 1)


@pytest.mark.parametrize("which", ["taylor", "activation", "fluctuation"])
def test_heads_and_mlps_of_a_transformer_get_scores(which: str) -> None:
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = randomised(VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=7))
    nn.init.normal_(model.heads.head.weight)  # zero as torchvision makes it
    x = torch.randn(2, 3, 32, 32)
    data = [(x, torch.tensor([1, 2]))] if which == "taylor" else [x]
    groups = analyse(model, x).groups
    assert {g.kind for g in groups} >= {"heads", "head_dim", "mlp", "residual"}
    scores = score_groups(model, groups, getattr(criteria, which)(data))
    assert all(s.std() > 0 for s in scores)


def test_a_criterion_with_data_makes_a_plan() -> None:
    model, _, batches = block()
    model = model.float()
    data = [(x.float(), y) for x, y in batches]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.stem.weight.requires_grad_(False)
    model.back.weight.requires_grad_(False)
    model.train()
    plan = cpx.plan(model, data[0][0], 0.5, criterion=criteria.taylor(data))
    assert plan.criterion == "taylor"
    assert plan.kept["inner.weight"][0].numel() == 3
    assert model.training
    assert not model.back.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ("taylor", r"'taylor' needs data: give .*criteria.taylor\(batches\)"),
        ("magic", "criterion must be one of l1, .* or a function"),
        (criteria.taylor([]), "expected at least one batch"),
        (criteria.taylor([torch.zeros(2, 3, 6, 6).double()]), r"expected pairs \(inputs, labels\)"),
        (
            criteria.taylor([(torch.zeros(2, 3, 6, 6).double(), None)]),
            "loss_fn: needed for outputs and labels",
        ),
        (
            criteria.taylor([(torch.zeros(2, 3, 6, 6).double(), None)], lambda out, _: out),
            r"loss_fn must return a scalar tensor, got a tensor of shape \[2, 4\]",
        ),
        (
            criteria.taylor(
                [(torch.zeros(2, 3, 6, 6).double(), None)], lambda out, _: out.sum().detach()
            ),
            "loss_fn: the loss it returned has no gradient",
        ),
        (criteria.activation([]), "expected at least one batch"),
    ],
)
def test_what_is_missing_is_named(criterion: Any, message: str) -> None:
    model, groups, _ = block()
    with pytest.raises(InvalidArgumentError, match=message):
        score_groups(model, groups, criterion)


def test_settings_outside_their_range() -> None:
    for make, message in (
        (lambda: criteria.activation([], "median"), "statistic must be one of mean, std, apoz"),
        (lambda: criteria.hessian([], probes=0), "probes must be at least 1"),
        (lambda: criteria.magnitude(3), "p must be 1, 2 or math.inf"),
        (lambda: criteria.magnitude(members="all"), "members must be one of makers, readers, both"),
        (lambda: criteria.magnitude(reduction="median"), "reduction must be one of sum, mean, max"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            make()


class Pairs(nn.Module):
    """A linear layer on complex numbers, written with pairs of real ones."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.pairs = nn.Parameter(torch.view_as_real(layer.weight.detach()).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.view_as_complex(self.pairs))


def complex_and_pairs() -> tuple[nn.Module, nn.Module, Tensor]:
    """The same network twice; units only differ by what reads them."""
    torch.manual_seed(0)
    one, two = (nn.Linear(n, m, False, dtype=torch.complex128) for n, m in ((3, 6), (6, 4)))
    inputs = torch.randn(40, 3, dtype=torch.complex128)
    return nn.Sequential(one, two), nn.Sequential(one, Pairs(two)), inputs


def energy(output: Tensor, _: Any) -> Tensor:
    return (output.abs() + 1).log().mean()


@pytest.mark.parametrize("make", [criteria.taylor, criteria.hessian])
def test_losses_by_complex_weights_are_those_by_pairs_of_real_ones(make: Any) -> None:
    model, pairs, x = complex_and_pairs()
    criterion = make([(x, None)], energy)
    scores = [score_groups(m, analyse(m, x).groups, criterion)[0] for m in (model, pairs)]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-9)


def test_statistics_of_complex_activations() -> None:
    model, _, x = complex_and_pairs()
    groups = analyse(model, x).groups
    with torch.no_grad():
        hidden = model[0](x)
    spread = torch.view_as_real(hidden).var(0, correction=0).sum(1)
    readers = model[1].weight.detach().abs().square().sum(0)
    for criterion, expected in (
        (criteria.activation(x, "mean"), hidden.abs().mean(0)),
        (criteria.activation(x, "std"), spread.sqrt()),
        (criteria.activation(x, "apoz"), torch.ones(6).double()),
        (criteria.fluctuation(x), spread * readers),
    ):
        (score,) = score_groups(model, groups, criterion)
        np.testing.assert_allclose(score, (expected / expected.mean()).numpy(), rtol=1e-9)

"""Sensitivity curves equal what pruning one group alone does."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import chanprune_ext as cpx
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.models import resnet20
from chanprune_ext.sensitivity import sensitivity


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return resnet20(width=8).eval()


def test_a_curve_is_the_error_of_pruning_that_group_alone(model: nn.Module) -> None:
    x = torch.randn(6, 3, 32, 32)
    found = sensitivity(model, x[:1], [x[:4], x[4:]], ratios=(0.25, 0.5))
    assert found.samples == 6
    assert [c.group for c in found.curves][:2] == ["conv1", "layer1.0.conv1"]
    for curve in found.curves[:3]:
        for ratio, removed, error in zip(found.ratios, curve.removed, curve.error, strict=True):
            pruned = cpx.prune(model, x[:1], 0.0, ratios={curve.group: ratio})
            plan = cpx.plan_of(pruned)
            assert plan is not None
            group = next(g for g in plan.groups if g.name == curve.group)
            assert group.width_before - group.width_after == removed
            with torch.no_grad():
                expected = (pruned(x) - model(x)).norm() / model(x).norm()
            assert error == pytest.approx(float(expected), rel=1e-4)


def test_the_model_is_left_untouched_and_errors_do_not_add_up(model: nn.Module) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 3, 32, 32)
    once = sensitivity(model, x[:1], x, ratios=(0.5,))
    twice = sensitivity(model, x[:1], x, ratios=(0.25, 0.5))
    assert [c.error[0] for c in once.curves] == [c.error[1] for c in twice.curves]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_groups_that_a_layer_normalises_over_are_named_not_measured() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3))
    found = sensitivity(net, torch.randn(2, 6), torch.randn(4, 6), ratios=(0.5,))
    assert found.skipped == ("0",)
    assert [c.group for c in found.curves] == ["2"]


def test_json(model: nn.Module, tmp_path) -> None:
    x = torch.randn(2, 3, 32, 32)
    found = sensitivity(model, x[:1], x, ratios=(0.5,))
    found.save(tmp_path / "curves.json")
    data = json.loads((tmp_path / "curves.json").read_text())
    assert data["curves"][0]["error"] == list(found.curves[0].error)
    assert data["curves"][0]["kl"][0] >= 0
    assert "conv1" in str(found)


@pytest.mark.parametrize("ratios", [(), (0.0,), (1.0,), (0.5, 0.25)])
def test_ratios_out_of_range(model: nn.Module, ratios: tuple[float, ...]) -> None:
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(InvalidArgumentError, match="ratios must rise"):
        sensitivity(model, x, x, ratios=ratios)

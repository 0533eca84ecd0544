"""Sensitivity curves equal what pruning one group alone does."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import chanprune_ext as cpx
from chanprune_ext.errors import CheckpointError, InvalidArgumentError, NothingToPruneError
from chanprune_ext.models import resnet20
from chanprune_ext.sensitivity import Sensitivity, sensitivity


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


def test_accuracy_is_measured_where_batches_have_labels(model: nn.Module) -> None:
    x, y = torch.randn(12, 3, 32, 32), torch.arange(12) % 10
    found = sensitivity(model, x[:1], [(x[:8], y[:8]), (x[8:], y[8:])], ratios=(0.5,))
    with torch.no_grad():
        assert found.accuracy == (model(x).argmax(1) == y).double().mean().item()
        (curve,) = [c for c in found.curves if c.group == "layer1.1.conv1"]
        pruned = cpx.prune(model, x[:1], 0.0, ratios={"layer1.1.conv1": 0.5})
        assert curve.accuracy == ((pruned(x).argmax(1) == y).double().mean().item(),)
    assert sensitivity(model, x[:1], [x], ratios=(0.5,)).accuracy is None


def test_compensated_points_are_those_of_compensating_that_group_alone() -> None:
    torch.manual_seed(0)
    net = resnet8()
    x, calibration = torch.randn(16, 3, 8, 8), torch.randn(32, 3, 8, 8)
    found = sensitivity(net, x[:1], x, ratios=(0.5,), calibration=calibration)
    # The second group's first producer also makes channels of the first: option-A shortcuts.
    for curve in found.curves:
        assert curve.compensated is not None
        assert curve.compensated.error[0] < curve.error[0]
    curve = next(c for c in found.curves if c.group == "layer2.0.conv1")
    pruned = cpx.prune(net, x[:1], 0.0, ratios={curve.group: 0.5})
    cpx.compensate(pruned, net, calibration, progress=False)
    with torch.no_grad():
        expected = (pruned.eval()(x) - net(x)).norm() / net(x).norm()
    assert curve.compensated is not None
    assert curve.compensated.error[0] == pytest.approx(float(expected), rel=1e-3)


def plain() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    )


def resnet8() -> nn.Module:
    from models import randomised

    from chanprune_ext.models import CifarResNet

    return randomised(CifarResNet(8, width=8))


def test_curves_are_read_back(model: nn.Module, tmp_path) -> None:
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    net = plain()
    found = sensitivity(net, x[:1], [(x, y)], ratios=(0.5,), calibration=torch.randn(20, 3, 8, 8))
    found.save(tmp_path / "curves.json")
    assert Sensitivity.load(tmp_path / "curves.json") == found
    for text, message in (("", "cannot read curves"), ("{}", "no sensitivity curves: 'curves'")):
        (tmp_path / "curves.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            Sensitivity.load(tmp_path / "curves.json")


def test_the_report_draws_the_curves(tmp_path) -> None:
    from chanprune_ext.report import RunReport, Stage, load_report, write_report

    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    net = plain()
    for batches, calibration, expected in (
        ([(x, y)], torch.randn(20, 3, 8, 8), ("accuracy (%), as cut", "accuracy (%), compens")),
        ([x], None, ("KL divergence (nats), as cut",)),
    ):
        found = sensitivity(net, x[:1], batches, ratios=(0.25, 0.5), calibration=calibration)
        stage = Stage("original", 0.5, 0.1, 4, 10, 10)
        report = RunReport("t", "c", "now", (stage,), sensitivity=found.to_dict())
        page = write_report(report, tmp_path).read_text()
        for words in expected:
            assert words in page
        for curve in found.curves:
            assert f"<title>{curve.group} (25%: " in page
        restored = load_report(tmp_path / "report.json")
        assert Sensitivity.from_dict(restored.sensitivity) == found


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


class SelfAttention(nn.Module):
    """Heads and their width are made by one layer: two groups of one name."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.head, self.heads = nn.Linear(16, 5), 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head((x + self.out(mixed.transpose(1, 2).reshape(n, t, -1))).mean(1))


def test_groups_of_one_name_are_measured_apart() -> None:
    torch.manual_seed(0)
    net, x, calibration = SelfAttention().eval(), torch.randn(40, 6, 16), torch.randn(60, 6, 16)
    found = sensitivity(net, x[:2], x, ratios=(0.5,), calibration=calibration)
    assert [(c.group, c.kind) for c in found.curves] == [("qkv", "heads"), ("qkv", "head_dim")]
    assert "qkv (heads)" in str(found)
    assert "qkv (head_dim)" in str(found)
    for curve in found.curves:
        pruned = cpx.prune(net, x[:2], 0.5, kinds=curve.kind)
        cpx.compensate(pruned, net, calibration, progress=False)
        with torch.no_grad():
            expected = (pruned(x) - net(x)).norm() / net(x).norm()
        assert curve.compensated is not None
        assert curve.compensated.error[0] == pytest.approx(float(expected), rel=1e-3)


def test_files_without_kinds_are_read(model: nn.Module) -> None:
    x = torch.randn(1, 3, 32, 32)
    data = sensitivity(model, x, x, ratios=(0.5,)).to_dict()
    for curve in data["curves"]:
        del curve["kind"]
    assert Sensitivity.from_dict(data).curves[0].kind == ""


def test_as_many_go_as_a_plan_takes() -> None:
    net, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(6, 4)
    (curve,) = sensitivity(net, x, x, ratios=(0.5,)).curves
    assert curve.removed == (5 - cpx.prune(net, x, 0.5)[0].out_features,)


class TiedBySize(nn.Module):
    """Two layers whose channels are counted by one number that follows both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.reads_a, self.reads_b = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([self.a(x), self.b(x)], 1)
        first, second = y.chunk(2, 1)
        return (self.reads_a(first) + torch.relu(self.reads_b(second))).mean((2, 3))


def test_a_group_that_is_tied_to_another_has_a_curve_without_compensation() -> None:
    torch.manual_seed(0)
    net, x = TiedBySize().eval(), torch.randn(16, 3, 4, 4)
    with pytest.raises(NothingToPruneError):  # halves stay equal: neither goes alone
        cpx.plan(net, x[:1], 0.0, ratios={"a": 0.5})
    found = sensitivity(net, x[:1], x, ratios=(0.5,), calibration=torch.randn(32, 3, 4, 4))
    curves = {curve.group: curve for curve in found.curves}
    assert {"a", "b"} <= curves.keys()
    for name in ("a", "b"):
        assert curves[name].error[0] > 0
        assert curves[name].compensated is None
    assert Sensitivity.from_dict(found.to_dict()) == found

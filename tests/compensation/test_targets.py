"""Which value each layer aims at, and what ends the way there."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from small_networks import InvertedResidual, ResidualBlock, seeded_norm
from torch import nn

from chanprune_ext.analysis.call_trace import record_calls
from chanprune_ext.analysis.calls import steady_calls
from chanprune_ext.compensation.survey import survey_calls
from chanprune_ext.compensation.targets import find_targets


def targets_of(model: nn.Module, x: torch.Tensor):
    """Weight entry -> (name of the call that makes its target, target, layer), and the skipped."""
    with steady_calls(model):
        trace, survey = record_calls(model, x), survey_calls(model, x)
    targets, skipped = find_targets(trace, survey, {})
    found = {
        layer.entry: (trace.calls[target.call].name, target, layer)
        for target in targets
        for layer in target.layers
    }
    return found, skipped


class Behind(nn.Module):
    """A convolution and what a function does to its output."""

    def __init__(self, function):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = seeded_norm(4)
        self.other = nn.Parameter(torch.randn(1, 4, 6, 6))
        self.function = function

    def forward(self, x):
        return self.function(self, self.conv(x))


def one(function):
    found, _ = targets_of(Behind(function), torch.randn(2, 3, 6, 6))
    return found["conv.weight"]


INFINITY = math.inf


@pytest.mark.parametrize(
    ("function", "name", "bounds"),
    [
        (lambda m, y: torch.relu(y), "conv2d", (0, INFINITY)),
        (lambda m, y: F.relu_(m.norm(y)), "batch_norm", (0, INFINITY)),
        (lambda m, y: F.relu6(m.norm(y)), "batch_norm", (0, 6)),
        (lambda m, y: F.hardtanh(y + m.other, -2, 3), "add", (-2, 3)),
        (lambda m, y: F.hardtanh(m.other - y), "sub", (-1, 1)),
        (lambda m, y: F.gelu(m.norm(y) + m.other), "add", None),
        (lambda m, y: torch.tanh(F.dropout(m.norm(y), 0.5, False)), "dropout", None),
        (lambda m, y: torch.tanh(m.norm(y).add_(m.other)), "add_", None),
        (lambda m, y: torch.relu(y.contiguous()), "contiguous", (0, INFINITY)),
        # What is none of these steps ends the way.
        (lambda m, y: torch.tanh(m.norm(y) * m.other), "batch_norm", None),
        (lambda m, y: torch.tanh(F.dropout(y, 0.5, True)), "conv2d", None),
        (lambda m, y: torch.tanh(torch.add(m.other, y, alpha=2)), "conv2d", None),
        (lambda m, y: torch.tanh(y + y), "conv2d", None),
        (lambda m, y: torch.tanh(y + torch.ones(3, 1, 1, 1, 1)), "conv2d", None),
        (lambda m, y: torch.tanh(F.batch_norm(y, None, None, training=True)), "conv2d", None),
        (lambda m, y: torch.relu(m.norm(y)) + y, "conv2d", None),
        (lambda m, y: torch.relu(y) + y.relu(), "conv2d", None),
        (lambda m, y: torch.tanh(m.norm(y.transpose(2, 3))), "conv2d", None),
    ],
)
def test_where_the_way_ends(function, name, bounds):
    found, target, _ = one(function)
    assert (found, target.bounds) == (name, bounds)
    assert not target.is_output


def test_returned_value_is_not_passed():
    found, target, _ = one(lambda m, y: (y, torch.relu(m.norm(y))))
    assert found == "conv2d"
    assert target.is_output
    assert target.bounds is None


def test_scale_is_what_a_change_is_multiplied_by():
    model = Behind(lambda m, y: torch.tanh(m.other - m.norm(m.norm(y) + m.other)))
    x = torch.randn(2, 3, 6, 6)
    found, _ = targets_of(model, x)
    name, _, layer = found["conv.weight"]
    assert name == "sub"
    model.eval()
    with torch.no_grad():
        y = model.conv(x)

        def before_tanh(value):
            return model.other - model.norm(model.norm(value) + model.other)

        change = torch.randn(4).view(1, 4, 1, 1)
        moved = before_tanh(y + change) - before_tanh(y)
    assert torch.allclose(moved, (change * layer.scale.float().view(1, 4, 1, 1)), atol=1e-5)


def test_intercept_goes_to_the_bias_or_to_a_norm_of_its_own():
    _, _, with_bias = one(lambda m, y: torch.relu(m.norm(y)))
    assert with_bias.bias is not None
    assert with_bias.mean is None
    block = ResidualBlock(4, 6)
    found, _ = targets_of(block, torch.randn(2, 4, 6, 6))
    assert found["conv1.weight"][2].mean is block.bn1.running_mean
    assert found["conv2.weight"][2].mean is block.bn2.running_mean

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False)
            self.norm = seeded_norm(4)

        def forward(self, x):
            return torch.relu(self.norm(self.b(torch.relu(self.norm(self.a(x))))))

    found, _ = targets_of(Twice(), torch.randn(2, 3, 4, 4))
    assert not found["a.weight"][2].holds_intercept
    assert not found["b.weight"][2].holds_intercept


def test_residual_blocks():
    found, _ = targets_of(ResidualBlock(4, 6, out=8), torch.randn(2, 4, 6, 6))
    names = {entry: name for entry, (name, _, _) in found.items()}
    assert names == {"conv1.weight": "batch_norm", "conv2.weight": "add_", "skip.weight": "add_"}
    assert found["conv2.weight"][1] is found["skip.weight"][1]
    assert found["conv2.weight"][1].bounds == (0, INFINITY)

    found, _ = targets_of(InvertedResidual(), torch.randn(2, 4, 6, 6))
    kinds = {entry: (name, layer.kind) for entry, (name, _, layer) in found.items()}
    assert kinds == {
        "expand.weight": ("batch_norm", "conv2d"),
        "depthwise.weight": ("batch_norm", "depthwise conv2d"),
        "project.weight": ("add", "conv2d"),
    }
    assert found["expand.weight"][1].bounds == (0, 6)


def test_linear_layers_behind_tokens():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
            self.norm = nn.LayerNorm(6)

        def forward(self, x):
            return self.norm(x + self.down(F.relu(self.up(x))))

    found, _ = targets_of(Mlp(), torch.randn(2, 5, 6))
    assert found["up.weight"][0] == "linear"
    assert found["up.weight"][1].bounds == (0, INFINITY)
    assert found["down.weight"][0] == "add"


def test_norm_over_another_axis_ends_the_way():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(7), nn.ReLU())
    found, _ = targets_of(model, torch.randn(3, 7, 6))
    assert found["0.weight"][0] == "linear"
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU())
    found, _ = targets_of(model, torch.randn(3, 6))
    assert found["0.weight"][0] == "batch_norm"


def test_norm_with_zero_scale_leaves_nothing_to_fit():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    nn.init.zeros_(model[1].weight)
    found, skipped = targets_of(model, torch.randn(2, 3, 4, 4))
    assert not found
    assert [layer.reason for layer in skipped] == ["its output is scaled to zero"]


def test_complex_weight_is_left_alone():
    model = nn.Conv2d(2, 2, 1, dtype=torch.complex64)
    found, skipped = targets_of(model, torch.randn(1, 2, 3, 3, dtype=torch.complex64))
    assert not found
    assert skipped[0].reason == "its weight is torch.complex64"

"""Where nothing is lost, everything comes back: float64, to round-off."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from small_networks import (
    ConcatNet,
    InvertedResidual,
    ResidualBlock,
    cut,
    duplicate_channels,
    rows,
    seeded_norm,
)
from torch import Tensor, nn

from chanprune_ext.compensation import CompensationReport, compensate

NOTHING = SimpleNamespace(kept={})


@pytest.fixture(autouse=True)
def _double_precision():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def worst(pruned: nn.Module, original: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        difference = pruned.eval()(x) - original.eval()(x)
        return float(difference.abs().max() / original(x).abs().max())


def refitted(report: CompensationReport) -> list[str]:
    return [layer.module for layer in report.layers if layer.skipped is None]


LAYERS = {
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 7, 7)),
    "stride": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 9, 8)),
    "dilation": (lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2), (4, 9, 9)),
    "uneven": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(0, 1)), (4, 7, 8)),
    "same": (lambda: nn.Conv2d(4, 6, 4, padding="same"), (4, 8, 8)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 7, 7)),
    "no bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), (4, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (4, 8, 8)),
    "depth multiplier": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (4, 8, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 20)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 5, 5, 5)),
    "linear": (lambda: nn.Linear(9, 6), (9,)),
    "linear without bias": (lambda: nn.Linear(9, 6, bias=False), (9,)),
    "linear on tokens": (lambda: nn.Linear(9, 6), (5, 9)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_is_solved_exactly(name):
    make, shape = LAYERS[name]
    original = nn.Sequential(make(), nn.Tanh())
    pruned = copy.deepcopy(original)
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter += torch.randn_like(parameter)
    x = torch.randn(60, *shape)
    report = compensate(pruned, original, x, plan=NOTHING, ridge=0.0)
    assert refitted(report) == ["0"]
    assert worst(pruned, original, torch.randn(5, *shape)) < 1e-8


def test_unbatched_convolution_input():
    class Squeezed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return torch.tanh(self.conv(x.squeeze(0)))

    original = Squeezed()
    pruned = copy.deepcopy(original)
    nn.init.normal_(pruned.conv.weight)
    batches = [torch.randn(1, 3, 20, 20) for _ in range(4)]
    compensate(pruned, original, batches, plan=NOTHING, ridge=0.0, memory_limit=10**9)
    assert worst(pruned, original, torch.randn(1, 3, 9, 9)) < 1e-8


def test_duplicated_channels_of_a_plain_chain():
    original = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.Tanh())
    duplicate_channels(original[0].weight, original[0].bias, 4)
    keep = [0, 1, 2, 3]
    pruned, plan = cut(original, rows("0.weight", "0.bias", keep=keep) | {"2.weight": {1: keep}})
    x = torch.randn(40, 3, 9, 9)
    assert worst(pruned, original, x) > 0.1
    report = compensate(pruned, original, x, plan=plan, ridge=0.0)
    assert worst(pruned, original, x) < 1e-8
    assert refitted(report) == ["2"]
    assert {layer.module: layer.skipped for layer in report.layers}["0"] == "nothing to repair"


def test_constant_channel_goes_into_the_batch_norm_behind():
    original = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False), seeded_norm(5), nn.Tanh()
    )
    with torch.no_grad():
        original[0].weight[3] = 0
        original[0].bias[3] = 2.0
    keep = [0, 1, 2]
    pruned, plan = cut(original, rows("0.weight", "0.bias", keep=keep) | {"2.weight": {1: keep}})
    before = {name: value.clone() for name, value in pruned[3].state_dict().items()}
    x = torch.randn(40, 3, 6, 6)
    compensate(pruned, original, x, plan=plan, ridge=0.0)
    assert worst(pruned, original, x) < 1e-8
    changed = {n for n, v in pruned[3].state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {"running_mean"}


def test_without_bias_and_without_norm_there_is_no_intercept():
    original = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 5, 3, bias=False)
    )
    duplicate_channels(original[0].weight, None, 4)
    keep = [0, 1, 2, 3]
    pruned, plan = cut(original, rows("0.weight", keep=keep) | {"2.weight": {1: keep}})
    x = torch.randn(40, 3, 9, 9)
    compensate(pruned, original, x, plan=plan, ridge=0.0)
    assert worst(pruned, original, x) < 1e-8
    assert pruned[2].bias is None


def test_residual_block_repairs_what_comes_through_the_skip():
    # The skip of the pruned block lost a channel's worth of signal which conv2's input still has.
    original = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), ResidualBlock(6, 12))
    block = original[1]
    with torch.no_grad():
        block.conv1.weight.zero_()
        for i in range(
            6
        ):  # the inner channels carry x and -x, so conv2 can form any linear map of x
            block.conv1.weight[i, i, 1, 1] = 1.0
            block.conv1.weight[6 + i, i, 1, 1] = -1.0
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            getattr(block.bn1, name).fill_(value)
    pruned = copy.deepcopy(original)
    with torch.no_grad():
        pruned[0].weight *= 1.3
        pruned[0].bias *= 1.3
    x = torch.randn(60, 3, 8, 8)
    report = compensate(
        pruned, original, x, plan=NOTHING, ridge=0.0, refit_producers=True, refit_classifier=True
    )
    assert worst(pruned, original, x) < 1e-8
    # Everything is right again after the first layer; with that one left alone, conv2 does it.
    assert refitted(report) == ["0"]
    frozen = copy.deepcopy(original)
    with torch.no_grad():
        frozen[0].weight *= 1.3
        frozen[0].bias *= 1.3
    plan = SimpleNamespace(kept={"1.conv2.weight": {1: torch.arange(12)}})
    report = compensate(frozen, original, x, plan=plan, ridge=0.0, refit_producers=False)
    assert refitted(report) == ["1.conv2"]
    assert worst(frozen, original, x) < 1e-8


def test_two_layers_of_one_sum_are_fitted_together():
    original = nn.Sequential(nn.Conv2d(3, 6, 3), ResidualBlock(6, 8, out=9))
    pruned = copy.deepcopy(original)
    with torch.no_grad():
        pruned[1].skip.weight += torch.randn_like(pruned[1].skip.weight)
        pruned[1].conv2.weight += torch.randn_like(pruned[1].conv2.weight)
    x = torch.randn(60, 3, 10, 10)
    report = compensate(pruned, original, x, plan=NOTHING, ridge=0.0)
    assert refitted(report) == ["1.conv2", "1.skip"]
    assert worst(pruned, original, x) < 1e-8


def test_concatenated_inputs():
    original = ConcatNet()
    duplicate_channels(original.left.weight, original.left.bias, 3)
    keep = [0, 1, 2]
    pruned, plan = cut(
        original,
        rows("left.weight", "left.bias", keep=keep) | {"mix.weight": {1: [*keep, *range(6, 10)]}},
    )
    x = torch.randn(60, 3, 8, 8)
    compensate(pruned, original, x, plan=plan, ridge=0.0)
    assert worst(pruned, original, x) < 1e-8


def test_inverted_residual_with_depthwise_convolution():
    original = nn.Sequential(nn.Conv2d(3, 4, 3), InvertedResidual())
    block = original[1]
    for norm in (block.norm1, block.norm2):  # duplicates must stay duplicates through ReLU6
        with torch.no_grad():
            for part in norm.state_dict().values():
                if part.ndim:
                    part[4:] = part[:4]
    with torch.no_grad():
        block.expand.weight[4:] = block.expand.weight[:4]
        block.depthwise.weight[4:] = block.depthwise.weight[:4]
    keep = [0, 1, 2, 3]
    entries = [
        f"1.{norm}.{part}"
        for norm in ("norm1", "norm2")
        for part in ("weight", "bias", "running_mean", "running_var")
    ]
    pruned, plan = cut(
        original,
        rows("1.expand.weight", "1.depthwise.weight", *entries, keep=keep)
        | {"1.project.weight": {1: keep}},
    )
    with torch.no_grad():  # the depthwise convolution has something to repair, too
        pruned[1].depthwise.weight *= 0.7
    x = torch.randn(60, 3, 9, 9)
    report = compensate(pruned, original, x, plan=plan, ridge=0.0)
    assert refitted(report) == ["1.depthwise", "1.project"]
    assert worst(pruned, original, x) < 1e-8


def test_linear_behind_flatten():
    original = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 6), nn.ReLU(), nn.Linear(6, 3)
    )
    duplicate_channels(original[0].weight, original[0].bias, 2)
    pruned, plan = cut(
        original,
        rows("0.weight", "0.bias", keep=[0, 1]) | {"3.weight": {1: list(range(18))}},
    )
    x = torch.randn(200, 2, 5, 5)
    compensate(pruned, original, x, plan=plan, ridge=0.0)
    assert worst(pruned, original, x) < 1e-8


def test_pruned_classifier_input():
    original = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    duplicate_channels(original[0].weight, original[0].bias, 4)
    keep = [0, 1, 2, 3]
    pruned, plan = cut(original, rows("0.weight", "0.bias", keep=keep) | {"2.weight": {1: keep}})
    x = torch.randn(100, 5)
    untouched = copy.deepcopy(pruned)
    report = compensate(untouched, original, x, plan=plan, refit_classifier=False)
    assert refitted(report) == []
    report = compensate(pruned, original, x, plan=plan, ridge=0.0)
    assert refitted(report) == ["2"]
    assert worst(pruned, original, x) < 1e-8


def test_subtraction_and_module_called_in_place():
    class Difference(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 4, 3)
            self.b = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return torch.relu(torch.tanh(self.a(x)) - self.b(x))

    original = Difference()
    pruned = copy.deepcopy(original)
    nn.init.normal_(pruned.b.weight)
    x = torch.randn(40, 3, 8, 8)
    compensate(pruned, original, x, plan=NOTHING, ridge=0.0, one_sided_steps=0)
    assert worst(pruned, original, x) < 1e-8

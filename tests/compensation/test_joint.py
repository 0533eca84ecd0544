"""Layers refitted for what the next one makes of their output."""

from __future__ import annotations

import copy

import pytest
import torch
from small_networks import (
    KEEP,
    InvertedResidual,
    ResidualNet,
    cut,
    cut_blocks,
    error,
    images,
    no_forward_is_left,
    rows,
    same,
    state,
)
from torch import nn

from chanprune_ext.compensation import compensate, joint


def fitted_error(original, pruned, plan, **options) -> float:
    net = copy.deepcopy(pruned)
    compensate(net, original, images(240), plan=plan, progress=False, **options)
    return error(net, original, images(60, seed=1))


@pytest.fixture
def residual():
    torch.manual_seed(0)
    original = ResidualNet().eval()
    return (original, *cut_blocks(original, KEEP))


def test_a_joint_refit_comes_closer_on_new_data(residual):
    alone = fitted_error(*residual, joint_rounds=0)
    once = fitted_error(*residual, joint_rounds=1)
    twice = fitted_error(*residual, joint_rounds=2)
    assert once < 0.9 * alone
    assert twice < 1.1 * once


@pytest.mark.parametrize("limit", [600_000, 3_000_000])
def test_little_memory_is_enough_to_gain(residual, limit):
    alone = fitted_error(*residual, joint_rounds=0)
    assert fitted_error(*residual, joint_rounds=1, memory_limit=limit) < 0.95 * alone
    assert no_forward_is_left()


def test_paused_and_repeated_forwards_agree(residual):
    """In memory the values are carried on; with less memory the forwards are run again."""
    original, pruned, plan = (m.double() if isinstance(m, nn.Module) else m for m in residual)
    x = images(30).double()
    tight = copy.deepcopy(pruned)
    compensate(pruned, original, x, plan=plan)
    compensate(tight, original, x, plan=plan, memory_limit=2_500_000)
    for a, b in zip(pruned.parameters(), tight.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


class Linear(nn.Module):
    """Two layers with a ReLU between them that never closes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.second = nn.Linear(8, 3)
        nn.init.constant_(self.first.bias, 60.0)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def test_without_a_closed_unit_two_layers_match_whatever_their_rank_allows():
    """Three outputs need no more than three of eight hidden units."""
    torch.manual_seed(0)
    original = Linear().double().eval()
    kept = rows("first.weight", "first.bias", keep=[0, 2, 5]) | {"second.weight": {1: [0, 2, 5]}}
    pruned, plan = cut(original, kept)
    x = torch.randn(400, 5, dtype=torch.float64)
    options = {"plan": plan, "progress": False, "ridge": 1e-10, "refit_classifier": True}
    fresh = torch.randn(50, 5, dtype=torch.float64)
    errors = []
    for rounds in (0, 1):
        net = copy.deepcopy(pruned)
        compensate(net, original, x, joint_rounds=rounds, **options)
        errors.append(error(net, original, fresh))
    assert errors[1] < 0.4 * errors[0], errors


class Inverted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = InvertedResidual()

    def forward(self, x):
        return self.block(torch.tanh(self.stem(x)))


def test_depthwise_layers_on_either_side_of_a_clamp():
    torch.manual_seed(1)
    original = Inverted().eval()
    keep = [0, 1, 3, 4, 6]
    norms = ("weight", "bias", "running_mean", "running_var")
    kept = rows(
        "block.expand.weight",
        "block.depthwise.weight",
        *(f"block.{norm}.{part}" for norm in ("norm1", "norm2") for part in norms),
        keep=keep,
    )
    pruned, plan = cut(original, kept | {"block.project.weight": {1: keep}})
    alone = fitted_error(original, pruned, plan, joint_rounds=0)
    assert fitted_error(original, pruned, plan, joint_rounds=1) < 0.97 * alone


class Shared(ResidualNet):
    """What comes through the clamp is also read by a second layer."""

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head((self.blocks[0](x) + self.blocks[1](x)).mean((2, 3)))


def test_what_others_read_too_is_not_changed_for_one_reader():
    torch.manual_seed(0)
    original = Shared(blocks=2).eval()
    pruned, plan = cut_blocks(original, KEEP)
    compensate(pruned, original, images(200), plan=plan, progress=False)
    # The stem's channels were all kept, and it has nothing to repair.
    assert torch.equal(pruned.stem.weight, original.stem.weight)


def test_an_error_on_the_way_puts_everything_back(residual, monkeypatch):
    original, pruned, plan = residual
    before = state(pruned)
    monkeypatch.setattr(
        "chanprune_ext.compensation.joint._gauss_newton",
        lambda *_: (_ for _ in ()).throw(RuntimeError("on purpose")),
    )
    with pytest.raises(RuntimeError, match="on purpose"):
        compensate(pruned, original, images(), plan=plan, progress=False)
    assert same(before, state(pruned))
    assert no_forward_is_left()


def test_layers_with_nothing_to_repair_behind_them_are_not_refitted(residual, monkeypatch):
    """Up to the first block that was pruned both networks compute the same."""
    original, _, _ = residual
    norm = [f"bn1.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
    kept = rows(*(f"blocks.2.{name}" for name in ("conv1.weight", *norm)), keep=KEEP)
    pruned, plan = cut(original, kept | {"blocks.2.conv2.weight": {1: KEEP}})
    refitted = []
    step = joint._gauss_newton
    monkeypatch.setattr(
        joint,
        "_gauss_newton",
        lambda map_, *rest: refitted.append(map_.pair.first.module) or step(map_, *rest),
    )
    compensate(pruned, original, images(60), plan=plan, progress=False)
    assert set(refitted) == {"blocks.2.conv1"}


@pytest.mark.parametrize("rounds", [-1, 1.5])
def test_rounds_out_of_range(residual, rounds):
    original, pruned, plan = residual
    with pytest.raises(ValueError, match="joint_rounds"):
        compensate(pruned, original, images(), plan=plan, joint_rounds=rounds)


def test_half_precision_networks_gain_too(residual):
    original, pruned, plan = (m.bfloat16() if isinstance(m, nn.Module) else m for m in residual)
    errors = [0.0, 0.0]
    # Of one draw, rounding of the weights to bfloat16 may cost as much as there is to gain.
    for seed in range(4):
        x, fresh = images(240, seed=2 * seed).bfloat16(), images(60, seed=2 * seed + 1)
        for rounds in (0, 1):
            net = copy.deepcopy(pruned)
            compensate(net, original, x, plan=plan, progress=False, joint_rounds=rounds)
            assert net.stem.weight.dtype == torch.bfloat16
            errors[rounds] += error(net.float(), copy.deepcopy(original).float(), fresh)
    assert errors[1] < errors[0]

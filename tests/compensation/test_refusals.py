"""What compensation does not accept: named, and nothing changed."""

from __future__ import annotations

import pytest
import torch
from small_networks import ResidualNet, cut_blocks, images, same, state
from torch import Tensor

from chanprune_ext.compensation import compensate
from chanprune_ext.errors import AnalysisError, InvalidArgumentError, PlanMismatchError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method: expected one of"),
        ({"ridge": -1.0}, "ridge: expected a finite number"),
        ({"ridge": float("nan")}, "ridge: expected a finite number"),
        ({"one_sided_steps": -1}, "one_sided_steps: expected an integer"),
        ({"one_sided_steps": 1.5}, "one_sided_steps: expected an integer"),
        ({"held_back": 1.0}, r"held_back: expected a share in \[0, 1\)"),
        ({"memory_limit": 0}, "memory_limit: expected bytes"),
    ],
)
def test_options_out_of_range(pair, options, message):
    original, pruned, plan = pair
    before = state(pruned)
    with pytest.raises(InvalidArgumentError, match=message):
        compensate(pruned, original, images(), plan=plan, **options)
    assert same(state(pruned), before)


def nan_images() -> Tensor:
    x = images()
    x[7, 0, 1, 1] = float("nan")
    return x


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "at least one batch"),
        (3, "expected a tensor or an iterable"),
        (["text"], "batch 0 is str"),
        ([images(), torch.zeros(0, 3, 8, 8)], "batch 1 is empty"),
        (nan_images(), "batch 0 contains NaN or infinity"),
    ],
)
def test_unusable_batches(pair, batches, message):
    original, pruned, plan = pair
    before = state(pruned)
    with pytest.raises(InvalidArgumentError, match=f"batches: .*{message}"):
        compensate(pruned, original, batches, plan=plan)
    assert same(state(pruned), before)


def test_weights_that_are_not_finite(pair):
    original, pruned, plan = pair
    with torch.no_grad():
        original.blocks[1].conv1.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(InvalidArgumentError, match=r"original: blocks\.1\.conv1\.weight contains"):
        compensate(pruned, original, images(), plan=plan)


def test_plan_that_does_not_belong(pair):
    original, pruned, _ = pair
    _, other = cut_blocks(original, [0, 1])
    with pytest.raises(PlanMismatchError, match=r"blocks\.0\.conv1\.weight has the shape \[2, 6"):
        compensate(pruned, original, images(), plan=other)
    with pytest.raises(InvalidArgumentError, match="carries no plan"):
        compensate(pruned, original, images())


def test_network_that_makes_other_calls(pair):
    original, pruned, plan = pair

    class Other(ResidualNet):
        def forward(self, x):
            return super().forward(x).abs()

    pruned.__class__ = Other
    with pytest.raises(PlanMismatchError, match=r"call \d+ .*is nothing in the original and abs"):
        compensate(pruned, original, images(), plan=plan)


def test_networks_sharing_memory(pair):
    original, pruned, plan = pair
    pruned.stem.weight = original.stem.weight
    with pytest.raises(InvalidArgumentError, match=r"stem\.weight shares memory"):
        compensate(pruned, original, images(), plan=plan)


def test_original_that_raises(pair):
    original, pruned, plan = pair
    with pytest.raises(AnalysisError, match="forward raised"):
        compensate(pruned, original, torch.randn(4, 5, 8, 8), plan=plan)

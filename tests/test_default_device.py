"""torch's default device is the user's: what this package makes for itself stays where it belongs.

The meta device stands for any other than the model's: a tensor made there by mistake has no values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import chanprune_ext as cpx

if TYPE_CHECKING:
    from pathlib import Path


def network() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 3)).eval()


def test_everything_but_training_under_another_default_device(tmp_path: Path) -> None:
    model = network()
    x, batches = torch.randn(2, 3, 8, 8), [torch.randn(16, 3, 8, 8) for _ in range(3)]
    with torch.device("meta"):
        plan = cpx.plan(model, x, 0.5, criterion=cpx.elimination(batches))
        pruned = plan.apply(model, verify="numeric")
        assert cpx.PruningPlan.from_dict(plan.to_dict()).pruned.keys() == plan.pruned.keys()
        cpx.compensate(pruned, model, batches)
        report = cpx.reconstruct(pruned, model, batches, epochs=1)
        cpx.sensitivity(model, x, batches, ratios=[0.5])
        cpx.save(pruned, tmp_path / "pruned.safetensors")
        again = cpx.load(tmp_path / "pruned.safetensors", model)
    assert any(block.epoch for block in report.blocks)
    assert not [block for block in report.blocks if "Error" in (block.left or "")]
    assert torch.equal(again(x), pruned(x))


@pytest.mark.parametrize("criterion", ["l1", "fpgm", "bn_scale", "random"])
def test_criteria_under_another_default_device(criterion: str) -> None:
    model = network()
    with torch.device("meta"):
        pruned = cpx.prune(model, torch.zeros(1, 3, 8, 8, device="cpu"), criterion=criterion)
    assert pruned[0].out_channels == 4
    assert all(p.device.type == "cpu" for p in pruned.parameters())

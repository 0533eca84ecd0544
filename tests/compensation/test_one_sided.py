"""Layers in front of a ReLU for which plain least squares is the wrong beginning."""

from __future__ import annotations

import torch
from small_networks import cut
from torch import nn

import chanprune_ext as cpx


def sparse_network() -> nn.Module:
    """A layer whose values are mostly far below zero."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )
    with torch.no_grad():
        model[2].weight.mul_(6)
        model[2].bias.fill_(-6)
    return model.eval()


def report_of(steps: int):
    original = sparse_network()
    keep = [0, 1, 4, 6]
    pruned, plan = cut(
        original, {"0.weight": {0: keep}, "0.bias": {0: keep}, "2.weight": {1: keep}}
    )
    data = 3 * torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    report = cpx.compensate(
        pruned, original, data, plan=plan, one_sided_steps=steps, joint_rounds=0, progress=False
    )
    return next(layer for layer in report.layers if layer.entry == "2.weight")


def test_a_fit_begins_inside_the_bounds_where_a_fit_to_all_values_loses():
    assert report_of(0).skipped == "no gain"
    found = report_of(3)
    assert found.skipped is None
    assert found.error_after < 0.75 * found.error_before

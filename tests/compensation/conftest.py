"""A network and its pruned copy."""

from __future__ import annotations

import pytest
import torch
from small_networks import KEEP, ResidualNet, cut_blocks, images
from torch import nn


@pytest.fixture
def pair():
    """A residual network, the same with half of its inner channels, and the plan."""
    torch.manual_seed(1)
    original = ResidualNet()
    for module in original.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    original(images(200, seed=2))  # statistics that fit the data, as in a trained network
    original.eval()
    pruned, plan = cut_blocks(original, KEEP)
    return original, pruned, plan

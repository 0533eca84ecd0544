"""Deformable convolutions: channels of both sides go, offsets and masks stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import randomised, relative_error, run, zeroed
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext.analysis import analyse

ops = pytest.importorskip("torchvision.ops")
IMAGES = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(0))


class Deformed(nn.Module):
    """Two layers make the offsets and masks of the third from the channels it reads."""

    def __init__(self, masked: bool = True, offset_groups: int = 1, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.offset = nn.Conv2d(16, 18 * offset_groups, 3, padding=1)
        self.mask = nn.Conv2d(16, 9 * offset_groups, 3, padding=1) if masked else None
        self.deformed = ops.DeformConv2d(16, 12, 3, padding=1, **options)
        self.norm = nn.BatchNorm2d(12)
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        mask = None if self.mask is None else self.mask(x).sigmoid()
        return self.head(self.norm(self.deformed(x, self.offset(x) / 5, mask)).relu())


@pytest.mark.parametrize(
    "options", [{}, {"masked": False}, {"bias": False}, {"stride": 2, "masked": False}], ids=str
)
def test_channels_of_both_sides_go(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = randomised(Deformed(**options))
    if "stride" in options:
        model.offset.stride = (2, 2)
    plan = cpx.plan(model, IMAGES, 0.5)
    small = plan.apply(model, verify="numeric")
    assert small.deformed.weight.shape == (6, 8, 3, 3)
    assert small.offset.out_channels == 18
    assert relative_error(run(small, IMAGES), run(zeroed(model, plan), IMAGES)) < 1e-9


@pytest.mark.parametrize("options", [{"groups": 2}, {"offset_groups": 2}], ids=str)
def test_what_several_groups_read_stays(options: dict[str, Any]) -> None:
    model = randomised(Deformed(**options))
    told = {f.entry: f.why for f in analyse(model, IMAGES).frozen}
    assert "of several groups" in told["stem.weight"]

"""Groups that ``round_to`` or ``max_ratio`` leave no smaller width are told."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import TOYS

import chanprune_ext as cpx


class Narrow(nn.Module):
    """A wide convolution and one of six channels."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 6, 1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.narrow(F.relu(self.wide(x)))).mean((2, 3)))


IMAGES = torch.randn(2, 3, 4, 4)


def told(plan: cpx.PruningPlan) -> dict[str, str]:
    return {f.entry: f.why for f in plan.frozen if f.entry != "fc.weight"}


def test_a_group_narrower_than_a_multiple_is_told() -> None:
    plan = cpx.plan(Narrow(), IMAGES, 0.5, round_to=8)
    assert told(plan) == {"narrow.weight": "no smaller width is a multiple of round_to=8"}
    assert "narrow.weight" in str(plan)
    (group,) = (g for g in plan.explain("narrow").groups if g.held is not None)
    assert group.summary.name == "narrow"
    assert "round_to=8 (" not in str(plan.explain("narrow")), "it happened at no operation"


def test_a_group_that_could_be_rounded_is_not_told() -> None:
    assert told(cpx.plan(Narrow(), IMAGES, 0.1, round_to=2)) == {}
    assert told(cpx.plan(Narrow(), IMAGES, 0.5, round_to=8, ignore=("narrow",))) == {}


def test_max_ratio_is_named_where_it_is_the_reason() -> None:
    plan = cpx.plan(Narrow(), IMAGES, 0.2, scope="global", max_ratio=0.1)
    assert told(plan) == {"narrow.weight": "max_ratio=0.1 leaves at least 6 of 6"}
    plan = cpx.plan(Narrow(), IMAGES, 0.2, scope="global", max_ratio=0.5, round_to=4)
    assert told(plan) == {}, "4 of 6 may stay"
    plan = cpx.plan(Narrow(), IMAGES, 0.2, scope="global", max_ratio=0.3, round_to=4)
    assert told(plan) == {
        "narrow.weight": "max_ratio=0.3 leaves at least 5 of 6, and no smaller width is a multiple "
        "of round_to=4"
    }


def test_a_factor_that_rounding_keeps_whole_gives_way_to_its_rival() -> None:
    """Of 24 channels in 4 groups of 6, 18 are a multiple of 9 by groups, and none by sixths."""
    torch.manual_seed(0)
    plan = cpx.plan(TOYS["GroupedConvolution"].make(), torch.randn(2, 3, 8, 8), 0.25, round_to=9)
    assert sorted(g.width_after for g in plan.groups if g.name == "a.0") == [18, 24]

"""The smallest network within a tolerated loss."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import chanprune_ext as cpx


def images(n: int = 160, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def redundant() -> nn.Module:
    """Three of four hidden channels are multiples of the others: they can go for nothing."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
    with torch.no_grad():
        for i in range(4, 16):
            first.weight[i] = first.weight[i % 4] * (1 + i / 8)
            first.bias[i] = first.bias[i % 4] * (1 + i / 8)
    return nn.Sequential(first, nn.ReLU(), second, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def test_what_is_superfluous_goes_and_no_more():
    model = redundant()
    before = copy.deepcopy(model.state_dict())
    found = cpx.prune_within(model, images(1), images(), tolerance=0.0, steps=7)
    assert 4 <= found.model[0].out_channels <= 6
    assert found.loss == 0.0
    assert found.plan.macs_after < 0.4 * found.plan.macs_before
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    # Smaller ones were tried and refused.
    assert any(not c.accepted and c.share < found.candidates[-1].share for c in found.candidates)


def test_more_tolerance_gives_a_smaller_network():
    model = redundant()
    widths = [
        cpx.prune_within(model, images(1), images(), tolerance=t, steps=6).model[0].out_channels
        for t in (0.0, 0.5)
    ]
    assert widths[1] < widths[0]


def test_nothing_smaller_than_allowed_is_tried():
    found = cpx.prune_within(redundant(), images(1), images(), tolerance=1.0, least=0.3, steps=4)
    assert [c.share for c in found.candidates] == pytest.approx([0.65, 0.475, 0.3875, 0.34375])
    assert found.plan.macs_after <= 0.34375 * found.plan.macs_before


def test_sizes_that_cannot_be_reached_are_passed_over():
    found = cpx.prune_within(
        redundant(), images(1), images(), tolerance=1.0, max_ratio=0.5, steps=4
    )
    assert found.model[0].out_channels == 8
    with pytest.raises(cpx.ChanpruneError, match="cannot be reached"):
        cpx.prune_within(redundant(), images(1), images(), max_ratio=0.1, steps=1)


def test_a_users_measure_decides():
    model = redundant()
    asked = []

    def quality(net: nn.Module) -> float:
        asked.append(net[0].out_channels)
        return float(net[0].out_channels >= 9)

    found = cpx.prune_within(
        model, images(1), images(), tolerance=0.5, evaluate=quality, steps=8, cost="params"
    )
    assert asked[0] == 16
    assert found.model[0].out_channels == 9


def test_outputs_that_are_no_logits_are_judged_by_their_error():
    model = nn.Sequential(*list(redundant())[:3])
    found = cpx.prune_within(model, images(1), images(), tolerance=1e-4, steps=6)
    assert found.loss <= 1e-4
    assert 4 <= found.model[0].out_channels <= 7


def test_nothing_within_the_tolerance():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()).eval()
    with pytest.raises(cpx.ChanpruneError, match="tolerance is 0"):
        cpx.prune_within(model, images(1), images(), tolerance=0.0, steps=2)


@pytest.mark.parametrize(
    ("option", "value"),
    [("tolerance", -1.0), ("cost", "latency"), ("least", 1.0), ("steps", 0), ("held_back", 0.0)],
)
def test_options_out_of_range(option, value):
    with pytest.raises(cpx.ChanpruneError, match=option):
        cpx.prune_within(redundant(), images(1), images(), **{option: value})


def test_a_criterion_by_its_name():
    found = cpx.prune_within(
        redundant(), images(1), images(), tolerance=0.5, steps=2, criterion="l2"
    )
    assert found.plan.criterion == "l2"
    with pytest.raises(cpx.ChanpruneError, match="criterion must be one of"):
        cpx.prune_within(redundant(), images(1), images(), criterion="l7")


@pytest.mark.parametrize(
    ("option", "value"),
    [("budget", cpx.Budget(macs=0.5)), ("scope", "local"), ("ratio", 0.5), ("threshold", 0.1)],
)
def test_what_the_search_decides_is_not_an_option(option, value):
    with pytest.raises(cpx.ChanpruneError, match=f"{option}: not an argument of prune_within"):
        cpx.prune_within(redundant(), images(1), images(), **{option: value})


def test_an_optional_second_input_is_no_label():
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Embedding(10, 32)
            self.layers = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
            self.alone = 0

        def forward(self, x: torch.Tensor, kind: torch.Tensor | None = None) -> torch.Tensor:
            hidden = self.layers[0](x)
            if kind is None:
                self.alone += 1
            else:
                hidden = hidden + self.shift(kind)
            return self.layers[2](self.layers[1](hidden))

    torch.manual_seed(0)
    model, x, kind = Shifted(), torch.randn(80, 8), torch.randint(0, 10, (80,))
    for batch in ((x, kind), ((x, kind), torch.zeros(80, dtype=torch.long))):
        found = cpx.prune_within(model, (x[:2], kind[:2]), [batch], tolerance=1.0, steps=1)
        assert model.alone == found.model.alone == 0

from __future__ import annotations

import pytest
import torch
from torch import nn

from chanprune_ext.recovery.ema import WeightAverage


class Counter(nn.Module):
    """One parameter, one float buffer, one integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.register_buffer("mean", torch.tensor([10.0]))
        self.register_buffer("count", torch.tensor(0))


def test_formula_with_early_steps_forgotten_quickly() -> None:
    model = Counter()
    average = WeightAverage(model, decay=0.25)
    weight, mean = [1.0, 2.0], 10.0
    for update in range(1, 6):
        with torch.no_grad():
            model.weight += 1
            model.mean *= 2
            model.count += 1
        average.update(model)
        decay = min(0.25, (1 + update) / (10 + update))
        weight = [
            decay * a + (1 - decay) * b for a, b in zip(weight, model.weight.tolist(), strict=True)
        ]
        mean = decay * mean + (1 - decay) * model.mean.item()
    assert (1 + 1) / (10 + 1) < 0.25 < (1 + 5) / (10 + 5)  # both branches were taken
    assert average.state["weight"].tolist() == pytest.approx(weight)
    assert average.state["mean"].item() == pytest.approx(mean)
    assert average.state["count"].item() == 5


def test_the_average_is_lent_and_taken_back() -> None:
    model = Counter()
    average = WeightAverage(model, decay=0.9)
    with torch.no_grad():
        model.weight.fill_(5)
    with average.applied_to(model):
        assert model.weight.tolist() == [1.0, 2.0]
    assert model.weight.tolist() == [5.0, 5.0]
    average.copy_to(model)
    assert model.weight.tolist() == [1.0, 2.0]
    assert model.weight.requires_grad

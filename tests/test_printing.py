"""Results read well: in one line where they are looked at, in a few where they are printed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext.bench import bench
from chanprune_ext.models import CifarResNet

X = torch.randn(4, 6)


class Shared(nn.Module):
    """Many layers with long names make the channels of one group."""

    def __init__(self) -> None:
        super().__init__()
        self.the_first_projection = nn.Linear(6, 16)
        self.blocks_of_the_encoder = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(6)
        )
        self.classifier = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.the_first_projection(x)
        for block in self.blocks_of_the_encoder:
            x = x + block(x)
        return self.classifier(x)


def short(value: object) -> bool:
    return len(repr(value)) < 300 and "\n" not in repr(value)


def test_a_plan() -> None:
    plan = cpx.plan(Shared(), X, 0.5)
    assert repr(plan).startswith("<PruningPlan of a Shared: 7 of 7 groups lose channels, params ")
    assert short(plan)
    assert len(repr(cpx.plan(CifarResNet(20), torch.randn(1, 3, 32, 32), 0.5))) < 300
    lines = str(plan).splitlines()
    assert all(line == line.rstrip() for line in lines)
    assert max(map(len, lines)) <= 100
    assert lines[2].split() == [
        "the_first_projection",
        "residual",
        "16",
        "8",
        *lines[2].split()[4:],
    ]
    assert "blocks_of_the_encoder.0.2, 5 more" in lines[2]


def test_what_training_and_searching_return() -> None:
    model, data = Shared(), [(X, torch.arange(4) % 3)]
    student = cpx.prune(model, X, 0.5)
    measured = cpx.recover(student, model, train=data, val=data, epochs=2, progress=False)
    told = str(measured).splitlines()
    assert told[0].startswith("recovery: 2 epochs, ")
    assert "before: top-1" in told[2]
    assert "best, epoch" in told[3]
    assert short(measured)
    blind = cpx.recover(student, model, train=data, epochs=1, progress=False)
    assert "1 epoch," in repr(blind)
    assert "last: not measured" in repr(blind)
    staged = cpx.prune_progressively(
        model, X, 0.5, train=data, stages=2, recover_settings={"epochs": 1}, progress=False
    )
    assert short(staged)
    assert len(str(staged).splitlines()) == 3
    found = cpx.prune_within(model, X, torch.randn(64, 6), tolerance=1, steps=2)
    assert len(repr(found)) < 300
    first = f"  asked for x0.550: lost {found.candidates[0].loss:.4g}"
    assert str(found).splitlines()[1] == first


def test_a_measurement() -> None:
    model = Shared()
    found = bench(model, cpx.prune(model, X, 0.5), X, backends=["eager"], seconds=0.01)
    assert short(found)
    assert [line.partition(":")[0] for line in str(found).splitlines()[1:3]] == [
        "  eager, batch 1",
        "  eager, batch 16",
    ]

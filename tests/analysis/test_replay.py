"""The replay: a network that would not run as predicted is found out before it is made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import randomised
from torch import Tensor, nn
from toys import TOYS

import chanprune_ext as cpx
from chanprune_ext.analysis import Analysis, analyse
from chanprune_ext.analysis.equations import solve_attributes
from chanprune_ext.analysis.provenance import Attribute
from chanprune_ext.analysis.replay import patched_attributes, replay, set_attributes
from chanprune_ext.errors import VerificationError


def prepared(name: str, group: int = 0, units: int = 2) -> tuple[Analysis, nn.Module, Any, Any]:
    torch.manual_seed(0)
    model, inputs = randomised(TOYS[name].make()), TOYS[name].inputs()
    analysis = analyse(model, inputs)
    gone = np.zeros(analysis.groups[group].units, dtype=bool)
    gone[:units] = True
    return analysis, model, inputs, analysis.removed_labels({group: gone})


def test_accepts_what_was_predicted() -> None:
    for name in ("Residual", "FlattenGrid", "FilledBuffer", "DepthwiseMultiplier", "Checkpointed"):
        analysis, model, inputs, labels = prepared(name)
        sizes = analysis.sizes(labels)
        attributes, violated = solve_attributes(analysis, sizes)
        assert not violated
        replay(analysis, model, inputs, analysis.kept_masks(labels), attributes, sizes)


def test_attributes_are_needed() -> None:
    analysis, model, inputs, labels = prepared("SplitByAttribute")
    sizes, masks = analysis.sizes(labels), analysis.kept_masks(labels)
    attributes, violated = solve_attributes(analysis, sizes)
    assert not violated
    assert {(a.name, a.position): v for a, v in attributes.items()} == {("sizes", 0): 2}
    replay(analysis, model, inputs, masks, attributes, sizes)
    with pytest.raises(VerificationError, match="split"):
        replay(analysis, model, inputs, masks, {}, sizes)
    assert model.sizes == [4, 12]


def test_a_tensor_of_the_wrong_width() -> None:
    analysis, model, inputs, labels = prepared("Residual")
    masks = analysis.kept_masks(labels)
    sizes = analysis.sizes(labels)
    del masks["a.0.weight"][1]
    with pytest.raises(VerificationError, match=r"in module 'a\.0'"):
        replay(analysis, model, inputs, masks, {}, sizes)
    masks = analysis.kept_masks(analysis.removed_labels({}))
    with pytest.raises(VerificationError, match=r"conv2d.*'stem.0'"):
        replay(analysis, model, inputs, masks, {}, sizes)


class TakesAnotherPath(nn.Module):
    """A branch on a size that no equation describes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 1)
        self.b = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.b(a.relu() if a.shape[1] > 12 else a.sigmoid())


class OneCallMore(TakesAnotherPath):
    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        return y + 1 if self.a.weight.shape[0] < 12 else y


class OneCallLess(TakesAnotherPath):
    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        return y + 1 if self.a.weight.shape[0] > 12 else y


class AnotherNumber(TakesAnotherPath):
    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.b(a.sigmoid() * float(a.shape[1]))


class AnotherWholeNumber(TakesAnotherPath):
    """A number that has lost its origin."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.b(a.sigmoid() / int(str(a.shape[1])))


class AnotherNumberInAList(TakesAnotherPath):
    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.b(a.sigmoid() * torch.tensor([a.shape[1] ** -0.5], device=a.device))


class AnotherNumberOfNumPy(TakesAnotherPath):
    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.b(a.sigmoid() * np.float32(a.shape[1]))


class AnotherComplexNumber(TakesAnotherPath):
    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.b((a * complex(1, a.shape[1])).real)


class AnotherGroupCount(TakesAnotherPath):
    """At 16 channels it is 4 groups, at 8 it is 2: no equation says so."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.b(F.group_norm(a, 4 if a.shape[1] >= 16 else 2))


class AnotherMode(TakesAnotherPath):
    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.b(F.gelu(a, approximate="none" if a.shape[1] > 12 else "tanh"))


class RolledByAWidth(TakesAnotherPath):
    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.b(a.roll(a.shape[1] // 8, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (TakesAnotherPath, "takes another path"),
        (AnotherNumber, "a number computed from a size"),
        (AnotherWholeNumber, "a number computed from a size"),
        (AnotherNumberInAList, "a number computed from a size"),
        (AnotherNumberOfNumPy, "a number computed from a size"),
        (AnotherComplexNumber, "a number computed from a size"),
        (AnotherGroupCount, "an argument that depends on a size has changed from 4 to 2"),
        (AnotherMode, "an argument that depends on a size has changed from 'none' to 'tanh'"),
        (RolledByAWidth, "their number is used in a computation"),
    ],
)
def test_what_diverges_is_held_back_and_told(make: Any, message: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), make(), nn.Conv2d(5, 4, 1))
    plan = cpx.plan(model, torch.randn(2, 3, 4, 4), 0.5)
    assert "1.a.weight" not in plan.kept or 0 not in plan.kept["1.a.weight"]
    (told,) = [f for f in plan.frozen if f.entry == "1.a.weight"]
    assert message in told.why
    assert told.module == "1"
    assert told.source.startswith("test_replay.py:")
    assert plan.kept["1.b.weight"][0].shape == (3,)


class TellsASize(TakesAnotherPath):
    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        torch._assert(a.dim() == 4, f"expected images, got {a.shape}")
        return self.b(a)


def test_messages_may_tell_another_size() -> None:
    plan = cpx.plan(nn.Sequential(TellsASize()), torch.randn(2, 3, 4, 4), 0.5)
    assert plan.kept["0.a.weight"][0].shape == (8,)


@pytest.mark.parametrize("make", [OneCallMore, OneCallLess])
def test_what_cannot_be_blamed_on_a_group_is_refused(make: Any) -> None:
    """Nothing is guessed: a plan is either proved or not made."""
    torch.manual_seed(0)
    model = make()
    with pytest.raises(cpx.ChanpruneError, match="call"):
        cpx.plan(model, torch.randn(2, 3, 4, 4), 0.5)
    assert cpx.plan_of(model) is None


def test_patches_are_undone() -> None:
    model = TOYS["SplitByAttribute"].make()
    original = model.sizes
    seen = []

    def fail() -> None:
        with patched_attributes(model, {Attribute("", "sizes", 1, 12): 7}):
            seen.append(model.sizes)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [[4, 7]]
    assert model.sizes is original


def test_set_attributes_reports_what_it_replaced() -> None:
    model = TOYS["UnflattenLayer"].make()
    old = model.grid.unflattened_size
    done = set_attributes(model, {Attribute("grid", "unflattened_size", 0, 12): 9})
    assert model.grid.unflattened_size == (9, 4, 4)
    assert type(model.grid.unflattened_size) is type(old)
    ((held, name, before),) = done
    assert held is vars(model.grid)
    assert (name, before) == ("unflattened_size", old)


class LoopsOverParts(nn.Module):
    """As many steps as the width has sixes: in no equation, and at the root."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 10, 1), nn.Conv2d(10, 12, 1)
        self.b, self.c = nn.Conv2d(12, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(self.stem(x).relu())
        for _ in range(int(str(a.shape[1])) // 6):
            x = x.relu()
        return self.c(self.b(a.relu()).relu() + x.mean())


def test_one_group_is_found_where_nothing_names_it() -> None:
    torch.manual_seed(0)
    plan = cpx.plan(LoopsOverParts(), torch.randn(2, 3, 4, 4), 0.5)
    kept = {entry: len(dims[0]) for entry, dims in plan.kept.items() if 0 in dims}
    assert kept == {"stem.weight": 5, "stem.bias": 5, "b.weight": 4, "b.bias": 4}
    (told,) = [f for f in plan.frozen if f.entry == "a.weight"]
    assert "the pruned model makes shapes" in told.why


class Picks(nn.Module):
    """Works on with as many rows as score above zero, as detectors do with boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.b(self.a(x).relu())
        rows = (z.sum(1) > 0).nonzero().flatten()
        boxes = torch.zeros(len(rows.tolist()), 3)
        return self.out(z[rows].relu()) + boxes


def test_other_values_may_leave_another_number_of_rows() -> None:
    torch.manual_seed(0)
    model, x = Picks().eval(), torch.randn(200, 5)
    with pytest.warns(UserWarning, match="reads values"):
        plan = cpx.plan(model, x, 0.5)
    small = plan.apply(model)
    assert (small.a.out_features, small.b.out_features) == (8, 4)
    assert len(small(x)) != len(model(x))
    assert len(plan.frozen) == 1, "the output alone"

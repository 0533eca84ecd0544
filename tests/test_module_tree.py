"""Modules in order, copies, and results that need no second run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext import surgery
from chanprune_ext.copying import copied, copies_plainly
from chanprune_ext.errors import VerificationError
from chanprune_ext.module_tree import modules_of, structure_remembered


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.again = self.first[2]
        self.missing = None
        self.second = nn.Conv2d(8, 4, 3)
        self.marks = [1, [2]]
        self.same_marks = self.marks

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.second(self.first(x)))


class OwnWay(Shared):
    """A copy of this one drops the activation in front of the last layer."""

    def __deepcopy__(self, memo: dict[int, object]) -> OwnWay:
        new = OwnWay()
        memo[id(self)] = new
        for name in ("first", "second", "again"):
            setattr(new, name, copy.deepcopy(getattr(self, name), memo))
        return new


def test_modules_are_those_torch_names() -> None:
    model = nn.Sequential(Shared(), nn.Sequential(), Shared())
    assert modules_of(model) == list(model.named_modules())


def test_structure_is_forgotten_at_the_end() -> None:
    model = Shared()
    with structure_remembered(model):
        assert modules_of(model) is modules_of(model)
        assert modules_of(model.first) == list(model.first.named_modules())
    model.third = nn.ReLU()
    assert modules_of(model) == list(model.named_modules())


def test_copies_share_what_the_original_shares() -> None:
    model = Shared()
    new = copied(model)
    assert new.again is new.first[2]
    assert new.marks is new.same_marks
    assert new.marks is not model.marks
    assert new.marks[1] is not model.marks[1]
    assert new.first._forward_hooks is not model.first._forward_hooks
    assert torch.equal(new.first[1].num_batches_tracked, model.first[1].num_batches_tracked)
    assert new.first[1].num_batches_tracked is not model.first[1].num_batches_tracked


class Caught(Shared):
    """Its activation belongs to the model it was made for, also in a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.act = lambda x: self.second(x) * 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.act(self.first(x)))


_GLOBAL = nn.ReLU()


class Global(Shared):
    def forward(self, x: Tensor) -> Tensor:
        return _GLOBAL(self.second(self.first(x)))


def test_a_copy_that_runs_the_original_is_refused() -> None:
    with pytest.raises(VerificationError, match="does not run"):
        cpx.prune(Caught().eval(), torch.randn(2, 3, 8, 8), 0.5)


@pytest.mark.parametrize(("kind", "runs"), [(Shared, 0), (OwnWay, 1), (Caught, 1), (Global, 1)])
def test_only_what_may_differ_from_the_replay_runs_again(
    kind: type[Shared], runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[object] = []
    monkeypatch.setattr(surgery, "verify_runs", lambda *args: ran.append(args))
    pruned = cpx.prune(kind().eval(), torch.randn(2, 3, 8, 8), 0.5)
    assert len(ran) == runs
    assert pruned.first[0].out_channels == 4
    ran.clear()
    model = kind().eval()
    cpx.plan(model, torch.randn(2, 3, 8, 8), 0.5).apply(model)
    assert len(ran) == 1


def test_a_compiled_model_elsewhere_does_not_matter() -> None:
    """The first torch.compile of a process patches nn.Module."""

    class Fresh(Shared):
        pass

    torch._dynamo.mutation_guard.install_generation_tagging_init()
    assert copies_plainly(Fresh())
    assert not copies_plainly(nn.LSTM(2, 2))


class ReadsWidth(nn.Module):
    """Divides by a width that only surgery changes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 16)
        self.b = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu().sin() / float(self.b.in_features) ** 0.5)


def test_the_replay_sees_the_widths_that_layers_tell() -> None:
    model = ReadsWidth().eval()
    with pytest.raises(VerificationError, match="a number computed from a size would change"):
        cpx.prune(model, torch.randn(3, 6), 0.5)
    assert model.b.in_features == 16

"""Networks in which a replay refuses many places: one replay finds all that are alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext.allocation import removal
from chanprune_ext.analysis.replay import DivergenceError

if TYPE_CHECKING:
    from chanprune_ext.analysis.groups import Analysis


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 16, 1)
        self.b = nn.Conv2d(16, 12, 1)
        self.c = nn.Conv2d(12, 8, 1)

    def act(self, a: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c(self.b(self.act(self.a(x))))


class GroupCount(Block):
    """16 channels are 4 groups, 8 are 2."""

    def act(self, a: Tensor) -> Tensor:
        return F.group_norm(a, min(4, int(str(a.shape[1])) // 4))


class Number(Block):
    def act(self, a: Tensor) -> Tensor:
        return a.sigmoid() / int(str(a.shape[1]))


class Folded(Block):
    """A factor that would have to go through a tanh."""

    def act(self, a: Tensor) -> Tensor:
        return a.tanh() * a.shape[1] ** -0.5


class Fails(Block):
    """8 channels are no 3 groups: the call raises."""

    def act(self, a: Tensor) -> Tensor:
        return F.group_norm(a, 4 if int(str(a.shape[1])) == 16 else 3)


class OtherShape(Block):
    """16 channels are followed by nothing, 8 by a row of another height."""

    def act(self, a: Tensor) -> Tensor:
        return F.pad(a, (0, 0, 0, 16 - int(str(a.shape[1]))))[:, :, : 4 + 16 - int(str(a.shape[1]))]


def planned(kind: type[Block], count: int) -> tuple[cpx.PruningPlan, nn.Module]:
    torch.manual_seed(0)
    blocks = [kind() for _ in range(count)]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *blocks, nn.Conv2d(8, 4, 1))
    return cpx.plan(model, torch.randn(2, 3, 4, 4), 0.5), model


@pytest.mark.parametrize("kind", [GroupCount, Number, Folded, Fails, OtherShape])
def test_one_replay_finds_them_all(kind: type[Block], monkeypatch: pytest.MonkeyPatch) -> None:
    real, replays = removal.replay, []

    def counted(analysis: Analysis, *args: Any) -> Any:
        replays.append(analysis)
        return real(analysis, *args)

    monkeypatch.setattr(removal, "replay", counted)
    plan, model = planned(kind, 9)
    assert len(replays) <= 3
    for i in range(1, 10):
        assert 0 not in plan.kept.get(f"{i}.a.weight", {})
        assert plan.kept[f"{i}.b.weight"][0].shape == (6,)
        (told,) = [f for f in plan.frozen if f.entry == f"{i}.a.weight"]
        assert told.module == str(i)
    plan.apply(model, verify="numeric")


@pytest.mark.parametrize("kind", [GroupCount, Number, Folded, Fails, OtherShape])
def test_the_plan_is_that_of_one_place_after_the_other(
    kind: type[Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = planned(kind, 3)[0]
    monkeypatch.setattr(DivergenceError, "alike", lambda _: [])
    apart = planned(kind, 3)[0]
    assert together.frozen == apart.frozen
    assert together.kept.keys() == apart.kept.keys()
    for entry, dims in together.kept.items():
        assert all(torch.equal(index, apart.kept[entry][dim]) for dim, index in dims.items())


class TwoNorms(Block):
    """The second norm's count follows from the first one's: holding the first back is enough."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        groups = min(4, int(str(a.shape[1])) // 4)
        b = self.b(F.group_norm(a, groups))
        return x + self.c(F.group_norm(b, groups))


def test_what_follows_from_another_place_is_left_alone() -> None:
    plan, model = planned(TwoNorms, 3)
    for i in range(1, 4):
        assert 0 not in plan.kept.get(f"{i}.a.weight", {})
        assert len(plan.kept[f"{i}.b.weight"][0]) < 12
    plan.apply(model, verify="replay")

"""Sparsity training before a cut, and cutting in stages."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import chanprune_ext as cpx
from chanprune_ext.data import open_dataset
from chanprune_ext.errors import CheckpointError, InvalidArgumentError, PlanMismatchError
from chanprune_ext.models import CifarResNet
from chanprune_ext.plan import plans_of
from chanprune_ext.recovery import evaluate, prune_progressively, recover, sparsify
from chanprune_ext.recovery.loop import TrainingLoop
from chanprune_ext.recovery.sparsity import group_penalty

if TYPE_CHECKING:
    from pathlib import Path

INPUT = torch.zeros(1, 1, 8, 8)


def train_data() -> TensorDataset:
    data = open_dataset("digits", "train")
    images = torch.stack([data[i][0] for i in range(640)])
    return TensorDataset(images, data.labels[:640])


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = CifarResNet(8, in_channels=1, width=8)
    recover(model, train=train_data(), epochs=6, lr=0.1, batch_size=64, progress=False)
    return model


def test_penalties_are_sums_over_removed_slices() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    plan = cpx.plan(model, torch.zeros(1, 3), 0.5)
    gone = plan.pruned["0.weight"][0].tolist()
    pieces = [model[0].weight[i] for i in gone] + [model[0].bias[i : i + 1] for i in gone]
    pieces += [model[2].weight[:, i] for i in gone]
    squares = sum(p.square().sum() for p in pieces) / 2
    lasso = sum(len(p) ** 0.5 * p.norm() for p in pieces)
    torch.testing.assert_close(group_penalty(model, plan)(), squares)
    torch.testing.assert_close(group_penalty(model, plan, "lasso")(), lasso)


@pytest.mark.parametrize(("penalty", "strength"), [("growing", 3.0), ("lasso", 0.1)])
def test_sparsity_training_makes_the_cut_painless(
    trained: nn.Module, penalty: str, strength: float
) -> None:
    test = open_dataset("digits")
    plan = cpx.plan(trained, INPUT, 0.0, ratios={"layer*.conv1": 0.5})
    cut = evaluate(plan.apply(trained), test)
    sparse = copy.deepcopy(trained)
    options: dict[str, Any] = {"epochs": 4, "lr": 0.05, "batch_size": 64, "progress": False}
    sparsify(
        sparse,
        plan,
        trained,
        train=train_data(),
        penalty=penalty,
        strength=strength,
        **options,
    )
    share = group_penalty(sparse, plan)() / group_penalty(trained, plan)()
    assert share < 0.1
    after = evaluate(plan.apply(sparse), test)
    assert after.top1 > cut.top1 + 0.1
    assert after.top1 > evaluate(sparse, test).top1 - 0.03


def test_sparsity_settings_are_checked(trained: nn.Module) -> None:
    plan = cpx.plan(trained, INPUT, 0.5)
    for options, message in (
        ({"penalty": "l0"}, "penalty: expected 'growing' or 'lasso', got 'l0'"),
        ({"strength": 0.0}, "strength: expected a positive number"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            sparsify(trained, plan, train=train_data(), **options)
    with pytest.raises(PlanMismatchError):
        sparsify(plan.apply(trained), plan, train=train_data())


@pytest.mark.parametrize("schedule", ["linear", "cubic"])
@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.5},
        {"budget": cpx.Budget(macs=0.4)},
        {"ratio": 0.0, "ratios": {"layer*.conv1": 0.6}},
    ],
    ids=["ratio", "budget", "ratios"],
)
def test_stages_end_at_exactly_the_size_of_the_plan(
    trained: nn.Module, schedule: str, options: dict[str, Any]
) -> None:
    x, y = train_data().tensors
    goal = cpx.plan(trained, INPUT, **options)
    before = copy.deepcopy(trained.state_dict())
    result = prune_progressively(
        trained,
        INPUT,
        train=[(x[:32], y[:32])],
        schedule=schedule,
        recover_settings={"epochs": 1, "warmup": 0.0},
        progress=False,
        **options,
    )
    sizes = [stage.params for stage in result.stages]
    assert sizes == sorted(sizes, reverse=True)
    assert len(result.stages) >= 2  # whole channels: the last step may be none
    assert (sizes[-1], result.stages[-1].macs) == (goal.params_after, goal.macs_after)
    one_shot = goal.apply(trained)
    for name, value in result.model.state_dict().items():
        assert value.shape == one_shot.state_dict()[name].shape
    lost = [goal.params_before - s for s in sizes]
    # Most of it early (cubic), or about a third at a time; parameters go with products of widths.
    assert (lost[0] / lost[-1] > 0.65) == (schedule == "cubic")
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())


class Attention(nn.Module):
    """One layer makes queries, keys and values: all its groups of channels have one name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.heads = nn.Linear(6, 12), 4
        self.qkv, self.proj, self.head = nn.Linear(12, 96), nn.Linear(32, 12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        n, t, _ = x.shape
        qkv = self.qkv(x).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.head((x + self.proj(y.transpose(1, 2).flatten(2))).mean(1))


@pytest.mark.parametrize("kind", ["heads", "head_dim"])
def test_stages_tell_groups_of_one_name_apart(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(8, 3, 6)
    options: dict[str, Any] = {"kinds": [kind], "ratio": 0.5}
    goal = cpx.plan(model, x, **options)
    names = [group.name for group in goal.groups]
    assert len(set(names)) < len(names)
    settings = {"epochs": 1, "warmup": 0.0}
    result = prune_progressively(
        model,
        x,
        train=[(x, torch.arange(8) % 5)],
        stages=2,
        schedule="linear",
        recover_settings=settings,
        progress=False,
        **options,
    )
    assert len(result.stages) == 2
    for plan in plans_of(result.model):
        assert {g.kind for g in plan.groups if g.width_after < g.width_before} == {kind}
    one_shot = goal.apply(model)
    for name, value in result.model.state_dict().items():
        assert value.shape == one_shot.state_dict()[name].shape


def test_stages_compensate_and_recover(trained: nn.Module) -> None:
    test = open_dataset("digits")
    result = prune_progressively(
        trained,
        INPUT,
        0.5,
        train=train_data(),
        val=test,
        calibration=train_data().tensors[0][:128],
        stages=2,
        recover_settings={"epochs": 2, "lr": 0.05, "batch_size": 64},
        progress=False,
    )
    assert len(result.stages) == 2
    assert result.stages[0].compensation is not None
    assert evaluate(result.model, test) == result.stages[-1].recovery.last
    assert result.stages[-1].recovery.last.top1 > 0.9 * evaluate(trained, test).top1
    assert result.to_dict()["stages"][1]["recovery"]["recipe"]["epochs"] == 2
    # The teacher's features can still be matched through both plans.
    x = train_data().tensors[0][:64]
    options: dict[str, Any] = {"losses": {"features": 1.0}, "epochs": 1, "progress": False}
    recover(result.model, trained, train=[x], **options)


def test_stage_settings_are_checked(trained: nn.Module) -> None:
    for options, message in (
        ({"stages": 0}, "stages: expected a number from 1, got 0"),
        ({"schedule": "square"}, "schedule: expected 'linear' or 'cubic'"),
        ({"recover_settings": {"epoch": 1}}, "epoch: no such setting"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            prune_progressively(trained, INPUT, 0.5, train=train_data(), **options)


def crashing(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Lets a run die in the update after so many, counted over all that run."""
    step, left = TrainingLoop._step, [after]

    def failing(loop: TrainingLoop, batch: Any, rate: float) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return step(loop, batch, rate)

    monkeypatch.setattr(TrainingLoop, "_step", failing)


def same(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def test_sparsity_training_goes_on_after_a_crash(
    trained: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = cpx.plan(trained, INPUT, 0.5)
    x, y = train_data().tensors
    options: dict[str, Any] = {"train": [(x[:32], y[:32]), (x[32:64], y[32:64])], "epochs": 3}

    def run(**more: Any) -> nn.Module:
        model = copy.deepcopy(trained)
        sparsify(model, plan, trained, progress=False, **{**options, **more})
        return model

    kept = {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
    with monkeypatch.context() as patch:
        crashing(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(**kept)
    with pytest.raises(CheckpointError, match=r"task: strength was 1\.0 and is 2\.0 now"):
        run(**kept, resume="auto", strength=2.0)
    with pytest.raises(CheckpointError, match="task: penalty was 'growing' and is None now"):
        recover(copy.deepcopy(trained), trained, **options, **kept, resume="auto", progress=False)
    crashing(monkeypatch, 3)  # three of six updates are left
    assert same(run(**kept, resume="auto"), run_without(monkeypatch, run))


def run_without(monkeypatch: pytest.MonkeyPatch, run: Any) -> nn.Module:
    monkeypatch.undo()
    return run()


def test_stages_go_on_after_a_crash(
    trained: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = train_data().tensors
    options: dict[str, Any] = {
        "train": [(x[:32], y[:32]), (x[32:64], y[32:64])],
        "val": TensorDataset(x[:100], y[:100]),
        "calibration": x[:64],
        "recover_settings": {"epochs": 2, "warmup": 0.0},
        "progress": False,
    }
    kept = {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
    with monkeypatch.context() as patch:
        crashing(patch, 6)  # in the second of three stages of four updates
        with pytest.raises(KeyboardInterrupt):
            prune_progressively(trained, INPUT, 0.5, **options, **kept)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stage-1", "stage-2"]
    with monkeypatch.context() as patch:
        crashing(patch, 6)
        found = prune_progressively(trained, INPUT, 0.5, **options, **kept, resume="auto")
    expected = prune_progressively(trained, INPUT, 0.5, **options)
    assert len(found.stages) == len(expected.stages) == 3
    assert same(found.model, expected.model)
    for one, two in zip(found.stages, expected.stages, strict=True):
        assert (one.params, one.compensation) == (two.params, two.compensation)
        assert [e.loss for e in one.recovery.history] == [e.loss for e in two.recovery.history]
    with pytest.raises(InvalidArgumentError, match="holds checkpoints of an earlier run"):
        prune_progressively(trained, INPUT, 0.5, **options, **kept)
    with pytest.raises(InvalidArgumentError, match="resume: needs the folder"):
        prune_progressively(trained, INPUT, 0.5, **options, resume="auto")
    with pytest.raises(InvalidArgumentError, match="resume: expected None or 'auto'"):
        prune_progressively(trained, INPUT, 0.5, **options, **kept, resume="stage-1")

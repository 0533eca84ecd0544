"""A network divided over two processes that talk through gloo trains as a whole one does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from distributed_runs import Blocks, Plain, launch, net, points, run
from safetensors.torch import load_file
from torch import nn

from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.recovery import recover
from chanprune_ext.recovery.sharding import check_divisible, sharded_units

if TYPE_CHECKING:
    from pathlib import Path

BLOCKS: dict[str, Any] = {"net": "Blocks", "teacher": True}
# What two processes run with batches of 8 and shard=True, and one with batches of 16 without.
SAME: dict[str, dict[str, Any]] = {
    "labels": {"net": "Blocks", "val": 31},
    "teacher and average": {
        **BLOCKS,
        "val": 31,
        "settings": {"ema_decay": 0.8, "keep": "best", "epochs": 3},
    },
    "adamw, clipped": {
        **BLOCKS,
        "settings": {"optimizer": "adamw", "lr": 0.003, "max_grad_norm": 0.05},
    },
    # Three batches to measure on for two processes, then one batch for both.
    "uneven validation": {"net": "Blocks", "val": 20, "val_data": "loader"},
    "little validation": {"net": "Blocks", "val": 5, "val_data": "loader"},
    "accumulated gradients": {
        "net": "Blocks",
        "settings": {"batch_size": 4, "gradient_accumulation_steps": 2},
    },
    "statistics measured anew": {"net": "Plain", "settings": {"swa_start": 0.5, "bn_batches": 2}},
}
OTHERS: dict[str, dict[str, Any]] = {
    "batch norm": {"net": "Normed", "val": 100, "made": "differently"},
    "bfloat16": {**BLOCKS, "settings": {"precision": "bf16"}},
    "features": {
        **BLOCKS,
        "teacher": "blocks",
        "settings": {"losses": {"features": 1.0}, "taps": ["blocks.1"]},
    },
    "NaN": {"net": "Blocks", "settings": {"lr": 1e30, "max_grad_norm": None}},
}

KEPT: dict[str, Any] = {
    **BLOCKS,
    "val": 31,
    "images": 99,
    "settings": {
        "epochs": 3,
        "optimizer": "adamw",
        "lr": 0.003,
        "ema_decay": 0.8,
        "keep": "best",
    },
}


def with_settings(job: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {**job, "settings": {**job.get("settings", {}), **settings}}


def kept(folder: Path) -> dict[str, Any]:
    return {"checkpoint_dir": str(folder), "checkpoint_every": 1, "keep_checkpoints": 99}


def sharded(job: dict[str, Any]) -> dict[str, Any]:
    return {**job, "settings": {**job.get("settings", {}), "shard": True}}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What both processes ended each of the runs above with, all in one start of them."""
    jobs = {name: sharded(job) for name, job in (SAME | OTHERS).items()}
    folder: Path = tmp_path_factory.mktemp("sharding")
    # In the middle of the second of three epochs.
    divided, single = (folder / name / "checkpoint-000000008.safetensors" for name in "ab")
    one = alone(with_settings(KEPT, **kept(single.parent)))
    jobs["kept"] = sharded(with_settings(KEPT, **kept(divided.parent)))
    jobs["resumed"] = sharded(with_settings(KEPT, resume=str(divided)))
    jobs["resumed whole"] = with_settings(KEPT, resume=str(divided))
    jobs["resumed from one"] = sharded(with_settings(KEPT, resume=str(single)))
    found = dict(zip(jobs, launch(folder, *jobs.values()), strict=True))
    resumed = alone(with_settings(KEPT, resume=str(divided)))
    return {**found, "one": [one], "resumed by one": [resumed], "divided": divided}


def same(one: dict[str, Any], two: dict[str, Any], **tolerance: float) -> None:
    assert one["weights"].keys() == two["weights"].keys()
    for name, value in two["weights"].items():
        torch.testing.assert_close(one["weights"][name], value, msg=name, **tolerance)


def alone(job: dict[str, Any]) -> dict[str, Any]:
    settings = {**job.get("settings", {}), "batch_size": 16}
    settings.pop("gradient_accumulation_steps", None)
    return run({**job, "settings": settings})


@pytest.mark.parametrize("name", SAME)
def test_as_one_process_with_twice_the_batch(ended: dict[str, Any], name: str) -> None:
    one = alone(SAME[name])
    first, second = ended[name]
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert (first["images"], first["kept"]) == (one["images"], one["kept"])
    adamw = "adamw" in name  # divides by gradients, and so by their rounding
    same(first, one, rtol=1e-4 if adamw else 1e-5, atol=1e-5 if adamw else 1e-6)
    same(first, second, rtol=0, atol=0)
    assert first["wrapped"] == SAME[name]["net"]
    for found, expected in zip(first["val"], one["val"], strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            assert found == pytest.approx(expected, rel=1e-5)


def test_each_process_holds_half(ended: dict[str, Any]) -> None:
    whole = sum(p.numel() for p in net("Blocks").parameters())
    for held in (found["held"] for found in ended["adamw, clipped"]):
        assert held["parameters"] == pytest.approx(whole / 2, rel=0.1)
        assert held["gradients"] == held["parameters"]
        assert held["optimizer"] == pytest.approx(2 * held["parameters"], rel=0.01)
    assert sum(found["held"]["parameters"] for found in ended["adamw, clipped"]) == whole


def test_batch_norm_begins_and_ends_alike(ended: dict[str, Any]) -> None:
    first, second = ended["batch norm"]
    same(first, second, rtol=0, atol=0)
    assert first["val"] == second["val"]
    assert first["weights"]["norm.running_mean"].abs().max() > 0.1
    assert first["weights"]["norm.num_batches_tracked"] == 12  # of 16 images each


def test_losses_on_features(ended: dict[str, Any]) -> None:
    """Layers behind the features get no gradient; the loss is a ratio within each batch."""
    one = alone(OTHERS["features"])
    first, second = ended["features"]
    same(first, second, rtol=0, atol=0)
    assert first["losses"] == pytest.approx(one["losses"], rel=0.05)


def test_bfloat16(ended: dict[str, Any]) -> None:
    one = alone({**OTHERS["bfloat16"], "settings": {"precision": "fp32"}})
    first, second = ended["bfloat16"]
    same(first, second, rtol=0, atol=0)
    assert first["losses"] == pytest.approx(one["losses"], rel=0.03)
    assert {value.dtype for value in first["weights"].values()} == {torch.float32}


def test_what_goes_wrong_leaves_the_student_as_it_was(ended: dict[str, Any]) -> None:
    before = net("Blocks").state_dict()
    for found in ended["NaN"]:
        assert "TrainingError: the training loss" in found["error"]
        same(found, {"weights": before}, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["kept", "resumed", "resumed whole", "resumed from one", "resumed by one"]
)
def test_checkpoints_are_those_of_whole_networks(ended: dict[str, Any], name: str) -> None:
    """Divided or not, in two processes or one: each goes on with what the other has written."""
    (one,) = ended["one"]
    for found in ended[name]:
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert found["kept"] == one["kept"]
        same(found, one, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_holds_whole_tensors(ended: dict[str, Any]) -> None:
    tensors = load_file(ended["divided"])
    for name, value in net("Blocks").state_dict().items():
        assert tensors[f"student/{name}"].shape == value.shape
        assert tensors[f"average/{name}"].shape == value.shape
    assert tensors["optimizer.0/exp_avg"].shape == net("Blocks").stem.weight.shape


def test_one_process_is_told_to_use_torchrun() -> None:
    with pytest.raises(InvalidArgumentError, match=r"shard: expected several processes .*torchrun"):
        recover(Plain(), train=points(16), shard=True, progress=False)


@pytest.mark.parametrize(
    "other", [{"compile": True}, {"sync_batch_norm": True}, {"precision": "fp16"}]
)
def test_what_does_not_go_together(other: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=f"shard, {next(iter(other))}"):
        recover(Plain(), train=points(16), shard=True, progress=False, **other)


def test_units_are_the_outermost_blocks() -> None:
    def block() -> nn.Module:
        inner = nn.Module()
        inner.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        return inner

    assert sharded_units(Blocks()) == ["blocks.0", "blocks.1", "blocks.2"]
    stages = nn.Module()
    stages.stem = nn.Linear(3, 8)
    stages.stages = nn.ModuleList([nn.Sequential(block(), block()), nn.Sequential(block())])
    assert sharded_units(stages) == ["stages.0.0", "stages.0.1", "stages.1.0"]
    assert sharded_units(Plain()) == []
    plain = nn.Sequential(nn.Linear(99, 99), nn.BatchNorm1d(99), nn.ReLU(), nn.Linear(99, 99))
    assert sharded_units(plain) == ["0", "3"]


def test_what_cannot_be_divided_is_named() -> None:

    tied, number, mixed = Blocks(), Blocks(), Blocks()
    tied.blocks[1].up.weight = tied.blocks[0].up.weight
    number.scale = nn.Parameter(torch.tensor(1.0))
    mixed.blocks[2].up.bfloat16()
    for model, message in (
        (tied, r"'blocks.1.up.weight' is shared by the blocks 'blocks.0' and 'blocks.1'"),
        (number, "'scale' is a single number"),
        (mixed, "'blocks.2.up.weight' is torch.bfloat16|is torch.float32"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            check_divisible("student", model, sharded_units(model))

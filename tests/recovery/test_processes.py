"""Two processes that talk through gloo train as one does that takes twice as many images."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch
from distributed_runs import launch, net, run, under_torchrun
from image_files import jpeg, write_shards

import chanprune_ext as cpx
from chanprune_ext.models import resnet20
from chanprune_ext.recovery import Recipe

if TYPE_CHECKING:
    from pathlib import Path

# What two processes run with batches of 8, and what one runs with batches of 16 where that is
# described otherwise. Sums are rounded in another order: 1e-6 is some ten times what that makes.
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dataset": ({"val": 31, "progress": True}, {"progress": False}),
    "dataset whose size is not divisible": ({"images": 101, "val": 31}, {}),
    "loader shuffled by torch": ({"data": "loader", "val": 20, "val_data": "loader"}, {}),
    "loader that ends with a small batch": (
        {"data": "uneven loader", "images": 100},
        {"data": "filled list"},
    ),
    "DistributedSampler": ({"data": "sampler"}, {"data": "uneven loader"}),
    "loader of its own way, split by a DistributedSampler": (
        {"data": "own way, split"},
        {"data": "doubled list"},
    ),
    "frozen layer that the loss does not reach": ({"net": "Unreached", "frozen": ["aside"]}, {}),
    "list": ({"data": "list"}, {}),
    "own share": ({"data": "own"}, {"data": "list"}),
    "teacher and average": (
        {"teacher": True, "val": 31, "settings": {"ema_decay": 0.8, "keep": "best", "epochs": 3}},
        {},
    ),
    "statistics measured anew": ({"settings": {"swa_start": 0.5, "bn_batches": 2}}, {}),
    "accumulated gradients": (
        {"images": 101, "settings": {"batch_size": 4, "gradient_accumulation_steps": 2}},
        {"settings": {"batch_size": 16}},
    ),
    "learning rate by the size of an update": (
        {"settings": {"lr_scale": "linear", "lr_base_size": 8}},
        {},
    ),
}
NORMED = {"net": "Normed", "images": 101, "val": 200, "settings": {"epochs": 4}}
OTHERS: dict[str, dict[str, Any]] = {
    "batch norm": NORMED,
    "made differently": {**NORMED, "made": "differently"},
    "dropout": {"net": "Dropping"},
    "mixup": {"settings": {"mixup": 0.4}},
    "small": {"images": 13},
    "features": {"teacher": True, "settings": {"losses": {"features": 1.0}, "taps": ["one"]}},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "foreign sampler": (
        {"data": "foreign sampler"},
        r"InvalidArgumentError: train: its DistributedSampler is that of process 0 of 3",
    ),
    "sampler for validation": (
        {"val": 20, "val_data": "sampler"},
        r"InvalidArgumentError: val: has a DistributedSampler, which repeats images",
    ),
    "same batches": ({"data": "same"}, r"DataError: train: all 2 processes got the same first"),
    "other teachers": (
        {"teacher": "another in each process"},
        r"InvalidArgumentError: teacher: expected the same weights in all processes",
    ),
    "loader of its own way": (
        {"data": "own way"},
        "InvalidArgumentError: train: expected a DataLoader that iterates as torch's does",
    ),
    "validation of its own way": (
        {"val": 20, "val_data": "own way"},
        "InvalidArgumentError: val: expected a DataLoader that iterates as torch's does",
    ),
    "layer without a gradient": (
        {"net": "Unreached"},
        "InvalidArgumentError: student: the loss gives 'aside.weight', 'aside.bias' no gradient",
    ),
    "synchronised batch norm": (
        {"net": "Normed", "settings": {"sync_batch_norm": True}},
        r"InvalidArgumentError: sync_batch_norm: torch's SyncBatchNorm needs CUDA",
    ),
    "NaN": ({"settings": {"lr": 1e30, "max_grad_norm": None}}, "TrainingError: the training loss"),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What both processes ended each of the runs above with, all in one start of them."""
    jobs = {
        **{name: job for name, (job, _) in SAME.items()},
        **OTHERS,
        **{name: job for name, (job, _) in REFUSED.items()},
    }
    folder: Path = tmp_path_factory.mktemp("distributed")
    if find_spec("webdataset") is not None:
        files = {f"n{i % 3}/{i:02}.JPEG": jpeg(i) for i in range(37)}
        shards = write_shards(folder / "shards", files, (20, 17))
        jobs["shards"] = {"data": "shards", "val_data": "shards", "folder": str(shards)}
    found = dict(zip(jobs, launch(folder, *jobs.values()), strict=True))
    return {**found, "output": (folder / "output").read_text()}


def alone(job: dict[str, Any], differs: dict[str, Any]) -> dict[str, Any]:
    settings = {**job.get("settings", {}), "batch_size": 16, **differs.get("settings", {})}
    settings.pop("gradient_accumulation_steps", None)
    return run({**job, **differs, "settings": settings})


def same_weights(one: dict[str, Any], two: dict[str, Any], **tolerance: float) -> None:
    assert one["weights"].keys() == two["weights"].keys()
    for name, value in two["weights"].items():
        torch.testing.assert_close(one["weights"][name], value, msg=name, **tolerance)


@pytest.mark.parametrize("name", SAME)
def test_as_one_process_with_twice_the_batch(ended: dict[str, Any], name: str) -> None:
    one = alone(*SAME[name])
    first, second = ended[name]
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-6)
    assert (first["images"], first["kept"]) == (one["images"], one["kept"])
    same_weights(first, one, rtol=1e-5, atol=1e-6)
    same_weights(first, second, rtol=0, atol=0)
    assert {k: v for k, v in first.items() if k != "weights"} == {
        k: v for k, v in second.items() if k != "weights"
    }
    for found, expected in zip(first["val"], one["val"], strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            assert found == pytest.approx(expected, rel=1e-6)


def test_batch_norm_sees_half_the_images_and_ends_alike(ended: dict[str, Any]) -> None:
    one = alone(OTHERS["batch norm"], {})
    first, second = ended["batch norm"]
    same_weights(first, second, rtol=0, atol=0)
    assert first["losses"] == pytest.approx(one["losses"], rel=0.2)
    # A mean of means over both is the mean over all. The first layer hardly differs.
    torch.testing.assert_close(
        first["weights"]["norm.running_mean"],
        one["weights"]["norm.running_mean"],
        rtol=0.1,
        atol=0.1,
    )
    untrained = net("Normed").state_dict()["norm.running_mean"]
    assert (first["weights"]["norm.running_mean"] - untrained).abs().max() > 0.2
    assert first["val"][-1]["top1"] == pytest.approx(one["val"][-1]["top1"], abs=0.1)
    assert first["val"][-1]["n"] == 200


def test_all_begin_with_what_the_first_process_has(ended: dict[str, Any]) -> None:
    expected = ended["batch norm"][0]
    for found in ended["made differently"]:
        same_weights(found, expected, rtol=0, atol=0)
        assert found["losses"] == expected["losses"]


def test_each_process_draws_for_itself(ended: dict[str, Any]) -> None:
    first, second = ended["dropout"]
    assert first["masks"] != second["masks"]
    same_weights(first, second, rtol=0, atol=0)
    first, second = ended["mixup"]
    same_weights(first, second, rtol=0, atol=0)


def test_features_alone(ended: dict[str, Any]) -> None:
    """The layers behind the features get no gradient, which DistributedDataParallel waits for."""
    one = alone(OTHERS["features"], {})
    first, second = ended["features"]
    same_weights(first, second, rtol=0, atol=0)
    # The loss is a ratio within each batch: not quite the mean over two halves.
    assert first["losses"] == pytest.approx(one["losses"], rel=0.05)


def test_a_dataset_smaller_than_all_batches_is_filled_up(ended: dict[str, Any]) -> None:
    first, second = ended["small"]
    assert first["images"] == second["images"] == [16, 16]
    same_weights(first, second, rtol=0, atol=0)


def test_shards_are_divided_by_their_own_loader(ended: dict[str, Any]) -> None:
    pytest.importorskip("webdataset")
    first, second = ended["shards"]
    assert first["images"] == second["images"] == [32, 32]
    assert [found["n"] for found in first["val"]] == [37, 37, 37]
    assert first["val"] == second["val"]
    same_weights(first, second, rtol=0, atol=0)


def test_only_the_first_process_tells_of_progress(ended: dict[str, Any]) -> None:
    assert ended["output"].count("epoch 1/2 loss") == ended["output"].count("epoch 2/2 loss") == 1


@pytest.mark.parametrize("name", REFUSED)
def test_what_goes_wrong_is_said_by_all_processes(ended: dict[str, Any], name: str) -> None:
    job, message = REFUSED[name]
    before = net(job.get("net", "Plain")).state_dict()
    for found in ended[name]:
        assert message in found["error"]
        assert all(torch.equal(found["weights"][k], v) for k, v in before.items())


@pytest.mark.slow
def test_the_command_in_two_processes(tmp_path: Path) -> None:
    """One of them writes and prints, and the model is as if one had trained it."""
    pytest.importorskip("sklearn")
    small = tmp_path / "small.safetensors"
    torch.manual_seed(0)
    cpx.save(resnet20(in_channels=1, width=4), small)
    arguments = [
        *("recover", "resnet20", "--model-arg", "in_channels=1", "--model-arg", "width=4"),
        *("--weights", str(small), "--data", "digits", "--epochs", "1", "--batch-size", "64"),
        *("--out", str(tmp_path / "out.safetensors"), "--checkpoints", str(tmp_path / "run")),
    ]
    done = under_torchrun("-m", "chanprune_ext", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("after: top-1") == done.stdout.count("model: ") == 1
    assert "Warning" not in done.stderr.replace("UserWarning: Grad strides", "")
    recipe = Recipe.load(tmp_path / "out.recipe.json")
    assert recipe.batch_size == 64
    loaded = cpx.load(tmp_path / "out.safetensors", resnet20(in_channels=1, width=4))
    before = cpx.load(small, resnet20(in_channels=1, width=4)).state_dict()
    assert not any(torch.equal(p, before[name]) for name, p in loaded.named_parameters())
    assert len(list((tmp_path / "run").iterdir())) == 2

"""Runs of several processes go on from their checkpoints, also with another number of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from distributed_runs import launch, run

if TYPE_CHECKING:
    from pathlib import Path

# Three epochs of six updates of 16 images. Masks of dropout and shifted images are drawn anew in
# each process; the loader of the one begins in the middle, that of the other is run through.
DRAWING = {"net": "Dropping", "data": "images", "val": 0, "settings": {"epochs": 3}}
AVERAGED = {"val": 31, "images": 99, "settings": {"epochs": 3, "ema_decay": 0.8, "keep": "best"}}

LISTED = {"data": "list", "settings": {"epochs": 2}}


def with_settings(job: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {**job, "settings": {**job["settings"], **settings}}


def kept(folder: Path, **more: Any) -> dict[str, Any]:
    return {"checkpoint_dir": str(folder), "checkpoint_every": 1, "keep_checkpoints": 99, **more}


def names(folder: Path) -> list[int]:
    return sorted(int(path.stem.split("-")[1]) for path in folder.iterdir())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One start of two processes that are killed, and one of two that go on."""
    folder: Path = tmp_path_factory.mktemp("processes")
    killed, whole = folder / "killed", folder / "whole"
    listed, single = folder / "listed", folder / "single"
    launch(folder, with_settings(DRAWING, **kept(killed)) | {"die_at": 7}, dies=True)
    left = names(killed)
    one = run(with_settings(AVERAGED, batch_size=16, **kept(single)))
    older = single / "checkpoint-000000008.safetensors"
    found = launch(
        folder,
        with_settings(DRAWING, **kept(killed, resume="auto")),
        DRAWING,
        with_settings(AVERAGED, **kept(whole)),
        with_settings(AVERAGED, resume=str(older)),
        with_settings(LISTED, **kept(listed)),
        with_settings(DRAWING, **kept(folder / "full")) | {"full disk": True},
    )
    keys = ("resumed", "uninterrupted", "averaged", "one becomes two", "list", "full disk")
    return {
        "left": left,
        "whole": whole,
        "listed": listed,
        "one": one,
        **dict(zip(keys, found, strict=True)),
    }


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """To what another order of sums makes of it."""
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert found["kept"] == expected["kept"]
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=1e-5, atol=1e-6, msg=name)
    for one, two in zip(found["val"], expected["val"], strict=True):
        assert (one is None and two is None) or one == pytest.approx(two, rel=1e-6)


def test_two_processes_are_killed_and_go_on(runs: dict[str, Any]) -> None:
    assert runs["left"] == [0, 1, 2, 3, 4, 5, 6, 7]
    for resumed, uninterrupted in zip(runs["resumed"], runs["uninterrupted"], strict=True):
        same(resumed, uninterrupted)
        assert resumed["images"] == [96, 96, 96]
        assert not resumed["warnings"]
    # Each process has gone on with the numbers of its own.
    first, second = runs["resumed"]
    assert first["masks"] != second["masks"]
    assert first["masks"][0] == runs["uninterrupted"][0]["all masks"][7]
    assert second["masks"][0] == runs["uninterrupted"][1]["all masks"][7]


def test_checkpoints_do_not_change_the_run(runs: dict[str, Any]) -> None:
    for found in runs["averaged"]:
        same(found, runs["one"])
    assert names(runs["whole"]) == list(range(19))


@pytest.mark.parametrize("update", [8, 12, 18])
def test_two_processes_become_one(runs: dict[str, Any], update: int) -> None:
    older = runs["whole"] / f"checkpoint-{update:09d}.safetensors"
    found = run(with_settings(AVERAGED, batch_size=16, resume=str(older)))
    same(found, runs["one"])
    assert "was written by 2 processes, there are 1 now" in found["warnings"][0]
    assert "an update sees as many images as before" in found["warnings"][0]


def test_one_process_becomes_two(runs: dict[str, Any]) -> None:
    for found in runs["one becomes two"]:
        same(found, runs["one"])
    first, second = runs["one becomes two"]
    assert "was written by 1 processes, there are 2 now" in first["warnings"][0]
    assert not second["warnings"]  # it is said once


def test_updates_of_another_size_go_on_after_as_many_images(
    runs: dict[str, Any], tmp_path: Path
) -> None:
    older = runs["whole"] / "checkpoint-000000008.safetensors"
    folder = tmp_path / "checkpoints"
    found = run(with_settings(AVERAGED, **kept(folder, resume=str(older))))
    assert "an update sees 8 images, it saw 16" in found["warnings"][0]
    # Update 8 was the second of the second epoch; halved, it is the fourth after the twelve.
    assert min(names(folder)) == 17
    assert max(names(folder)) == 36
    assert found["images"] == [96, 96, 96]
    # Batches that do not end where an update did: it goes on a little before that.
    folder = tmp_path / "others"
    settings = kept(folder, resume=str(older), batch_size=10)
    found = run(with_settings(AVERAGED, **settings))
    assert min(names(folder)) == 9 + 32 // 10 + 1


def test_without_a_batch_size_only_the_end_of_an_epoch_will_do(runs: dict[str, Any]) -> None:
    for update, message in ((8, "was written in the middle of an epoch by 2"), (6, None)):
        older = runs["listed"] / f"checkpoint-{update:09d}.safetensors"
        found = run(with_settings(LISTED, batch_size=16, resume=str(older)))
        if message is None:
            same(found, runs["list"][0])
            assert "saw an unknown number of" in found["warnings"][0]
        else:
            assert message in found["error"]


def test_a_full_disk_is_said_by_all_processes(runs: dict[str, Any]) -> None:
    for found in runs["full disk"]:
        assert "OutputError" in found["error"]
        assert "No space left" in found["error"]

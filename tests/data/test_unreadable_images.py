"""Broken images are left out, counted and named; too many stop the run; both loaders alike."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from image_files import jpeg, write_folder, write_shards
from torch import nn

from chanprune_ext.data import calibration_batches, make_loader, open_dataset
from chanprune_ext.data.decoding import decoded
from chanprune_ext.data.unreadable import UnreadableImagesWarning
from chanprune_ext.errors import DataError
from chanprune_ext.recovery import evaluate, recover

if TYPE_CHECKING:
    from pathlib import Path

    from chanprune_ext.data.files import EncodedImages

COUNT = 120
SMALL: dict[str, Any] = {"size": 66, "resize": 66}


def open_set(root: Path, kind: str, broken: tuple[int, ...] = (), **options: Any) -> EncodedImages:
    """120 tiny images of two classes, some of them cut off in the middle."""
    images = [jpeg(i, 66, 66) for i in range(5)]
    files = {}
    for i in range(COUNT):
        data = images[i % 5]
        files[f"{'ab'[i % 2]}/{i:03}.jpg"] = data[: len(data) // 2] if i in broken else data
    if kind == "folder":
        where = write_folder(root / "folder", files)
    else:
        pytest.importorskip("webdataset")
        where = write_shards(root / "shards", files, (50, 70))
    return open_dataset(where, "train", **SMALL, **options)


def told(caught: pytest.WarningsRecorder) -> list[str]:
    return [str(one.message) for one in caught if one.category is UnreadableImagesWarning]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_one_broken_image_is_left_out_and_named(tmp_path: Path, kind: str, workers: int) -> None:
    data = open_set(tmp_path, kind, (61,))
    loader = make_loader(data, 16, shuffle=True, workers=workers)
    for _ in range(2):  # the next epoch counts anew
        with pytest.warns(UnreadableImagesWarning) as caught:
            batches = list(loader)
        lengths = sorted(len(labels) for _, labels in batches)
        assert lengths in ([8, 15, *[16] * 6], [7, *[16] * 7])
        assert all(len(images) == len(labels) for images, labels in batches)
        message = told(caught)[0]
        assert "1 image that can't be read was left out" in message
        assert "b/061" in message
        assert ("part-0001.tar" in message) == (kind == "shards")
        assert "truncated" in message
    assert sum(int(labels.sum()) for _, labels in batches) == COUNT // 2 - 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_more_than_one_in_a_hundred_stop_the_run(tmp_path: Path, kind: str, workers: int) -> None:
    data = open_set(tmp_path, kind, (3, 61))
    with pytest.raises(DataError, match=r"2 unreadable images(.|\n)*more than 1%(.|\n)*120") as e:
        list(make_loader(data, 16, workers=workers))
    assert "a/003" in str(e.value) or "b/003" in str(e.value)
    assert "b/061" in str(e.value)
    assert "Traceback" not in str(e.value)


def test_sound_images_warn_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnreadableImagesWarning)
        assert len(list(make_loader(open_set(tmp_path, "folder"), 16))) == 8


def test_batches_of_one_are_passed_over(tmp_path: Path) -> None:
    loader = make_loader(open_set(tmp_path, "folder", (5,)), 1)
    with pytest.warns(UnreadableImagesWarning):
        assert [len(labels) for _, labels in loader] == [1] * (COUNT - 1)


def network() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 2))


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_recovery_and_evaluation_go_on_without_it(tmp_path: Path, kind: str) -> None:
    data = open_set(tmp_path, kind, (61,), augment=True)
    options: dict[str, Any] = {"batch_size": 16, "progress": False, "warmup": 0}
    with pytest.warns(UnreadableImagesWarning) as caught:
        result = recover(network(), train=data, val=data, epochs=2, **options)
    assert len(result.history) == 2
    assert len(told(caught)) >= 4  # three measurements, and each epoch that came upon it
    with pytest.warns(UnreadableImagesWarning):
        assert evaluate(network(), data).n == COUNT - 1
    with pytest.raises(DataError, match="the run stops"):
        recover(network(), train=open_set(tmp_path, kind, (3, 61, 62)), epochs=1, **options)


def test_calibration_takes_another_image_instead(tmp_path: Path) -> None:
    data = open_set(tmp_path, "folder", (61,))
    with pytest.warns(UnreadableImagesWarning):
        assert sum(map(len, calibration_batches(data, COUNT))) == COUNT - 1
    batches = calibration_batches(open_set(tmp_path, "folder"), 7, 4)
    assert [len(batch) for batch in batches] == [4, 3]


def test_small_images_are_sorted_out_when_opened(tmp_path: Path) -> None:
    files = {f"{'ab'[i % 2]}/{i:03}.jpg": jpeg(i, 32, 32) for i in range(COUNT)}
    files["b/061.jpg"] = b"\xff\xd8 no image"
    with pytest.warns(UnreadableImagesWarning, match=r"b/061\.jpg is no readable image"):
        data = open_dataset(write_folder(tmp_path, files))
    assert data.images.shape == (COUNT - 1, 3, 32, 32)
    assert data.labels.tolist() == [0] * 60 + [1] * 59
    (tmp_path / "a" / "000.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="the run stops"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\0\0\0"])
def test_every_kind_of_rubbish_is_a_data_error(data: bytes) -> None:
    with pytest.raises(DataError, match="x is no readable image"):
        decoded(data, "x")


def test_a_grey_image_has_three_channels(tmp_path: Path) -> None:
    import io

    from PIL import Image

    for kind in ("jpeg", "png"):
        buffer = io.BytesIO()
        Image.new("L", (5, 4), 77).save(buffer, kind)
        pixels = decoded(buffer.getvalue(), "x")
        assert pixels.shape == (3, 4, 5)
        assert torch.equal(pixels, torch.full_like(pixels, 77))

"""Every kind of image set, what is done to its images, and every way in which it can be wrong."""

from __future__ import annotations

import io
import multiprocessing
import pickle
import tarfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from image_files import DATA, write_folder, write_tar
from PIL import Image
from torch.utils.data import DataLoader

from chanprune_ext.checkpoint import load_weights
from chanprune_ext.data import (
    FileImages,
    TensorImages,
    calibration_batches,
    make_loader,
    open_dataset,
)
from chanprune_ext.data.archive import ImageArchive
from chanprune_ext.errors import DataError, InvalidArgumentError
from chanprune_ext.models import resnet56
from chanprune_ext.recovery import evaluate

if TYPE_CHECKING:
    from pathlib import Path

RAW, WEIGHTS = DATA / "cifar10-raw-subset.npz", DATA / "resnet56-cifar10.safetensors"
UNIT = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def npz(path: Path, **changes: Any) -> Path:
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "train_images": random.integers(0, 256, (12, 8, 8, 3), np.uint8),
        "train_labels": np.arange(12) % 4,
        "test_images": random.integers(0, 256, (5, 8, 8, 3), np.uint8),
        "test_labels": np.arange(5),
    }
    arrays.update(changes)
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def png(value: int, edge: int = 8, width: int | None = None) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width or edge, edge), (value, 2 * value, 3 * value)).save(buffer, "png")
    return buffer.getvalue()


SPLIT_FILES = {
    f"set/{split}/{kind}/{i}.png": png(10 * i + offset)
    for split, offset in (("train", 1), ("test", 2))
    for kind in ("cat", "ant")
    for i in range(3)
}


def test_npz_pixels_labels_and_default_normalisation(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz")
    data = open_dataset(path, "train")
    raw = np.load(path)["train_images"]
    expected = (raw / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    images = torch.stack([data[i][0] for i in range(12)])
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, torch.from_numpy(expected).permute(0, 3, 1, 2).float())
    assert data.labels.tolist() == [i % 4 for i in range(12)]
    assert data.num_classes == 5  # the test labels reach to 4: both splits agree on the classes
    assert len(open_dataset(path, "test")) == len(open_dataset(path, "val")) == 5


def test_npz_of_grey_images_without_a_channel_axis(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", test_images=np.full((5, 6, 7), 255, np.uint8))
    data = open_dataset(path)
    assert data.shape == (1, 6, 7)
    assert torch.equal(data[0][0], torch.ones(1, 6, 7))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"test_images": None},
            r"no array 'test_images'; expected test_images and test_labels, found train_images, ",
        ),
        ({"test_labels": None}, "no array 'test_labels'; expected"),
        ({"test_images": np.zeros((5, 8, 8, 3))}, r"test_images: expected .*uint8.*got float64"),
        ({"test_images": np.zeros((5, 8), np.uint8)}, r"got uint8 \[5, 8\]"),
        ({"test_images": np.zeros((0, 8, 8, 3), np.uint8)}, "non-empty"),
        ({"test_labels": np.arange(4)}, "5 test_images but 4 test_labels"),
        ({"test_labels": np.array([0, 1, -2, 0, 0])}, "expected numbers from 0, got -2"),
        ({"test_labels": np.zeros(5)}, r"expected integers \[N\], got float64"),
        ({"test_labels": np.array([{}] * 5)}, "not a complete .npz"),
    ],
)
def test_wrong_npz_files_are_explained(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = npz(tmp_path / "a.npz", **changes)
    with pytest.raises(DataError, match=message):
        open_dataset(path)


@pytest.mark.parametrize("keep", [0, 100, 1000, -30])
def test_truncated_npz_files_are_recognised(tmp_path: Path, keep: int) -> None:
    path = npz(tmp_path / "a.npz")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"a\.npz: not a complete \.npz file"):
        open_dataset(path)


@pytest.mark.parametrize("kind", ["folder", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"])
def test_folders_and_archives_give_the_same_images(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        path = write_folder(tmp_path, SPLIT_FILES)
    else:
        path = write_tar(tmp_path / f"a{kind}", SPLIT_FILES | {"set/readme.txt": b"no image"})
    for split, offset in (("train", 1), ("test", 2)):
        data = open_dataset(path, split, **UNIT)
        assert isinstance(data, TensorImages)
        assert data.class_names == ("ant", "cat")
        assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert data.shape == (3, 8, 8)
        for i in range(3):
            value = 10 * i + offset
            expected = torch.tensor([value, 2 * value, 3 * value]) / 255
            torch.testing.assert_close(data[i][0].mean((1, 2)), expected)
    assert len(list(tmp_path.iterdir())) == 1


def test_reading_an_archive_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "a.tar.gz", SPLIT_FILES)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    archive = ImageArchive(path)
    assert len(list(scratch.iterdir())) == 1
    assert archive.read(0) in SPLIT_FILES.values()
    del archive
    assert list(scratch.iterdir()) == []


def test_a_set_without_split_folders_serves_any_split(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"n01/x.png": png(1), "n02/y.png": png(2)})
    assert len(open_dataset(path, "train")) == len(open_dataset(path, "test")) == 2


def test_val_and_test_folders_stand_in_for_each_other(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"train/a/0.png": png(1), "val/a/1.png": png(2)})
    assert len(open_dataset(root, "test")) == 1
    assert open_dataset(root, "test", **UNIT)[0][0][0, 0, 0] == pytest.approx(2 / 255)
    (root / "test").symlink_to(root / "val")
    only = write_folder(tmp_path / "only", {"train/a/0.png": png(1), "train/b/0.png": png(1)})
    with pytest.raises(DataError, match="no folder for split 'test'; found train"):
        open_dataset(only, "test")


def test_class_file_fixes_the_labels(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"set/n9/x.png": png(1), "set/n3/y.png": png(2)})
    classes = tmp_path / "classes.txt"
    classes.write_text("n9\nn5\nn3\n")
    data = open_dataset(path, class_file=classes)
    assert data.labels.tolist() == [2, 0]  # in the order of the files: n3, n9
    assert data.num_classes == 3
    classes.write_text("n9\nn5\n")
    with pytest.raises(DataError, match=r"folder 'n3' \(one of 1\) is not among the 2 names"):
        open_dataset(path, class_file=classes)
    with pytest.raises(DataError, match="class_file: can't read"):
        open_dataset(path, class_file=tmp_path / "none.txt")


def test_large_images_are_cut_to_size_and_small_ones_scaled(tmp_path: Path) -> None:
    large = write_folder(tmp_path / "large", {"a/0.png": png(50, 80, 120), "b/0.png": png(60, 300)})
    data = open_dataset(large, **UNIT)
    assert isinstance(data, FileImages)
    assert [data[i][0].shape for i in range(2)] == [(3, 224, 224)] * 2
    torch.testing.assert_close(data[1][0][0], torch.full((224, 224), 60 / 255))
    assert open_dataset(large, size=96, resize=96)[0][0].shape == (3, 96, 96)
    small = open_dataset(large, size=32)
    assert isinstance(small, TensorImages)
    assert small.images.shape == (2, 3, 32, 32)


def test_default_scaling_keeps_the_margin_of_imagenet(tmp_path: Path) -> None:
    picture = np.zeros((256, 256, 3), np.uint8)
    picture[16:240, 16:240] = 255  # what remains of 256 pixels when 224 are cut out
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    root = write_folder(tmp_path, {"a/0.png": buffer.getvalue()})
    assert open_dataset(root, **UNIT)[0][0].min() == 1
    assert open_dataset(root, resize=224, **UNIT)[0][0].min() == 0


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"readme.txt": b"x"}, "no image found in a class folder"),
        ({"x.png": png(1)}, "no image found in a class folder"),
        ({"train/a/x.png": png(1), "train/x.png": png(1)}, r"train/x\.png lies in no class folder"),
        (
            {"train/a/x.png": png(1), "docs/b/x.png": png(1)},
            r"b/x\.png lies in no .* of train",
        ),
        ({"s/train/a/x.png": png(1), "s/x.png": png(1)}, r"s/x\.png lies in no class folder"),
        ({"train/x.png": png(1), "Test/x.png": png(1)}, "/ holds images in no class folder"),
        ({"train/a/x.png": png(1), "val/x.png": png(1)}, "val/ holds images in no class folder"),
        ({"a/x.png": b"\x89PNG but not really"}, r"a/x\.png is no readable image"),
        ({"a/x.png": png(1)[:50]}, r"a/x\.png is no readable image"),
    ],
)
def test_bad_folders_and_archives_are_explained(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(write_folder(tmp_path / "tree", files))
    with pytest.raises(DataError, match=message):
        open_dataset(write_tar(tmp_path / "a.tar", files))


def test_split_folders_however_they_are_written(tmp_path: Path) -> None:
    names = ("Set/Train/a/0.png", "Set/Train/b/1.png", "Set/Valid/b/2.png", "Set/test/3.png")
    root = write_folder(tmp_path / "tree", dict.fromkeys(names, png(1)))
    for spec in (root, write_tar(tmp_path / "a.tar", dict.fromkeys(names, png(1)))):
        train, test = open_dataset(spec, "train"), open_dataset(spec, "test")
        assert train.class_names == test.class_names == ("a", "b")
        # The unsorted images of Set/test are left out; those of Set/Valid stand in.
        assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1], [1])


def test_a_class_may_have_the_name_of_a_split(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"bus/0.png": png(1), "train/1.png": png(2)})
    assert open_dataset(root, "test").class_names == ("bus", "train")


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_a_class_folder_without_images_shifts_no_label(tmp_path: Path, kind: str) -> None:
    spec = write_folder(tmp_path / "set", {"a/0.png": png(1), "c/0.png": png(2)})
    (spec / "b").mkdir()
    if kind == "archive":
        spec = tmp_path / "set.tar"
        with tarfile.open(spec, "w") as archive:
            archive.add(tmp_path / "set", "set")
    with pytest.raises(DataError, match=r"class folder 'b' .* holds no image"):
        open_dataset(spec)
    assert open_dataset(spec, class_file=("a", "b", "c")).labels.tolist() == [0, 2]


def test_an_empty_class_of_one_split_is_known_from_another(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"train/a/0.png": png(1), "train/b/0.png": png(2)})
    write_folder(root, {"val/b/0.png": png(3)})
    (root / "val" / "a").mkdir()
    assert open_dataset(root, "val").labels.tolist() == [1]


def test_hidden_folders_and_links_in_a_circle_hold_no_images(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"a/0.png": png(1), "b/0.png": png(2)})
    write_folder(root, {".ipynb_checkpoints/0.png": png(3), ".trash/c/0.png": png(4)})
    (root / "a" / "loop").symlink_to("..")
    found = open_dataset(root)
    assert (found.class_names, found.labels.tolist()) == (("a", "b"), [0, 1])


def test_grey_images_of_more_than_8_bits(tmp_path: Path) -> None:
    def encoded(values: np.ndarray, kind: str) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, kind)
        return buffer.getvalue()

    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    for kind in ("png", "tiff"):
        root = write_folder(tmp_path, {f"{kind}/a/0.{kind}": encoded(ramp.astype(np.uint16), kind)})
        pixels = open_dataset(root / kind, **UNIT)[0][0][0]
        assert torch.allclose(pixels, torch.from_numpy(ramp / 65535).float(), atol=0.5 / 255 + 1e-6)
    write_folder(tmp_path, {"f/a/0.tiff": encoded((ramp / 65535).astype(np.float32), "tiff")})
    with pytest.raises(DataError, match="pixels of mode F, 32 bits, have no known range"):
        open_dataset(tmp_path / "f")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz"])
@pytest.mark.parametrize("keep", [0, 0.1, 0.3, 0.5, 0.63, 0.9])
def test_truncated_archives_are_recognised(tmp_path: Path, suffix: str, keep: float) -> None:
    random = np.random.default_rng(0)
    path = write_tar(tmp_path / f"a{suffix}", {f"a/{i}.png": random.bytes(4000) for i in range(3)})
    data = path.read_bytes()
    end = 3 * 4608 if suffix == ".tar" else len(data)  # zeros follow the three members
    path.write_bytes(data[: int(keep * end)])
    with pytest.raises(DataError, match="not a complete tar archive"):
        open_dataset(path)


def test_missing_and_unknown_data_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder; expected a"):
        open_dataset(tmp_path / "none.npz.gz")
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"data\.csv: unknown kind of data"):
        open_dataset(tmp_path / "data.csv")
    with pytest.raises(InvalidArgumentError, match="split: expected 'train', 'val' or 'test'"):
        open_dataset("digits", "training")
    with pytest.raises(InvalidArgumentError, match="class_file: only folders and archives"):
        open_dataset("digits", class_file="x")
    with pytest.raises(InvalidArgumentError, match="size: expected a positive number, got 0"):
        open_dataset("digits", size=0)
    with pytest.raises(InvalidArgumentError, match="expected 1 values"):
        open_dataset("digits", mean=(0.5, 0.5))
    with pytest.raises(InvalidArgumentError, match="std: expected positive values"):
        open_dataset("digits", std=(0.0,))


def test_resize_must_suit_the_size(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"a/0.png": png(1, 100)})
    with pytest.raises(InvalidArgumentError, match="resize: expected at least size = 80, got 70"):
        open_dataset(root, size=80, resize=70)
    with pytest.raises(InvalidArgumentError, match="resize: only taken with size > 64"):
        open_dataset(root, size=32, resize=40)


def test_cifar10_in_the_layout_of_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda _: True)
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, name in enumerate(names):
        pixels = np.full((2, 3072), i, np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [i, 9]}))
    meta = pickle.dumps({"label_names": [f"class{i}" for i in range(10)]})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setitem(CIFAR10.meta, "md5", None)
    train = open_dataset(f"cifar10:{tmp_path}", "train", **UNIT)
    assert train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert train.class_names[9] == "class9"
    assert train[8][0][0, 0, 0] == pytest.approx(4 / 255)
    assert open_dataset(f"cifar10:{tmp_path}").labels.tolist() == [5, 9]


def test_cifar10_that_can_not_be_downloaded_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from urllib.error import URLError

    from torchvision.datasets import CIFAR10

    def offline(_: CIFAR10) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(CIFAR10, "download", offline)
    with pytest.raises(DataError, match=r"no route to host.*put the folder cifar-10-batches-py"):
        open_dataset(f"cifar10:{tmp_path}")


def test_digits_are_split_without_overlap() -> None:
    train, test = open_dataset("digits", "train"), open_dataset("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.shape == (1, 8, 8)
    assert sorted(set(test.labels.tolist())) == list(range(10))
    assert train[0][0].min() == pytest.approx(-0.305 / 0.376, abs=1e-5)


def ramp(n: int = 40, edge: int = 6, **options: Any) -> TensorImages:
    """Images in which every pixel has another value, none of them black."""
    pixels = torch.arange(1, edge * edge + 1, dtype=torch.uint8).view(1, 1, edge, edge)
    labels = torch.arange(n) % 2
    return TensorImages(pixels.repeat(n, 1, 1, 1), labels, "ab", (0.0,), (1 / 255,), **options)


def test_augmentation_shifts_and_mirrors_every_image_on_its_own() -> None:
    data = ramp(n=300, augment=True, pad=2)
    images, labels = data.batch(range(300))
    padded = torch.nn.functional.pad(data.images[0, 0].float(), (2, 2, 2, 2))
    views = {
        tuple((crop.flip(1) if mirror else crop).flatten().tolist())
        for top in range(5)
        for left in range(5)
        for crop in [padded[top : top + 6, left : left + 6]]
        for mirror in (0, 1)
    }
    seen = [tuple(image.flatten().tolist()) for image in images.round()]
    assert set(seen) <= views
    assert len(set(seen)) > 45  # of 50 equally likely ones, 300 draws miss 0.1 on average
    assert torch.equal(labels, data.labels)


def test_augmentation_depends_on_seed_epoch_and_position_alone() -> None:
    data = ramp(augment=True)
    data.set_epoch(1)
    one = data.batch(range(40))[0]
    assert torch.equal(one[[7, 3]], data.batch([7, 3])[0])
    data.set_epoch(2)
    assert not torch.equal(one, data.batch(range(40))[0])
    data.set_epoch(1)
    torch.manual_seed(99)
    assert torch.equal(one, data.batch(range(40))[0])
    assert not torch.equal(one, ramp(augment=True, seed=5).batch(range(40))[0])


def test_without_mirroring_or_augmentation() -> None:
    left_to_right = ramp(n=100, augment=True, pad=0, flip=False).batch(range(100))[0]
    assert torch.equal(left_to_right, ramp(n=100).batch(range(100))[0])
    data = ramp(augment=True)
    assert torch.equal(data.without_augmentation()[3][0], ramp()[3][0])
    assert data.augment


def test_files_are_augmented_per_epoch_without_touching_the_global_generator(
    tmp_path: Path,
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "png")
    root = write_folder(tmp_path, {"a/0.png": buffer.getvalue(), "a/1.png": buffer.getvalue()})
    data = open_dataset(root, "train", augment=True, size=80, resize=80)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = data[0][0]
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (3, 80, 80)
    assert torch.equal(first, data[0][0])
    assert not torch.equal(first, data[1][0])
    data.set_epoch(1)
    assert not torch.equal(first, data[0][0])


def test_loader_shuffles_per_epoch_and_covers_everything() -> None:
    data = ramp(n=10)
    data.labels = torch.arange(10)
    loader = make_loader(data, 4, shuffle=True, seed=3)
    orders = []
    for epoch in (1, 2, 1):
        loader.sampler.set_epoch(epoch)
        batches = [labels for _, labels in loader]
        assert [len(batch) for batch in batches] == [4, 4, 2]
        orders.append(torch.cat(batches).tolist())
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == list(range(10))
    assert len(make_loader(data, 4, drop_last=True)) == 2
    assert torch.cat([labels for _, labels in make_loader(data, 4)]).tolist() == list(range(10))


def test_any_other_loader_works_too() -> None:
    images, labels = next(iter(DataLoader(ramp(), batch_size=5)))
    assert images.shape == (5, 1, 6, 6)
    assert labels.tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_worker_processes_read_the_same_images(tmp_path: Path, suffix: str) -> None:
    files = {f"a/{i}.png": png(i, 70) for i in range(1, 7)}
    data = open_dataset(write_tar(tmp_path / f"a{suffix}", files), size=66, **UNIT)
    alone = torch.cat([images for images, _ in make_loader(data, 2)])
    context = multiprocessing.get_context("fork")
    loader = DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context=context)
    assert torch.equal(alone, torch.cat([images for images, _ in loader]))
    copied = pickle.loads(pickle.dumps(data))
    assert torch.equal(copied[3][0], data[3][0])


def test_calibration_batches_are_plain_distinct_and_repeatable() -> None:
    data = open_dataset("digits", "train", augment=True)
    batches = calibration_batches(data, 100, batch_size=32)
    assert [len(batch) for batch in batches] == [32, 32, 32, 4]
    images = torch.cat(batches)
    plain = {
        tuple(image.flatten().tolist())
        for image in data.without_augmentation().batch(range(1437))[0]
    }
    drawn = {tuple(image.flatten().tolist()) for image in images}
    assert drawn <= plain
    assert len(drawn) == 100
    assert torch.equal(images, torch.cat(calibration_batches(data, 100, batch_size=50)))
    assert not torch.equal(images, torch.cat(calibration_batches(data, 100, seed=1)))
    with pytest.raises(InvalidArgumentError, match="asked for 2000 calibration images"):
        calibration_batches(data, 2000)
    with pytest.raises(InvalidArgumentError, match="n: expected a positive number"):
        calibration_batches(data, 0)


@pytest.mark.skipif(
    not RAW.exists() or not WEIGHTS.exists(), reason="no CIFAR-10 in CHANPRUNE_DATA"
)
def test_published_resnet56_reaches_its_accuracy_on_raw_cifar10() -> None:
    data = open_dataset(RAW)
    found = evaluate(load_weights(resnet56(), WEIGHTS), data, channels_last=True)
    assert found.n == 1017
    assert 100 * found.top1 == pytest.approx(92.72, abs=0.1)


@pytest.mark.skipif(
    not (DATA / "imagenet-val-650.tar").exists(), reason="no ImageNet in CHANPRUNE_DATA"
)
def test_imagenet_archive_with_its_class_file() -> None:
    classes = DATA / "imagenet_wnids.txt"
    data = open_dataset(DATA / "imagenet-val-650.tar", class_file=classes)
    assert (len(data), data.num_classes, data.shape) == (650, 1000, (3, 224, 224))
    wnids = classes.read_text().split()
    assert isinstance(data, FileImages)
    for i in (0, 300, 649):
        name = data.archive.entries[data.positions[i]].name
        assert wnids[int(data.labels[i])] in name
    image, _ = data[0]
    assert image.shape == (3, 224, 224)
    assert 0.3 < image.std() < 3


def test_linked_class_folders_and_names_of_any_alphabet(tmp_path: Path) -> None:
    elsewhere = write_folder(tmp_path / "elsewhere", {"x/ключ.png": png(3), "x/a b.png": png(4)})
    root = tmp_path / "set"
    (root / "train").mkdir(parents=True)
    (root / "train" / "größer").symlink_to(elsewhere / "x", target_is_directory=True)
    archive = ImageArchive(root)
    assert [entry.name for entry in archive.entries] == [
        "train/größer/a b.png",
        "train/größer/ключ.png",
    ]
    assert archive.entries[-1:][0].class_name == "größer"
    assert open_dataset(root, "train", **UNIT)[1][0][0, 0, 0] == pytest.approx(3 / 255)

"""Tar shards: the images of a folder, each exactly once, however many readers there are."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from image_files import DATA, jpeg, write_folder, write_shards, write_tar
from torch import nn
from torch.utils.data import DataLoader

from chanprune_ext.data import (
    Augmentation,
    ShardedImages,
    calibration_batches,
    make_loader,
    open_dataset,
)
from chanprune_ext.data.class_names import read_class_file
from chanprune_ext.data.shards import ShardLoader
from chanprune_ext.errors import DataError
from chanprune_ext.recovery import recover

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("webdataset")

SIZES = (5, 1, 9, 4)  # 19 images: shards of uneven length, and no even division
SMALL: dict[str, Any] = {"size": 66, "resize": 70}


def files() -> dict[str, bytes]:
    return {f"n{i % 3}/{i:02}.JPEG": jpeg(i) for i in range(sum(SIZES))}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), files(), SIZES)


def loader(data: Any, batch_size: int = 4, **options: Any) -> ShardLoader:
    made = make_loader(data, batch_size, **options)
    assert isinstance(made, ShardLoader)
    return made


def prints(batches: Any) -> Counter[float]:
    """Images by a number that tells them apart."""
    return Counter(
        round(image.double().sum().item(), 2) for images, _ in batches for image in images
    )


def in_processes(
    monkeypatch: pytest.MonkeyPatch, data: ShardedImages, world: int, **options: Any
) -> list[list[Any]]:
    """What each process of a distributed run would get."""
    parts = []
    for rank in range(world):
        monkeypatch.setattr(ShardLoader, "_place", lambda _, rank=rank: (rank, world))
        one = loader(data, **options)
        parts.append(list(one))
        assert len(one) == len(parts[-1])
    return parts


def test_folder_and_shards_give_the_same_batches(root: Path, tmp_path: Path) -> None:
    folder = open_dataset(write_folder(tmp_path, files()), **SMALL)
    by_name = {name: folder[i] for i, name in enumerate(e.name for e in folder.archive.entries)}
    batches = list(loader(open_dataset(root, **SMALL)))
    assert [len(labels) for _, labels in batches] == [4, 4, 4, 4, 3]
    images = torch.cat([images for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    assert labels.tolist() == [i % 3 for i in range(19)]
    assert torch.equal(images, torch.stack([by_name[name][0] for name in files()]))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_comes_once_whatever_the_readers(
    root: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    data = open_dataset(root, **SMALL)
    everything = prints(loader(data))
    assert set(everything.values()) == {1}
    assert prints(loader(data, workers=workers)) == everything
    for world in (1, 2, 5):
        options = {"batch_size": 3, "shuffle": True, "workers": workers}
        parts = in_processes(monkeypatch, data, world, **options)
        assert sum((prints(part) for part in parts), Counter()) == everything


def test_processes_make_equally_many_full_batches(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_dataset(root, **SMALL)
    seen: Counter[float] = Counter()
    for epoch in range(12):
        data.set_epoch(epoch)
        parts = in_processes(monkeypatch, data, 2, batch_size=3, shuffle=True, drop_last=True)
        assert [[len(labels) for _, labels in part] for part in parts] == [[3, 3, 3]] * 2
        found = prints(parts[0]) + prints(parts[1])
        assert set(found.values()) == {1}
        seen += found
    assert len(seen) == 19  # the one image left over is another one in each epoch


def test_order_depends_on_seed_and_epoch_alone(root: Path) -> None:
    data = open_dataset(root, augment=True, **SMALL)

    def labels_and_pixels(seed: int, epoch: int) -> tuple[list[int], float]:
        data.set_epoch(epoch)
        batches = list(loader(data, shuffle=True, seed=seed))
        return torch.cat([y for _, y in batches]).tolist(), batches[0][0].sum().item()

    first = labels_and_pixels(0, 1)
    torch.manual_seed(5)
    assert labels_and_pixels(0, 1) == first
    assert labels_and_pixels(0, 2)[0] != first[0] != labels_and_pixels(1, 1)[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_goes_on_in_the_middle(root: Path, workers: int) -> None:
    data = open_dataset(root, augment=Augmentation(repeats=2), **SMALL)
    data.set_epoch(3)
    whole = list(loader(data, batch_size=2, shuffle=True, workers=workers))
    for done in (1, 4, 9):
        again = loader(data, batch_size=2, shuffle=True, workers=workers)
        again.seek(done)
        rest = list(again)
        assert len(rest) == len(whole) - done
        for (images, labels), (wanted, wanted_labels) in zip(rest, whole[done:], strict=True):
            assert torch.equal(images, wanted)
            assert torch.equal(labels, wanted_labels)
        assert len(list(again)) == len(whole)  # the pass after it is whole


def test_repeated_images_share_a_batch_and_differ(root: Path) -> None:
    data = open_dataset(root, augment=Augmentation(repeats=2), **SMALL)
    batches = list(loader(data, batch_size=6, shuffle=True))
    assert [len(labels) for _, labels in batches] == [6, 6, 6, 1]
    for images, labels in batches[:3]:
        assert labels[0::2].tolist() == labels[1::2].tolist()
        assert not torch.equal(images[0::2], images[1::2])
    plain = list(loader(open_dataset(root, **SMALL), batch_size=6, shuffle=True))
    assert len(prints(plain)) == 19


def test_keys_and_numbers_in_the_way_of_webdataset(tmp_path: Path) -> None:
    members = {}
    for i in range(4):
        members |= {f"s{i}.jpg": jpeg(i), f"s{i}.cls": str(3 - i).encode(), f"s{i}.json": b"{}"}
    data = open_dataset(f"shards:{write_tar(tmp_path / 'a.tar', members)}", **SMALL)
    assert data.num_classes == 4
    assert next(iter(loader(data)))[1].tolist() == [3, 2, 1, 0]
    named = {f"n01440764_{i}.jpg": jpeg(i) for i in range(2)} | {"n01443537_7.jpg": jpeg(2)}
    write_tar(tmp_path / "b" / "train-0.tar", named)
    data = open_dataset(tmp_path / "b", "train", class_file="imagenet", **SMALL)
    assert data.num_classes == 1000
    assert next(iter(loader(data)))[1].tolist() == [0, 0, 1]


def test_shards_of_a_split_are_found_by_name(tmp_path: Path) -> None:
    for name in ("in1k-train-0000", "in1k-train-0001", "in1k-validation-00"):
        write_tar(tmp_path / f"{name}.tar", {f"a/{name}.jpg": jpeg(1)})
    assert len(open_dataset(tmp_path, "train").shards) == 2
    assert len(open_dataset(tmp_path, "test").shards) == 1
    assert len(open_dataset(f"{tmp_path}/in1k-train-{{0000..0001}}.tar", "train").shards) == 2
    assert len(open_dataset(f"{tmp_path}/*valid*.tar").shards) == 1
    with pytest.raises(DataError, match=r"no shard of split 'train'; the names say val"):
        open_dataset(f"{tmp_path}/*valid*.tar", "train")
    with pytest.raises(DataError, match=r"train-0002.tar \(one of 1 of 3 shards\) is missing"):
        open_dataset(f"{tmp_path}/in1k-train-{{0000..0002}}.tar", "train")
    with pytest.raises(DataError, match="no tar file there"):
        open_dataset(f"{tmp_path}/nothing*.tar")


def test_unknown_classes_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"n01440764_1.jpg": jpeg(0), "n99999999_1.jpg": jpeg(1)})
    with pytest.raises(DataError, match=r"class folder 'n99999999' .*1000 names in imagenet"):
        open_dataset(tmp_path, class_file="imagenet")
    # with sizes.json nobody has looked into the shard before it is read
    (tmp_path / "sizes.json").write_text(json.dumps({"a.tar": 2}))
    with pytest.raises(DataError, match="give a class file"):
        open_dataset(tmp_path)
    data = open_dataset(tmp_path, class_file="imagenet", **SMALL)
    with pytest.raises(DataError, match=r"a\.tar: the class n99999999 of n99999999_1 is not among"):
        list(loader(data))


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"x/{i}.jpg": jpeg(i) for i in range(4)})
    (tmp_path / "sizes.json").write_text(json.dumps({"a.tar": 5}))
    (tmp_path / "classes.txt").write_text("x\n")
    options = {"class_file": tmp_path / "classes.txt", **SMALL}
    with pytest.raises(DataError, match=r"a\.tar: expected 5 images, found 4.*sizes\.json"):
        list(loader(open_dataset(tmp_path, **options)))
    (tmp_path / "sizes.json").unlink()
    data = open_dataset(tmp_path, **options)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"a\.tar"):
        list(loader(data))
    with pytest.raises(DataError, match=r"a\.tar: not a complete tar archive"):
        open_dataset(tmp_path, **options)
    write_tar(path, {"readme.txt": b"nothing"})
    with pytest.raises(DataError, match="no image"):
        open_dataset(tmp_path, **options)


def test_too_few_images_for_the_processes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_dataset(root, **SMALL)
    monkeypatch.setattr(ShardLoader, "_place", lambda _: (0, 8))
    with pytest.raises(DataError, match=r"19 images make no batch of 4 for each of 8 processes"):
        list(loader(data, shuffle=True, drop_last=True))


def test_a_plain_data_loader_and_calibration_read_every_image_once(root: Path) -> None:
    data = open_dataset(root, augment=True, **SMALL)
    plain = data.without_augmentation()
    everything = prints(loader(plain))
    assert prints(DataLoader(plain, batch_size=4, num_workers=2)) == everything
    batches = calibration_batches(data, 10, batch_size=4)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert prints((batch, None) for batch in batches) <= everything
    assert set(prints((batch, None) for batch in batches).values()) == {1}


def test_missing_package_is_explained(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset.tariterators", None)
    with pytest.raises(DataError, match=r"pip install 'chanprune_ext\[webdataset\]'"):
        list(loader(open_dataset(root, **SMALL)))


def test_standard_order_of_imagenet() -> None:
    names = read_class_file("imagenet")
    assert (len(names), names[0], names[999]) == (1000, "n01440764", "n15075141")
    assert sorted(names) == list(names)


def test_real_images_agree_pixel_by_pixel(tmp_path: Path) -> None:
    path = DATA / "imagenet-train-1000.tar"
    if not path.exists():
        pytest.skip(f"no {path.name} in {DATA}")
    import tarfile

    members = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isreg() and len(members) < 40:
                file = archive.extractfile(member)
                assert file is not None
                members[member.name] = file.read()
    folder = open_dataset(write_folder(tmp_path / "f", members), class_file="imagenet")
    write_shards(tmp_path / "s", members, (13, 20, 7))
    shards = open_dataset(tmp_path / "s", class_file="imagenet")
    expected = list(make_loader(folder, 8))  # the archive is in the order of the names already
    for (images, labels), (wanted, wanted_labels) in zip(loader(shards, 8), expected, strict=True):
        assert torch.equal(images, wanted)
        assert torch.equal(labels, wanted_labels)
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    # an independent reference: Pillow's decoder, torchvision's own transforms, the folder's rank
    reference = ImageFolder(
        str(tmp_path / "f" / "imagenet-train-1000"),
        v2.Compose(
            [
                v2.PILToTensor(),
                v2.Resize(256, antialias=True),
                v2.CenterCrop(224),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        ),
    )
    images = torch.cat([images for images, _ in expected])
    for index in range(0, 40, 7):
        assert expected[index // 8][1][index % 8] == reference[index][1]
        torch.testing.assert_close(images[index], reference[index][0], rtol=0, atol=2e-6)


def test_recovery_on_shards_goes_on_bit_by_bit(root: Path, tmp_path: Path) -> None:
    def network() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Dropout(), nn.Linear(27, 3))

    def run(**options: Any) -> nn.Module:
        data = open_dataset(root, "train", augment=Augmentation(auto="trivialaugment"), **SMALL)
        student = network()
        settings: dict[str, Any] = {"epochs": 2, "batch_size": 4, "warmup": 0, "progress": False}
        recover(student, train=data, **settings, **options)
        return student

    whole = run(checkpoint_dir=tmp_path, checkpoint_every=1, keep_checkpoints=20)
    checkpoints = sorted(path for path in tmp_path.iterdir() if not path.name.startswith("."))
    assert len(checkpoints) >= 8
    for path in checkpoints[1:7:2]:
        again = run(resume=path)
        assert torch.equal(again[3].weight, whole[3].weight)

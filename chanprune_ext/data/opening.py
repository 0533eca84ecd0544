"""Image classification data behind one function, :func:`open_dataset`."""

from __future__ import annotations

import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, InvalidArgumentError
from .archive import ImageArchive, decode, is_archive
from .class_names import ClassFile, class_names
from .files import FileImages
from .sets import ImageDataset, TensorImages, require_positive
from .shard_files import count_images, find_shards, is_shard_pattern
from .shards import ShardedImages
from .transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augmentation,
    Preset,
    evaluation_transform,
)
from .unreadable import UnreadableImages

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["class_folders", "classes_of_test", "open_dataset", "takes_size"]

DIGITS_MEAN, DIGITS_STD = (0.305,), (0.376,)
SMALL_EDGE = 64  # images up to this many pixels a side are decoded once and kept in memory


def open_dataset(
    spec: str | os.PathLike[str],
    split: str = "test",
    *,
    augment: bool | Augmentation = False,
    size: int | None = None,
    resize: int | None = None,
    crop_mode: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_file: ClassFile | None = None,
    seed: int = 0,
    preset: Preset | None = None,
) -> ImageDataset:
    """Opens a labelled image set.

    Args:
        spec (str or PathLike): one of

            - a ``.npz`` file with uint8 ``{train,test}_images`` ``[N, H, W, C]`` and
              ``{train,test}_labels`` ``[N]``;
            - a folder ``[split/]class/image``, or a tar archive of one (also gzip, bzip2, xz);
            - tar shards, read one after the other: a folder of tar files, or a pattern such as
              ``imagenet/train-{0000..0127}.tar`` or ``imagenet/*.tar``; ``shards:<file>`` for one
              alone. Classes are the samples' ``.cls`` numbers, or the folder or the first part of
              their names, as for folders. Needs ``pip install 'chanprune_ext[webdataset]'``;
            - ``cifar10:<root>``: torchvision's CIFAR-10 under that folder, downloaded if missing;
            - ``digits``: the 1,797 handwritten digits of 8x8 pixels that come with scikit-learn,
              every fifth of them for the test.
        split (str): ``"train"``, ``"val"`` or ``"test"``; the last two stand in for each other
            where only one exists. A folder without split folders is one set, returned for any
            split. Default: ``"test"``.
        augment (bool or Augmentation): random changes for training: shift by up to 4 pixels and
            mirroring for small images (digits: 1 pixel, never mirrored), random resized crop and
            mirroring for large ones; and what an :class:`Augmentation` names. Default: False.
        size (int, optional): edge of the images handed out, for folders and archives. Default: as
            they are if the first one is square and at most 64 pixels wide, otherwise 224.
        resize (int, optional): shorter side before the centre is cut out, for images larger than
            64 pixels. Default: ``size * 256 / 224``.
        crop_mode (str, optional): ``"center"`` keeps an image's proportions, ``"squash"`` scales
            both sides to ``resize``, as for :class:`Preset`; for folders and archives. Default:
            ``"center"``.
        mean (Sequence[float], optional): subtracted from pixels on the scale 0 to 1, one value a
            channel. Default: ImageNet's for colour, 0.5 otherwise, the set's own for digits.
        std (Sequence[float], optional): what the difference is divided by, likewise.
        class_file (str, PathLike or Sequence[str], optional): text file with one class folder name
            a line, in label order, or ``"imagenet"`` for the ids of ILSVRC 2012; or the names
            themselves, such as the ``class_names`` of the training images for a test set that may
            lack some. Default: labels follow the sorted folder names.
        seed (int): seed of the augmentation. Default: 0.
        preset (Preset, optional): what the weights expect; sets size, resize, crop_mode, mean
            and std where these are not given, and the interpolation. Default: None.

    Returns:
        ImageDataset: :class:`TensorImages` for images up to 64 pixels, else :class:`FileImages`,
        or :class:`ShardedImages`. Images that can't be read are left out, with a warning that
        names them; more than one in a hundred is an error.

    Raises:
        DataError: the data are missing, truncated, empty, or labelled outside the classes, or it
            can't be told what class an image is of.
        InvalidArgumentError: an argument is outside what is described above.
    """
    if split not in ("train", "val", "test"):
        raise InvalidArgumentError(f"split: expected 'train', 'val' or 'test', got {split!r}")
    for name, value in (("size", size), ("resize", resize)):
        if value is not None:
            require_positive(**{name: value})
    name, path = os.fspath(spec), Path(spec)
    looks = preset or Preset()
    if preset is not None:
        size, resize = size or preset.size, resize or preset.resize
        mean, std = mean or preset.mean, std or preset.std
    of_files = Preset(
        size or 224,
        resize,
        *_normalisation(3, mean, std),
        interpolation=looks.interpolation,
        crop_mode=crop_mode or looks.crop_mode,
    )
    if is_shard_pattern(name):
        shards = count_images(find_shards(name, split))
        return ShardedImages(shards, class_file, of_files, augment, seed)
    if _is_folder_or_archive(path):
        archive = ImageArchive(path)
        return _from_archive(archive, split, augment, size, of_files, class_file, seed)
    only_files = {"size": size, "resize": resize, "crop_mode": crop_mode, "class_file": class_file}
    for argument, given in only_files.items():
        if given is not None:
            raise InvalidArgumentError(f"{argument}: only folders and archives of images take it")
    pad, flip = 4, True
    if name == "digits":
        images, labels, classes = _digits(split)
        mean, std, pad, flip = mean or DIGITS_MEAN, std or DIGITS_STD, 1, False
    elif name.startswith("cifar10:"):
        images, labels, classes = _cifar10(Path(name.removeprefix("cifar10:")), split)
    elif path.suffix == ".npz":
        images, labels, classes = _npz(path, split)
    elif path.exists():
        raise DataError(f"{path}: unknown kind of data; expected .npz, .tar, .tar.gz or a folder")
    else:
        raise DataError(
            f"{name}: no such file or folder; expected a .npz file, a folder or tar archive of "
            "images, 'cifar10:<root>' or 'digits'"
        )
    mean, std = _normalisation(images.shape[1], mean, std)
    return TensorImages(images, labels, classes, mean, std, augment, seed, pad, flip)


def takes_size(spec: str | os.PathLike[str]) -> bool:
    """Whether the images of a set are scaled: in folders, archives and shards they are."""
    return is_shard_pattern(os.fspath(spec)) or _is_folder_or_archive(Path(spec))


def class_folders(spec: str | os.PathLike[str]) -> tuple[str, ...] | None:
    """Classes of a set whose labels follow its folders, without opening the images; None if none.

    Raises:
        DataError: as for :func:`open_dataset`.
    """
    name, path = os.fspath(spec), Path(spec)
    if is_shard_pattern(name):
        shards = count_images(find_shards(name, "train"))
        if any(shard.labels or not shard.counted for shard in shards):
            return None
        return class_names(name, frozenset().union(*(shard.classes for shard in shards)), None)
    if not _is_folder_or_archive(path):
        return None
    archive = ImageArchive(path)
    folders = (folder for _, folder in archive.entries.kinds)
    return class_names(name, folders, None, archive.empty_classes)


def classes_of_test(
    data: str | os.PathLike[str] | None,
    test_data: str | os.PathLike[str] | None,
    class_file: ClassFile | None,
) -> ClassFile | None:
    """What names the classes of the test images: the class file, or the training images' folders.

    Test images elsewhere may lack a class, and would be labelled without it.

    Args:
        data (str or PathLike, optional): the training images.
        test_data (str or PathLike, optional): test images elsewhere. Default: those of ``data``.
        class_file (str, PathLike or Sequence[str], optional): as for :func:`open_dataset`.

    Raises:
        DataError: as for :func:`open_dataset`.
    """
    if class_file is not None or data is None or test_data is None or not takes_size(test_data):
        return class_file
    return class_folders(data)


def _is_folder_or_archive(path: Path) -> bool:
    return path.is_dir() or (path.is_file() and is_archive(path))


def _normalisation(
    channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Sequence[float], Sequence[float]]:
    default_mean = IMAGENET_MEAN if channels == 3 else (0.5,) * channels
    default_std = IMAGENET_STD if channels == 3 else (0.5,) * channels
    return (default_mean if mean is None else mean), (default_std if std is None else std)


def _digits(split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits: needs scikit-learn; pip install scikit-learn") from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).long()
    held_out = torch.arange(len(labels), device="cpu") % 5 == 0
    chosen = ~held_out if split == "train" else held_out
    return images[chosen], labels[chosen], tuple(str(digit) for digit in range(10))


def _cifar10(root: Path, split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    from torchvision.datasets import CIFAR10

    train = split == "train"
    try:
        data = CIFAR10(str(root), train=train, download=not (root / CIFAR10.base_folder).is_dir())
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"cifar10:{root}: not found there and not downloadable ({error}); put the folder "
            f"{CIFAR10.base_folder} into {root}"
        ) from error
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(data.targets, device="cpu"), tuple(data.classes)


def _npz(path: Path, split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    part = "train" if split == "train" else "test"
    wanted = (f"{part}_images", f"{part}_labels")
    labels_of_both = ("train_labels", "test_labels")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = list(file)
            arrays = {key: file[key] for key in {*wanted, *labels_of_both} if key in file}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise DataError(f"{path}: not a complete .npz file ({error}); copy it again") from error
    missing = [key for key in wanted if key not in arrays]
    if missing:
        raise DataError(
            f"{path}: no array {missing[0]!r}; expected {' and '.join(wanted)}, found "
            f"{', '.join(names) or 'none'}"
        )
    everything = [arrays[key] for key in labels_of_both if key in arrays]
    images, labels = (arrays[key] for key in wanted)
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        raise DataError(
            f"{path}: {part}_images: expected a non-empty uint8 array [N, H, W, C], got "
            f"{images.dtype} {list(images.shape)}"
        )
    for array in everything:
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise DataError(
                f"{path}: labels: expected integers [N], got {array.dtype} {list(array.shape)}"
            )
        if array.size and array.min() < 0:
            raise DataError(f"{path}: labels: expected numbers from 0, got {array.min()}")
    if len(images) != len(labels):
        raise DataError(f"{path}: {len(images)} {part}_images but {len(labels)} {part}_labels")
    classes = tuple(
        str(i) for i in range(1 + max(int(array.max(initial=0)) for array in everything))
    )
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return tensor, torch.from_numpy(labels.astype(np.int64)), classes


def _from_archive(
    archive: ImageArchive,
    split: str,
    augment: bool | Augmentation,
    size: int | None,
    preset: Preset,
    class_file: ClassFile | None,
    seed: int,
) -> ImageDataset:
    """The images of a folder or archive, as the preset has them; but ``size`` is what was asked."""
    kinds, kind_of = archive.entries.kinds, archive.entries.kind_of
    folders = (name for _, name in kinds)
    classes = class_names(str(archive.path), folders, class_file, archive.empty_classes)
    rank = {name: label for label, name in enumerate(classes)}
    wanted = _wanted_split(archive, split)
    chosen = np.array([split == wanted for split, _ in kinds])
    positions = np.flatnonzero(chosen[kind_of]).tolist()
    label_of = np.array([rank[name] for _, name in kinds])
    labels = torch.from_numpy(label_of[kind_of[positions]])
    if size is None:
        width, height = _size_of_first(archive, positions)
        size = width if width == height <= SMALL_EDGE else 224
    if size > SMALL_EDGE:
        preset = replace(preset, size=size)
        return FileImages(archive, positions, labels, classes, preset, augment, seed)
    if preset.resize is not None:
        raise InvalidArgumentError(f"resize: only taken with size > {SMALL_EDGE}, got size {size}")
    images, readable = _decode_all(archive, positions, size, preset.crop_mode)
    mean, std = preset.mean, preset.std
    return TensorImages(images, labels[readable], classes, mean, std, augment, seed)


def _size_of_first(archive: ImageArchive, positions: Sequence[int]) -> tuple[int, int]:
    """Width and height of the first image that can be read."""
    for position in positions:
        try:
            height, width = decode(archive, position).shape[1:]
            return width, height
        except DataError as error:
            reason = error
    raise DataError(f"{archive.path}: none of {len(positions)} images can be read: {reason}")


def _wanted_split(archive: ImageArchive, split: str) -> str | None:
    if not archive.splits:
        return None
    stand_in = {"val": "test", "test": "val"}.get(split, split)
    for candidate in (split, stand_in):
        if candidate in archive.splits:
            return candidate
    unsorted = "".join(f"; {top}/ holds images in no class folder" for top in archive.unsorted)
    raise DataError(
        f"{archive.path}: no folder for split {split!r}; found "
        f"{', '.join(sorted(archive.splits))}{unsorted}"
    )


def _decode_all(
    archive: ImageArchive, positions: Sequence[int], size: int, crop_mode: str
) -> tuple[Tensor, Tensor]:
    """The images that can be read, and which of them these are."""
    fit = evaluation_transform(size, size, crop_mode=crop_mode)
    images = torch.empty((len(positions), 3, size, size), dtype=torch.uint8, device="cpu")
    readable = torch.ones(len(positions), dtype=torch.bool, device="cpu")
    errors: dict[int, str] = {}

    def fill(index: int) -> None:
        try:
            image = decode(archive, positions[index])
        except DataError as error:
            readable[index] = False
            errors[index] = str(error).removeprefix(f"{archive.path}: ")
            return
        images[index] = image if image.shape[1:] == (size, size) else fit(image)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(fill, range(len(positions))):
            pass
    unreadable = UnreadableImages(str(archive.path), len(positions), errors.__getitem__)
    for index in errors:
        unreadable.mark(index)
    unreadable.finish()
    return (images[readable] if errors else images), readable

"""Training transforms, repeated augmentation, and the presets of published weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from image_files import jpeg, write_folder
from torchvision.io import encode_png

from chanprune_ext.data import Augmentation, Preset, TensorImages, make_loader, open_dataset
from chanprune_ext.data.decoding import decoded
from chanprune_ext.data.transforms import evaluation_transform, training_transform
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.seeds import drawing_from

if TYPE_CHECKING:
    from pathlib import Path


def picture(seed: int = 0) -> torch.Tensor:
    return decoded(jpeg(seed, 120, 100), "x")


def test_whole_crop_mirrors_and_nothing_else() -> None:
    transform = training_transform(100, Augmentation(scale=(1.0, 1.0)))
    square = picture()[:, :, :100]
    seen = {tuple(transform(square).flatten().tolist()) for _ in range(20)}
    views = {tuple(view.flatten().tolist()) for view in (square, square.flip(2))}
    assert seen == views
    plain = training_transform(100, Augmentation(scale=(1.0, 1.0), mirror=False))
    assert all(torch.equal(plain(square), square) for _ in range(5))


def test_erasing_fills_a_rectangle_with_the_mean() -> None:
    transform = training_transform(None, Augmentation(erasing=1.0), mean=(0.2, 0.4, 0.6))
    image = picture()
    erased = transform(image.clone())
    changed = (erased != image).any(0)
    assert changed.any()
    rows, columns = (changed.any(d).nonzero().flatten() for d in (1, 0))
    inside = erased[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    for channel, value in enumerate((51, 102, 153)):
        assert (inside[channel] == value).float().mean() > 0.9
    assert erased.dtype == torch.uint8


@pytest.mark.parametrize("auto", ["randaugment", "trivialaugment"])
def test_automatic_augmentation_changes_colours_too(auto: str) -> None:
    transform = training_transform(None, Augmentation(auto=auto))
    image = picture()
    results = {tuple(transform(image).flatten().tolist()) for _ in range(12)}
    assert len(results) > 6
    assert transform(image).shape == image.shape
    assert training_transform(None)(image) is image


def test_magnitude_zero_shears_and_shifts_nothing() -> None:
    strong = training_transform(None, Augmentation(auto="randaugment", magnitude=30))
    weak = training_transform(None, Augmentation(auto="randaugment", magnitude=0))
    image = picture()

    def change(transform: Any) -> float:
        total = 0.0
        for seed in range(12):
            with drawing_from(seed):
                total += (transform(image).float() - image.float()).abs().mean().item()
        return total

    assert change(weak) < change(strong) / 2


def test_evaluation_scales_the_shorter_side_and_cuts_the_centre() -> None:
    ramp = torch.arange(0, 200, dtype=torch.uint8).expand(3, 100, 200)
    cut = evaluation_transform(40, 100)(ramp)
    assert torch.equal(cut, ramp[:, 30:70, 80:120])
    assert evaluation_transform(40, 50)(ramp).shape == (3, 40, 40)


def test_evaluation_squashes_both_sides_where_asked(tmp_path: Path) -> None:
    half = torch.cat([torch.zeros(3, 100, 100), torch.full((3, 100, 100), 255)], 2).byte()
    squashed = evaluation_transform(40, 40, crop_mode="squash")(half)
    assert squashed.shape == (3, 40, 40)
    assert squashed[:, :, :18].max() == 0
    assert squashed[:, :, 22:].min() == 255
    third = torch.cat([torch.full((3, 90, 60), 255), torch.zeros(3, 90, 120)], 2).byte()
    folder = write_folder(tmp_path, {"a/0.png": encode_png(third).numpy().tobytes()})
    for size, resize in ((48, None), (80, 80)):  # decoded once, decoded anew
        looks: dict[str, Any] = {"size": size, "resize": resize, "mean": (0,) * 3, "std": (1,) * 3}
        white = {
            mode: open_dataset(folder, crop_mode=mode, **looks)[0][0].mean().item()
            for mode in ("center", "squash")
        }
        assert white["squash"] == pytest.approx(1 / 3, abs=0.02)
        assert white["center"] < 0.25  # three quarters of it are beside the centre
    with pytest.raises(InvalidArgumentError, match="crop_mode: expected one of center, squash"):
        open_dataset(folder, crop_mode="border")
    with pytest.raises(InvalidArgumentError, match="crop_mode: only folders and archives"):
        open_dataset("digits", crop_mode="squash")


def test_repeats_come_in_a_row_and_differ(tmp_path: Path) -> None:
    files = {f"{'abc'[i % 3]}/{i}.jpg": jpeg(i) for i in range(10)}
    data = open_dataset(
        write_folder(tmp_path, files), "train", size=66, resize=66, augment=Augmentation(repeats=3)
    )
    small = TensorImages(
        torch.stack([picture(i)[:, :32, :32] for i in range(10)]),
        torch.arange(10) % 3,
        "abc",
        (0.5,) * 3,
        (0.5,) * 3,
        Augmentation(repeats=3, auto="trivialaugment"),
    )
    for images in (data, small):
        loader = make_loader(images, 5, shuffle=True)
        batches = list(loader)
        labels = torch.cat([labels for _, labels in batches])
        pixels = torch.cat([pixels for pixels, _ in batches])
        assert len(labels) == 10  # as long as without, of four images and the first of a fourth
        for first in (0, 3, 6):
            assert len(set(labels[first : first + 3].tolist())) == 1
            assert not torch.equal(pixels[first], pixels[first + 1])
        again = torch.cat([pixels for pixels, _ in loader])
        assert torch.equal(again, pixels)
        loader.seek(1)
        assert torch.equal(next(iter(loader))[0], batches[1][0])
        assert len(list(make_loader(images.without_augmentation(), 5, shuffle=True))) == 2
        assert make_loader(images.without_augmentation(), 5, shuffle=True).sampler.repeats == 1


def test_small_images_are_changed_by_what_an_augmentation_names() -> None:
    pixels = torch.full((4, 3, 32, 32), 200, dtype=torch.uint8)
    labels = torch.zeros(4, dtype=torch.long)
    options: dict[str, Any] = {"mean": (0, 0, 0), "std": (1, 1, 1), "pad": 0}
    plain = TensorImages(pixels, labels, "a", augment=True, **options)
    erased = TensorImages(pixels, labels, "a", augment=Augmentation(erasing=1.0), **options)
    assert torch.equal(plain.batch(range(4))[0], plain.without_augmentation().batch(range(4))[0])
    share = (erased.batch(range(4))[0] == 0).float().mean(dim=(1, 2, 3))
    assert (share > 0.01).all()
    assert len(share.unique()) > 1
    assert torch.equal(erased.images, pixels)
    unmirrored = TensorImages(pixels, labels, "a", augment=Augmentation(mirror=False), **options)
    assert not unmirrored.flip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"auto": "autoaugment"}, "auto: expected one of randaugment, trivialaugment"),
        ({"magnitude": 31}, "magnitude: expected 0 to 30, got 31"),
        ({"repeats": 0}, "repeats: expected 1 to 64, got 0"),
        ({"erasing": 1.5}, "erasing: expected a share"),
        ({"scale": (0.5, 0.1)}, "scale: expected two shares"),
    ],
)
def test_wrong_settings_are_explained(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Augmentation(**settings)


def test_presets_of_published_weights(tmp_path: Path) -> None:
    preset = Preset.of("ResNet50_Weights.IMAGENET1K_V2")
    assert (preset.size, preset.resize, preset.interpolation) == (224, 232, "bilinear")
    wide = Preset.of("EfficientNet_B3_Weights.IMAGENET1K_V1")
    assert (wide.size, wide.resize, wide.interpolation) == (300, 320, "bicubic")
    data = open_dataset(write_folder(tmp_path, {"a/0.jpg": jpeg(0)}), preset=wide)
    assert data[0][0].shape == (3, 300, 300)
    assert open_dataset(tmp_path, preset=wide, size=96, resize=96)[0][0].shape == (3, 96, 96)
    for name in ("ResNet50_Weights.V9", "nonsense", "FCN_ResNet50_Weights.DEFAULT"):
        with pytest.raises(InvalidArgumentError, match=r"preset: expected the weights"):
            Preset.of(name)


def test_presets_of_timm() -> None:
    pytest.importorskip("timm")
    preset = Preset.of("timm:vit_base_patch16_224.augreg_in21k_ft_in1k")
    assert (preset.size, preset.resize, preset.interpolation) == (224, 248, "bicubic")
    assert tuple(preset.mean) == (0.5, 0.5, 0.5)
    assert preset.crop_mode == "center"
    assert Preset.of("timm:eva_large_patch14_336.in22k_ft_in1k").crop_mode == "squash"
    with pytest.raises(InvalidArgumentError, match=r"timm:nothing: .*list_pretrained"):
        Preset.of("timm:nothing")

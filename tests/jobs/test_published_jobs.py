"""How the published results are trained for, by the images there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from chanprune_ext.checkpoint import save
from chanprune_ext.jobs import published, published_jobs
from chanprune_ext.jobs.published_jobs import cifar10_resnet56_job
from chanprune_ext.models import resnet56
from chanprune_ext.recovery import Recipe

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def weights_and_images(tmp_path: Path) -> tuple[Path, Path]:
    """A network, and 40 images to train on."""
    save(resnet56(), tmp_path / "weights.safetensors")
    arrays = {}
    for split, count in (("train", 40), ("test", 10)):
        arrays[f"{split}_images"] = np.zeros((count, 32, 32, 3), np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 10
    np.savez(tmp_path / "images.npz", **arrays)
    return tmp_path / "weights.safetensors", tmp_path / "images.npz"


@pytest.mark.parametrize(("whole_set", "careful"), [(40, False), (41, True)])
def test_training_depends_on_the_number_of_images(
    whole_set: int,
    careful: bool,
    weights_and_images: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(published_jobs, "_WHOLE_TRAINING_SET", whole_set)
    weights, images = weights_and_images
    job = cifar10_resnet56_job(
        weights, str(images), calibration_images=8, precision="bf16", seed=3, progress=False
    )
    assert job.fine_tune_options is not None
    for options in (job.fine_tune_options, job.recover_options):
        recipe = Recipe(**{key: value for key, value in options.items() if key != "progress"})
        assert recipe.freeze_batch_norm is careful
        assert (recipe.epochs, recipe.precision, recipe.seed) == (10, "bf16", 3)
    assert ("hard" in job.recover_options["losses"]) is not careful
    assert job.recover_options.get("teacher_flip", False) is not careful
    assert ("no labels" in job.stage_notes[-1]) is careful


def test_views_of_images_are_parts_of_them_each_its_own() -> None:
    ramp = torch.linspace(0, 1, 64).expand(3, 64, 64)  # its mean says where a part lies
    views = published._mild_crops(ramp.repeat(6, 1, 1, 1))
    assert views.shape == (6, 3, 64, 64)
    assert 0 <= float(views.min()) < float(views.max()) <= 1
    assert len({round(float(view.mean()), 6) for view in views}) > 1
    slopes = views[:, 0, :, 1:-1].diff(dim=-1).mean((1, 2)).abs()
    assert bool((slopes < 1.01 / 63).all())  # enlarged, never shrunk


def test_shifted_images_move_by_an_eighth_at_most_and_some_are_mirrored() -> None:
    dots = torch.zeros(64, 3, 32, 32)
    dots[:, :, 10, 20] = 1.0  # column 20; mirrored 11
    views = published._shifts(dots)
    assert views.shape == dots.shape
    at = views[:, 0].flatten(1).argmax(1)
    rows, columns = at // 32, at % 32
    assert bool((views.sum((1, 2, 3)) == 3).all())
    assert int(rows.min()) >= 6
    assert int(rows.max()) <= 14
    assert set(rows.tolist()) > {8, 10, 12}
    mirrored = columns < 16
    assert 16 < int(mirrored.sum()) < 48
    assert bool(((columns - torch.where(mirrored, 11, 20)).abs() <= 4).all())


def test_blocks_are_tuned_on_all_images_of_a_small_set(
    weights_and_images: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def tuned(
        pruned: object, original: object, batches: list[torch.Tensor], **options: Any
    ) -> None:
        seen.append((pruned, original, sum(map(len, batches)), options["amp"]))

    monkeypatch.setattr(published, "reconstruct", tuned)
    weights, images = weights_and_images
    found = published.cifar10_resnet56_set(weights, str(images), images=8, precision="bf16")
    (further,) = next(trial for trial in found.trials if trial.name == "MACs x0.50").further
    assert further.name == "blocks tuned on 40 images"
    pruned = resnet56()
    further.step(pruned, found.model, [])
    assert seen == [(pruned, found.model, 80, torch.bfloat16)]  # as many blends

"""The whole job: a small one in every run; the demo and the published result in slow runs."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from chanprune_ext.checkpoint import load
from chanprune_ext.cli.saved_model import names_plain_model
from chanprune_ext.data import calibration_batches, open_dataset
from chanprune_ext.errors import InvalidArgumentError, OutputError
from chanprune_ext.jobs.demo import digits_job
from chanprune_ext.jobs.pipeline import Job, layer_widths, run_job
from chanprune_ext.jobs.published_jobs import cifar10_resnet56_job
from chanprune_ext.models import CifarResNet
from chanprune_ext.plan import PruningPlan
from chanprune_ext.recovery import evaluate
from chanprune_ext.report import LayerWidth, RunReport, load_report

DATA = Path(os.environ.get("CHANPRUNE_DATA", Path(__file__).parents[3] / "shared/data"))
WEIGHTS, IMAGES = DATA / "resnet56-cifar10.safetensors", DATA / "cifar10-raw-subset.npz"
MODEL_FILES = ("original", "plain-l1", "compensated", "distilled")


def small_network() -> CifarResNet:
    return CifarResNet(8, in_channels=1, width=4)


@pytest.fixture(scope="module")
def small_job() -> Job:
    torch.manual_seed(0)
    train = open_dataset("digits", "train", augment=True)
    return Job(
        title="A small job",
        model=small_network(),
        built_from={"model": "resnet20", "arguments": {"in_channels": 1}},
        train=train,
        test=open_dataset("digits", "test"),
        calibration=calibration_batches(train, 64),
        plan_options={"ratio": 0.5},
        recover_options={"epochs": 2, "batch_size": 256, "progress": False},
        stage_notes=("a", "b", "c", "d"),
        latency_batch=2,
        latency_rounds=3,
    )


@pytest.fixture(scope="module")
def small_run(
    small_job: Job, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunReport, Path, list[str]]:
    out = tmp_path_factory.mktemp("job") / "new" / "folder"
    said: list[str] = []
    return run_job(small_job, out, command="chanprune test", say=said.append), out, said


def test_job_writes_everything(small_run: tuple[RunReport, Path, list[str]]) -> None:
    report, out, said = small_run

    expected = {"plan.json", "report.html", "report.json"}
    expected |= {f"{name}.safetensors" for name in MODEL_FILES}
    assert {path.name for path in out.iterdir()} == expected
    assert load_report(out / "report.json") == report
    assert len(said) == 4


def test_fine_tuning_is_a_stage_and_the_best_epoch_is_told(small_job: Job, tmp_path: Path) -> None:
    options = {"epochs": 3, "lr": 0.05, "batch_size": 256, "progress": False}
    job = replace(small_job, fine_tune_options=options, stage_notes=())
    report = run_job(job, tmp_path, command="chanprune test", say=lambda _: None)

    assert [stage.name for stage in report.stages][3:] == ["fine-tuned", "distilled"]
    fine_tuned = report.stages[3]
    assert evaluate(load(tmp_path / "fine-tuned.safetensors", small_network()), job.test).top1 == (
        fine_tuned.accuracy
    )
    (told,) = [note for note in report.notes if note.startswith("Fine-tuned: ")]
    last, best = (float(found) for found in re.findall(r"([0-9.]+)%", told))
    assert last == round(100 * fine_tuned.accuracy, 2)
    assert best >= last
    distilled = [note for note in report.notes if note.startswith("Distilled: ")]
    top = max(epoch.val_accuracy or 0.0 for epoch in report.history)
    assert f"{top:.2%}" in distilled[0]


def test_stages_are_what_the_files_hold(
    small_run: tuple[RunReport, Path, list[str]], small_job: Job
) -> None:
    report, out, _ = small_run

    assert [stage.name for stage in report.stages] == [
        "original",
        "plain L1",
        "compensated",
        "distilled",
    ]
    for stage, name in zip(report.stages, MODEL_FILES, strict=True):
        model = load(out / f"{name}.safetensors", small_network())
        assert evaluate(model, small_job.test).top1 == stage.accuracy
        assert names_plain_model(out / f"{name}.safetensors")  # bench and export need no more
        assert sum(parameter.numel() for parameter in model.parameters()) == stage.params
        assert (out / f"{name}.safetensors").stat().st_size == stage.file_bytes
        assert stage.samples == 360
        assert stage.latency is not None
    plan = PruningPlan.load(out / "plan.json")
    assert [stage.macs for stage in report.stages] == [plan.macs_before, *[plan.macs_after] * 3]
    assert [stage.note for stage in report.stages] == ["a", "b", "c", "d"]


def test_report_tells_widths_and_history(small_run: tuple[RunReport, Path, list[str]]) -> None:
    report, _, _ = small_run

    assert report.widths[0] == LayerWidth("conv1", 4, 2)
    assert report.widths[-1] == LayerWidth("linear", 10, 10)
    assert [epoch.epoch for epoch in report.history] == [1, 2]
    assert report.history[-1].val_accuracy == report.stages[-1].accuracy
    assert report.command == "chanprune test"
    assert "batch 2, float32" in report.conditions


@pytest.mark.usefixtures("small_run")
def test_the_given_model_is_not_changed(small_job: Job) -> None:
    torch.manual_seed(0)
    before, after = small_network().state_dict(), small_job.model.state_dict()
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_an_unwritable_place_shows_before_any_work(small_job: Job, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here first")
    said: list[str] = []
    with pytest.raises(OutputError, match="cannot be made a folder"):
        run_job(small_job, tmp_path / "file", command="c", say=said.append)
    assert said == []


def test_a_bad_plan_leaves_an_empty_folder(small_job: Job, tmp_path: Path) -> None:
    job = replace(small_job, plan_options={"ratio": 1.5})
    with pytest.raises(InvalidArgumentError, match="ratio"):
        run_job(job, tmp_path / "run", command="c", say=lambda _: None)
    assert list((tmp_path / "run").iterdir()) == []


def test_what_is_done_stays_when_a_later_step_fails(small_job: Job, tmp_path: Path) -> None:
    job = replace(small_job, recover_options={"epochs": 0})
    with pytest.raises(InvalidArgumentError, match="epochs"):
        run_job(job, tmp_path, command="c", say=lambda _: None)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"plan.json", *(f"{name}.safetensors" for name in MODEL_FILES[:3])}


def test_layer_widths_of_linear_and_convolution_layers() -> None:
    before = nn.Sequential(nn.Conv1d(1, 6, 1), nn.ReLU(), nn.Linear(6, 3))
    after = nn.Sequential(nn.Conv1d(1, 4, 1), nn.ReLU(), nn.Linear(4, 3))
    assert layer_widths(before, after) == (LayerWidth("0", 6, 4), LayerWidth("2", 3, 3))


def test_the_demo_may_train_for_one_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("chanprune_ext.jobs.demo.recover", lambda _, **given: asked.update(given))
    digits_job(train_epochs=1)
    assert 0 < asked["warmup"] < asked["epochs"] == 1


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    report = run_job(digits_job(progress=False), tmp_path, command="c", say=lambda _: None)
    original, plain, compensated, distilled = (stage.accuracy for stage in report.stages)

    assert original > 0.97
    assert plain < 0.6
    assert compensated > 0.93
    assert distilled > 0.95


@pytest.mark.slow
@pytest.mark.timeout(1800)  # five minutes on two idle cores
@pytest.mark.skipif(
    not (WEIGHTS.exists() and IMAGES.exists()), reason="no ResNet-56 or CIFAR-10 in CHANPRUNE_DATA"
)
def test_cifar10_resnet56_with_a_little_training(tmp_path: Path) -> None:
    job = cifar10_resnet56_job(WEIGHTS, str(IMAGES), recover_epochs=1, progress=False)
    report = run_job(job, tmp_path, command="c", say=lambda _: None)
    original, plain, compensated, fine_tuned, distilled = report.stages

    assert original.accuracy == pytest.approx(0.9272, abs=0.0005)
    assert plain.macs / original.macs == pytest.approx(0.50, abs=0.01)
    assert plain.accuracy < 0.8
    assert compensated.accuracy >= 0.91
    assert fine_tuned.accuracy >= 0.90
    assert distilled.accuracy >= 0.91

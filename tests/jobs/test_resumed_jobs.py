"""Jobs that were stopped and go on: the same results, nothing done twice, nothing mixed up."""

from __future__ import annotations

import copy
import itertools
import json
import os
import signal
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from chanprune_ext.checkpoint import load
from chanprune_ext.data import calibration_batches, open_dataset
from chanprune_ext.errors import CheckpointError, InvalidArgumentError
from chanprune_ext.jobs import pipeline
from chanprune_ext.jobs.pipeline import Job, run_job
from chanprune_ext.jobs.trials import Trial, load_trials, run_trials, save_trials
from chanprune_ext.models import CifarResNet
from chanprune_ext.recovery import RecoveryInterrupted

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("ctrl_c_counts")


@pytest.fixture(scope="module")
def job() -> Job:
    torch.manual_seed(0)
    train = open_dataset("digits", "train", augment=True)
    training: dict[str, Any] = {"epochs": 2, "batch_size": 256, "progress": False, "seed": 1}
    return Job(
        title="A job",
        model=CifarResNet(8, in_channels=1, width=4).eval(),
        built_from={},
        train=train,
        test=open_dataset("digits", "test"),
        calibration=calibration_batches(train, 64),
        plan_options={"ratio": 0.5},
        recover_options=training,
        fine_tune_options=training,
        latency_batch=2,
        latency_rounds=3,
    )


def run(job: Job, out: Path, resume: bool | None, said: list[str] | None = None) -> Any:
    say = (lambda _: None) if said is None else said.append
    return run_job(job, out, command="chanprune test", say=say, resume=resume)


def weights(job: Job, out: Path, name: str) -> dict[str, torch.Tensor]:
    return load(out / f"{name}.safetensors", job.model).state_dict()


def with_ctrl_c(job: Job, measurement: int) -> Job:
    """The job with test images that press Ctrl-C the n-th time that they are measured on."""
    test, kind = copy.copy(job.test), type(job.test)
    begun = itertools.count(1)

    class Stopping(kind):  # type: ignore[misc, valid-type]
        def batch(self, indices: Any) -> Any:
            if 0 in list(indices) and next(begun) == measurement:
                os.kill(os.getpid(), signal.SIGINT)
            return super().batch(indices)

    test.__class__ = Stopping
    return replace(job, test=test)


# Fine-tuning measures before, after the first and after the second epoch, then distillation does.
@pytest.mark.parametrize("measurement", [2, 5])
def test_a_job_stopped_in_its_training_ends_as_if_it_had_not_been(
    job: Job, measurement: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = run(job, whole, resume=False)
    with pytest.raises(RecoveryInterrupted):
        run(with_ctrl_c(job, measurement), stopped, resume=False)
    for step in ("plan", "compensate"):
        monkeypatch.setattr(pipeline, step, lambda *_, **__: pytest.fail("done before"))
    written: list[str] = []
    save = pipeline.save

    def saved(model: Any, path: Path, **options: Any) -> None:
        written.append(path.stem)
        save(model, path, **options)

    monkeypatch.setattr(pipeline, "save", saved)
    said: list[str] = []
    found = run(job, stopped, resume=True, said=said)
    assert written == ["fine-tuned", "distilled"]
    assert said[0] == "going on from the compensated model of before"
    for name in ("compensated", "fine-tuned", "distilled"):
        ours, theirs = weights(job, stopped, name), weights(job, whole, name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert [stage.accuracy for stage in found.stages] == [s.accuracy for s in expected.stages]
    assert len(found.history) == len(expected.history)
    assert any(note.startswith("Compensation took") for note in found.notes)
    assert not (stopped / "checkpoints").exists()


def test_a_finished_job_is_not_run_again(job: Job, tmp_path: Path) -> None:
    report = run(job, tmp_path, resume=True)  # begins where there is none
    said: list[str] = []
    assert run(job, tmp_path, resume=True, said=said) == report
    assert said == ["finished earlier"]


def test_an_unfinished_job_is_not_overwritten(job: Job, tmp_path: Path) -> None:
    with pytest.raises(RecoveryInterrupted):
        run(with_ctrl_c(job, 2), tmp_path, resume=False)
    with pytest.raises(InvalidArgumentError, match=r"out: .* not finished; .* --resume"):
        run(job, tmp_path, resume=False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": CifarResNet(8, in_channels=1, width=4)}, "checksum of the weights"),
        ({"calibration": [torch.zeros(4, 1, 8, 8)]}, "checksum of the calibration images"),
        ({"recover_options": {"epochs": 3}}, "training"),
    ],
)
def test_another_job_is_refused(
    job: Job, change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(RecoveryInterrupted):
        run(with_ctrl_c(job, 2), tmp_path, resume=False)
    with pytest.raises(InvalidArgumentError, match=f"resume: .* begun with another {named}"):
        run(replace(job, **change), tmp_path, resume=True)


def test_a_damaged_record_is_named(job: Job, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"inputs": {}')
    with pytest.raises(CheckpointError, match=r"job\.json: cannot be read"):
        run(job, tmp_path, resume=True)


def test_trials_that_were_measured_are_not_measured_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    test = open_dataset("digits", "test")
    model = CifarResNet(8, in_channels=1, width=4).eval()
    path, ran = tmp_path / "trials.json", []

    def half(name: str) -> Trial:
        def options(_: object) -> dict[str, Any]:
            ran.append(name)
            return {"ratio": 0.5}

        return Trial(name, options, after=None)

    def measured(names: str, seeds: range, earlier: Any = ()) -> Any:
        return run_trials(
            model,
            test,
            [half(name) for name in names],
            lambda seed: [],
            seeds=seeds,
            say=lambda _: None,
            keep=lambda baseline, results: save_trials(
                path, "title", "command", baseline, len(test), results, {"weights": 1}
            ),
            earlier=earlier,
        )[1]

    assert load_trials(path, {"weights": 1}) == []
    first = measured("a", range(2))
    assert load_trials(path, {"weights": 1}) == first
    both = measured("ab", range(2), load_trials(path, {"weights": 1}))
    assert ran == ["a", "a", "b", "b"]
    assert both[0] == first[0]
    assert load_trials(path, {"weights": 1}) == both  # the one of before is still there
    measured("a", range(3), both)  # other draws
    assert ran[4:] == ["a", "a", "a"]
    with pytest.raises(InvalidArgumentError, match="another weights: 1, now 2"):
        load_trials(path, {"weights": 2})
    path.write_text(json.dumps({"trials": []}))
    with pytest.raises(CheckpointError, match=r"trials\.json: cannot be read"):
        load_trials(path, {"weights": 1})


def test_what_a_job_without_checkpoints_leaves(job: Job, tmp_path: Path) -> None:
    run(job, tmp_path, resume=None)
    assert not (tmp_path / "job.json").exists()
    assert not (tmp_path / "checkpoints").exists()

"""How the arithmetic is done and what a run tells of itself: options that change no method."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from distributed_runs import batches, net, points
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typer.testing import CliRunner

import chanprune_ext as cpx
from chanprune_ext.cli import app
from chanprune_ext.errors import InvalidArgumentError, TrainingError
from chanprune_ext.models import resnet20
from chanprune_ext.recovery import Recipe, advice, data_wait, recover
from chanprune_ext.recovery.advice import out_of_memory
from chanprune_ext.recovery.data_wait import DataWait
from chanprune_ext.recovery.loop import TrainingLoop
from chanprune_ext.recovery.result import EpochRecord

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def trained(kind: str = "Plain", teacher: nn.Module | None = None, **options: Any) -> Any:
    """A student after training, and the result."""
    student = net(kind)
    settings = {"train": points(96), "epochs": 2, "lr": 0.05, "batch_size": 16, **options}
    return student, recover(student, teacher, progress=False, **settings)


def close(one: nn.Module, two: nn.Module, **tolerance: float) -> None:
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name, **tolerance)


def same(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    whole, result = trained(batch_size=32)
    parts, accumulated = trained(batch_size=8, gradient_accumulation_steps=4)
    close(parts, whole, rtol=1e-5, atol=1e-6)
    assert accumulated.history[-1].loss == pytest.approx(result.history[-1].loss, rel=1e-5)
    assert accumulated.history[-1].lr == pytest.approx(result.history[-1].lr)


def test_the_last_update_of_an_epoch_takes_what_is_left() -> None:
    """Five batches of 16, two an update: the third update is the mean over one."""
    x, y = points(80).tensors
    parts, _ = trained(train=batches(points(80), 16), gradient_accumulation_steps=2)
    whole, _ = trained(train=[(x[:32], y[:32]), (x[32:64], y[32:64]), (x[64:], y[64:])])
    close(parts, whole, rtol=1e-5, atol=1e-6)


def test_accumulation_counts_updates_not_batches() -> None:
    decays = []
    for options in ({"batch_size": 32}, {"batch_size": 16, "gradient_accumulation_steps": 2}):
        student, _ = trained(ema_decay=0.9, max_grad_norm=0.1, **options)
        decays.append(student)
    close(*decays, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close_to_the_whole(precision: str) -> None:
    whole, _ = trained()
    half, result = trained(precision=precision)
    assert not same(whole, half)
    close(half, whole, rtol=0.05, atol=0.01)
    assert result.history[1].loss < result.history[0].loss
    assert all(p.dtype == torch.float32 for p in half.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_student_of_another_type_is_given_its_own(dtype: torch.dtype) -> None:
    student, teacher = net("Normed").to(dtype), net("Normed", 1)
    losses = {"kd": 0.5, "hard": 0.5, "features": 0.1}
    options = {"ema_decay": 0.5, "bn_batches": 2, "taps": ["one"], "losses": losses}
    data = {"train": points(96), "val": points(30)}
    result = recover(student, teacher, **data, lr=0.05, epochs=3, progress=False, **options)
    assert result.history[-1].loss < result.history[0].loss
    assert {p.dtype for p in student.parameters()} == {dtype}
    recover(teacher, student, **data, epochs=1, progress=False, **options)


@pytest.mark.parametrize("outer", [False, True])
def test_a_callers_autocast_makes_no_difference(outer: bool) -> None:
    alone, _ = trained(precision="bf16")
    with torch.autocast("cpu", torch.bfloat16, enabled=outer):
        inside, _ = trained(precision="bf16")
    assert same(alone, inside)


def test_fp16_scales_small_gradients_up_and_large_ones_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is multiplied by 2^16 on its way back; an overflow halves that and skips."""
    scales: list[float] = []
    step = TrainingLoop._update

    def seen(loop: TrainingLoop, rate: float) -> None:
        assert loop.scaler is not None
        largest = max(p.grad.abs().max().item() for p in loop.student.parameters())
        scales.append(loop.scaler.get_scale())
        if len(scales) == 1:
            assert largest > 100  # not yet divided
        if len(scales) == 2:
            next(loop.student.parameters()).grad.fill_(float("inf"))
        before = [p.clone() for p in loop.student.parameters()]
        step(loop, rate)
        unchanged = all(map(torch.equal, before, loop.student.parameters()))
        assert unchanged == (len(scales) == 2)

    monkeypatch.setattr(TrainingLoop, "_update", seen)
    folder = tmp_path / "run"
    trained(precision="fp16", checkpoint_dir=folder, epochs=1)
    assert scales[:3] == [2.0**16, 2.0**16, 2.0**15]
    # The next run takes the scale from the checkpoint and has nothing left to do.
    found = trained(precision="fp16", checkpoint_dir=folder, epochs=1, resume="auto")[1]
    assert len(scales) == 6
    assert len(found.history) == 1


def test_fp16_goes_on_with_its_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = trained(precision="fp16")
    step, scales = TrainingLoop._step, []

    def failing(loop: TrainingLoop, batch: Any, rate: float) -> Any:
        assert loop.scaler is not None
        if loop.at.update == 1:
            loop.scaler.update(1024.0)
        scales.append(loop.scaler.get_scale())
        if loop.at.update == 4 and len(scales) == 5:
            raise KeyboardInterrupt
        return step(loop, batch, rate)

    monkeypatch.setattr(TrainingLoop, "_step", failing)
    kept = {"checkpoint_dir": tmp_path, "checkpoint_every": 1, "precision": "fp16"}
    with pytest.raises(KeyboardInterrupt):
        trained(**kept)
    resumed, _ = trained(**kept, resume="auto")
    assert scales[5:] == [1024.0] * 8
    close(resumed, expected, rtol=1e-2, atol=1e-3)


def test_fp16_wants_whole_weights() -> None:
    with pytest.raises(InvalidArgumentError, match="the student's are float16"):
        recover(net("Plain").half(), train=points(32), precision="fp16", progress=False)


def test_a_teacher_of_bfloat16_teaches_float32() -> None:
    teacher, half = net("Plain", 1), net("Plain", 1).bfloat16()
    expected, _ = trained(teacher=teacher, losses={"kd": 1.0})
    student, _ = trained(teacher=half, losses={"kd": 1.0})
    assert not same(student, expected)
    close(student, expected, rtol=0.05, atol=0.02)
    assert next(half.parameters()).dtype == torch.bfloat16


def test_compiled_networks_train_alike_and_come_back_plain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher, given = net("Plain", 1), []

    def compiled(model: nn.Module) -> Any:
        given.append(model)
        return real(model, backend="eager")

    real = torch.compile
    expected, _ = trained(teacher=teacher)
    monkeypatch.setattr(torch, "compile", compiled)
    student, _ = trained(teacher=teacher, compile=True, val=points(20))
    assert given == [student, teacher]
    close(student, expected, rtol=1e-5, atol=1e-6)
    assert type(student).__name__ == "Plain"


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"lr_scale": "linear", "lr_base_size": 32}, 0.5),
        ({"lr_scale": "sqrt", "lr_base_size": 64}, 0.5),
        ({"lr_scale": "linear", "lr_base_size": 8}, 2.0),
        ({"lr_base_size": 8}, 1.0),
    ],
)
def test_the_learning_rate_follows_the_images_of_an_update(
    options: dict[str, Any], factor: float
) -> None:
    scaled, _ = trained(**options)
    expected, _ = trained(lr=0.05 * factor)
    assert same(scaled, expected)
    loaded, _ = trained(train=DataLoader(points(96), 16), **options)
    expected, _ = trained(train=DataLoader(points(96), 16), lr=0.05 * factor)
    assert same(loaded, expected)


def test_a_learning_rate_can_only_follow_a_known_size() -> None:
    with pytest.raises(InvalidArgumentError, match="lr_scale: needs a dataset or a DataLoader"):
        trained(train=batches(points(96), 16), lr_scale="linear")
    with pytest.raises(InvalidArgumentError, match="lr_scale: expected None, 'linear' or 'sqrt'"):
        trained(lr_scale="cubic")


def test_synchronised_batch_norm_changes_nothing_in_one_process() -> None:
    expected, _ = trained("Normed")
    student, _ = trained("Normed", sync_batch_norm=True)
    assert same(student, expected)
    assert type(student.norm) is nn.BatchNorm1d


def test_launchers_of_sharded_networks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InvalidArgumentError, match="the launcher asks for FSDP"):
        trained()


@pytest.mark.parametrize(
    ("options", "advised"),
    [
        ({}, r"batches of 8 \(batch_size\) with gradient_accumulation_steps=2, precision='bf16'"),
        (
            {"precision": "bf16", "gradient_accumulation_steps": 2, "ema_decay": 0.9},
            r"batches of 8 .*=4, leave the running average out\. torch says: no room for 2 GiB",
        ),
    ],
)
def test_out_of_memory_says_what_to_change(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], advised: str
) -> None:
    step = TrainingLoop._step

    def failing(loop: TrainingLoop, batch: Any, rate: float) -> Any:
        if loop.at.update == 2:
            raise torch.OutOfMemoryError("no room for 2 GiB\nand more")
        return step(loop, batch, rate)

    monkeypatch.setattr(TrainingLoop, "_step", failing)
    student = net("Plain")
    with pytest.raises(TrainingError, match=rf"in update 3, with 16 images at once.*{advised}"):
        recover(student, train=points(96), batch_size=16, progress=False, **options)
    assert same(student, net("Plain"))


@pytest.mark.parametrize(("processes", "told"), [(1, False), (4, True)])
def test_several_processes_are_told_of_sharding(
    monkeypatch: pytest.MonkeyPatch, processes: int, told: bool
) -> None:
    monkeypatch.setattr(advice, "launched_processes", lambda: processes)
    error, batch = torch.OutOfMemoryError("no room"), torch.zeros(16, 6)
    assert ("shard=True" in out_of_memory(error, batch, 2, Recipe())) == told
    assert "shard=True" not in out_of_memory(error, batch, 2, Recipe(shard=True))


def test_waiting_for_data_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(data_wait.time, "perf_counter", lambda: now[0])

    def slow() -> Iterator[int]:
        for k in range(3):
            now[0] += 2.0
            yield k

    wait = DataWait(torch.device("cpu"))
    for _ in wait.timed(slow()):
        now[0] += 1.0  # the work
    wait.settle()
    assert wait.seconds == 6.0


def test_each_epoch_says_how_long_it_waited(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(data_wait.time, "perf_counter", lambda: clock[0])

    class Slow(Dataset[Any]):
        def __len__(self) -> int:
            return 96

        def __getitem__(self, index: int) -> Any:
            clock[0] += 10.0 / 16
            return points(96)[index]

    class Working(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net("Plain")

        def forward(self, x: Tensor) -> Tensor:
            clock[0] += 30.0
            return self.inner(x)

    def run(loader: Any) -> Any:
        return recover(Working(), train=loader, epochs=2, progress=True)

    result = run(DataLoader(Slow(), 16))
    assert [record.data_wait for record in result.history] == pytest.approx([0.25, 0.25])
    shown = capsys.readouterr().out
    assert shown.count("25 % of the time went into waiting") == 1
    assert "more workers than 0" in shown
    result = run(batches(points(96), 16))
    assert [record.data_wait for record in result.history] == [0.0, 0.0]
    assert "waiting" not in capsys.readouterr().out


def test_short_or_busy_epochs_give_no_hint() -> None:
    record = functools.partial(EpochRecord, 1, 0.5, 0.1, None, images=10)
    assert advice.wait_hint(record(seconds=1.0, data_wait=0.9), None) is None
    assert advice.wait_hint(record(seconds=100.0, data_wait=0.1), None) is None
    hint = advice.wait_hint(record(seconds=100.0, data_wait=0.4), None)
    assert hint is not None
    assert "epoch 1: 40 % of the time went into waiting for data; a faster loader" in hint


def test_batch_norms_without_statistics_are_warned_of() -> None:
    def network(folded: bool) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        if folded:
            nn.init.normal_(model[1].bias)
            model[1].running_var.fill_(1 - 1e-5)
        return model

    def run(folded: bool, **options: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            data = batches(points(64), 16)
            recover(network(folded), train=data, epochs=1, progress=False, **options)
        told = [w for w in told if "folded" in str(w.message)]
        assert all(w.filename == __file__ for w in told)  # the line that calls recover
        return [str(w.message) for w in told]

    assert run(folded=False) == []
    assert run(folded=True, freeze_batch_norm=True) == []
    (told,) = run(folded=True)
    assert "1 of 1 batch norms" in told
    assert "freeze_batch_norm=True" in told


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    series = {tag: found.Scalars(tag) for tag in found.Tags()["scalars"]}
    values = {tag: {e.step: e.value for e in events} for tag, events in series.items()}
    assert all(len(events) == len(values[tag]) for tag, events in series.items())
    return values


def test_tensorboard_reads_the_course_of_a_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    _, result = trained(val=points(50), log_dir=tmp_path / "logs")
    found = scalars(tmp_path / "logs")
    assert list(found["train/loss"]) == list(found["train/lr"]) == list(range(1, 13))
    last = result.history[-1]
    assert found["train/loss"][12] == pytest.approx(last.loss)
    assert found["train/lr"][12] == pytest.approx(last.lr)
    assert found["val/top1"] == pytest.approx(
        {0: result.before.top1, 6: result.history[0].val.top1, 12: last.val.top1}
    )
    assert found["val/loss"][12] == pytest.approx(last.val.loss)
    assert found["train/epoch_loss"] == pytest.approx({6: result.history[0].loss, 12: last.loss})
    assert set(found) == {
        *("train/loss", "train/lr", "train/epoch_loss", "train/images_per_second"),
        *("train/data_wait", "val/top1", "val/top5", "val/loss"),
    }


def test_tensorboard_shows_a_resumed_run_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    step = TrainingLoop._step

    def failing(loop: TrainingLoop, batch: Any, rate: float) -> Any:
        if loop.at.update == 9:
            raise KeyboardInterrupt
        return step(loop, batch, rate)

    kept = {"checkpoint_dir": tmp_path / "run", "log_dir": tmp_path / "logs", "val": points(20)}
    monkeypatch.setattr(TrainingLoop, "_step", failing)
    with pytest.raises(KeyboardInterrupt):
        trained(**kept)
    monkeypatch.undo()
    assert max(scalars(tmp_path / "logs")["train/loss"]) == 9
    _, result = trained(**kept, resume="auto")
    found = scalars(tmp_path / "logs")
    assert list(found["train/loss"]) == list(range(1, 13))
    assert list(found["val/top1"]) == [0, 6, 12]
    assert found["train/epoch_loss"][12] == pytest.approx(result.history[1].loss)


def test_without_tensorboard_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InvalidArgumentError, match=r"pip install 'chanprune_ext\[tensorboard\]'"):
        trained(log_dir=tmp_path)


def test_settings_of_older_recipes_are_what_they_were() -> None:
    data = cpx.Recipe().to_dict()
    for name in ("lr_scale", "compile", "gradient_accumulation_steps", "sync_batch_norm"):
        data.pop(name)
    assert cpx.Recipe.from_dict(data) == cpx.Recipe()


def test_options_of_the_command_reach_the_recipe(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    small = tmp_path / "small.safetensors"
    cpx.save(resnet20(in_channels=1, width=4), small)
    command = (
        *("recover", "resnet20", "--model-arg", "in_channels=1", "--model-arg", "width=4"),
        *("--weights", str(small), "--data", "digits", "--device", "cpu", "--epochs", "1"),
        *("--batch-size", "64", "--gradient-accumulation-steps", "2", "--lr-scale", "sqrt"),
        *("--lr-base-size", "512", "--precision", "bf16", "--teacher-precision", "fp32"),
        *("--channels-last", "--out", str(tmp_path / "out.safetensors")),
    )
    ended = CliRunner().invoke(app, command)
    assert ended.exit_code == 0, ended.output
    recipe = cpx.Recipe.load(tmp_path / "out.recipe.json")
    assert recipe == cpx.Recipe(
        epochs=1,
        batch_size=64,
        gradient_accumulation_steps=2,
        lr_scale="sqrt",
        lr_base_size=512,
        precision="bf16",
        teacher_precision="fp32",
        channels_last=True,
    )
    pytest.importorskip("tensorboard")
    logged = (*command, "--log-dir", str(tmp_path / "logs"))
    assert CliRunner().invoke(app, logged).exit_code == 0
    assert len(scalars(tmp_path / "logs")["train/loss"]) == 11

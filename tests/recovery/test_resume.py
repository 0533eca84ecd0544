"""A run that is stopped at any moment goes on from a checkpoint and ends bit-identically."""

from __future__ import annotations

import errno
import functools
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from resumable_runs import image_set, main, networks, outcome, run
from safetensors.torch import load_file
from typer.testing import CliRunner

import chanprune_ext as cpx
from chanprune_ext.cli import app
from chanprune_ext.errors import CheckpointError, InvalidArgumentError, OutputError
from chanprune_ext.models import resnet20
from chanprune_ext.recovery import RecoveryInterrupted, checkpoints
from chanprune_ext.recovery.checkpoints import CheckpointFolder
from chanprune_ext.recovery.loop import TrainingLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KINDS = (
    *("plain", "adamw", "ema", "swa", "mixup", "patience", "unlabelled", "features"),
    *("user loader", "own generator", "user data"),
)
PROGRAM = Path(__file__).with_name("resumable_runs.py")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Forked processes can't use the threads of this one, and sums depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class CrashError(Exception):
    """Stands for a crash."""


@functools.cache
def reference(kind: str) -> dict[str, Any]:
    """What a run without checkpoints ends with."""
    student, teacher = networks()
    return outcome(student, run(kind, student, teacher))


def resumed(kind: str, folder: Path, **options: Any) -> dict[str, Any]:
    student, teacher = networks()
    for tensor in student.parameters():
        tensor.data.add_(1)  # all weights come from the checkpoint
    torch.rand(3)
    options = {"checkpoint_dir": folder, "resume": "auto", **options}
    return outcome(student, run(kind, student, teacher, **options))


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["record"] == expected["record"]
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        assert torch.equal(found["weights"][name], value), name


def stop_at(monkeypatch: pytest.MonkeyPatch, update: int) -> None:
    """Lets the update of this number fail, counted from 0 over the whole run."""
    step = TrainingLoop._step

    def failing(loop: TrainingLoop, batch: Any, rate: float) -> Any:
        if loop.at.update == update:
            raise CrashError
        return step(loop, batch, rate)

    monkeypatch.setattr(TrainingLoop, "_step", failing)


def crash(kind: str, folder: Path, update: int, **options: Any) -> None:
    student, teacher = networks()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    options = {"checkpoint_dir": folder, "checkpoint_every": 1, **options}
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, update)
        with pytest.raises(CrashError):
            run(kind, student, teacher, **options)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


@pytest.mark.parametrize("update", range(12))
def test_stopped_at_every_update(tmp_path: Path, update: int) -> None:
    crash("plain", tmp_path, update)
    assert_same(resumed("plain", tmp_path), reference("plain"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_goes_on_in_the_middle_of_an_epoch(tmp_path: Path, kind: str) -> None:
    crash(kind, tmp_path, 3)  # also where patience ends the run after the first epoch
    if kind != "patience":
        crash(kind, tmp_path, 6, resume="auto")
        crash(kind, tmp_path, 11, resume="auto")
    found = resumed(kind, tmp_path)
    assert_same(found, reference(kind))
    # the run is over: once more there is nothing left to do
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_step", None)
        assert_same(resumed(kind, tmp_path), found)


def test_checkpoints_change_nothing_and_are_rotated(tmp_path: Path) -> None:
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 3, "keep_checkpoints": 3}
    student, teacher = networks()
    found = outcome(student, run("mixup", student, teacher, **options))
    assert_same(found, reference("mixup"))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"checkpoint-{n:09d}.safetensors" for n in (8, 9, 12)]


def test_after_each_epoch_unless_told_otherwise(tmp_path: Path) -> None:
    crash("plain", tmp_path, 7, checkpoint_every=None)
    assert sorted(path.name[-14:-12] for path in tmp_path.iterdir()) == ["00", "04"]
    assert_same(resumed("plain", tmp_path), reference("plain"))


def test_goes_on_from_a_file_without_writing_more(tmp_path: Path) -> None:
    crash("ema", tmp_path, 6)
    older = tmp_path / "checkpoint-000000005.safetensors"
    found = sorted(tmp_path.iterdir())
    assert older in found
    assert_same(resumed("ema", tmp_path, checkpoint_dir=None, resume=older), reference("ema"))
    assert sorted(tmp_path.iterdir()) == found
    # what came after the chosen checkpoint is lived again, and replaced
    assert_same(resumed("ema", tmp_path, resume=older), reference("ema"))
    assert sorted(p.name[-14:-12] for p in tmp_path.iterdir()) == ["08", "12"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 64
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, empty])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    crash("plain", tmp_path, 6)
    _, newest = sorted(tmp_path.iterdir())
    damage(newest)
    with pytest.warns(UserWarning, match=r"000006.*going on from the one before it"):
        found = resumed("plain", tmp_path)
    assert_same(found, reference("plain"))
    for path in tmp_path.iterdir():
        damage(path)
    with (
        pytest.warns(UserWarning, match="going on"),
        pytest.raises(CheckpointError, match="delete them"),
    ):
        resumed("plain", tmp_path)


class FullDisk:
    """Writes half of a file, then has no room."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.save = checkpoints.save_file

    def __call__(self, tensors: Any, path: Path, metadata: Any) -> None:
        self.save(tensors, path, metadata)
        self.left -= 1
        if self.left < 0:
            os.truncate(path, path.stat().st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = networks()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", FullDisk(after=6))
        with pytest.raises(OutputError, match=r"No space left.*000004.safetensors is intact"):
            run("plain", student, teacher, checkpoint_dir=tmp_path, checkpoint_every=1)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert [path.name[-14:-12] for path in sorted(tmp_path.iterdir())] == ["03", "04"]
    assert_same(resumed("plain", tmp_path), reference("plain"))


def test_a_system_that_refuses_to_write_more(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the same call fails in the same way."""
    student, teacher = networks()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"File too large.*there is none before it"):
            run("plain", student, teacher, checkpoint_dir=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_shows_before_the_first_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 0)
    (tmp_path / "file").write_text("")
    student, teacher = networks()
    with pytest.raises(OutputError, match="cannot be made a folder"):
        run("plain", student, teacher, checkpoint_dir=tmp_path / "file" / "deeper")

    def refuse(path: Path, **_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(OutputError, match="Permission denied"):
        run("plain", student, teacher, checkpoint_dir=tmp_path / "closed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.1}, "recipe: lr was 0.05 and is 0.1 now"),
        ({"epochs": 4}, "recipe: epochs was 3 and is 4 now"),
        ({"losses": {"kd": 1.0}}, "recipe: losses was None and is {'kd': 1.0} now"),
        ({"train": image_set(72)}, "train: images was 70 and is 72 now"),
        ({"val": None}, "val: length was 30 and is None now"),
    ],
)
def test_checkpoints_of_another_run_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    crash("plain", tmp_path, 2)
    with pytest.raises(CheckpointError, match=f"of another run: {message}"):
        resumed("plain", tmp_path, **options)
    assert_same(resumed("plain", tmp_path, workers=0), reference("plain"))


def test_checkpoints_of_another_network_or_plan_are_refused(tmp_path: Path) -> None:
    crash("plain", tmp_path, 2)
    _, teacher = networks()
    x = torch.randn(2, 1, 6, 6)
    wider = cpx.prune(teacher, x, 0.125)
    with pytest.raises(CheckpointError, match=r"student: conv1.weight was 'float32 \[6, 1, 3, 3"):
        run("plain", wider, teacher, checkpoint_dir=tmp_path, resume="auto")
    with torch.no_grad():
        teacher.conv1.weight.copy_(
            teacher.conv1.weight.flip(0) * torch.arange(1, 9).view(8, 1, 1, 1)
        )
    others = cpx.prune(teacher, x, 0.25)
    with pytest.raises(CheckpointError, match=r"plan: conv1.weight, dim 0 was 'kept 6, checksum"):
        run("plain", others, teacher, checkpoint_dir=tmp_path, resume="auto")
    student, _ = networks()
    frozen, _ = networks()
    frozen.conv1.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"trained: conv1.weight was True and is False now"):
        run("plain", frozen, teacher, checkpoint_dir=tmp_path, resume="auto")
    with pytest.raises(CheckpointError, match="teacher: class was 'Net' and is None now"):
        run("plain", student, None, checkpoint_dir=tmp_path, resume="auto")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"resume": "auto"}, InvalidArgumentError, "checkpoint_dir: needed"),
        ({"checkpoint_every": 3}, InvalidArgumentError, "checkpoint_every: needs a folder"),
        ({"checkpoint_dir": "new", "checkpoint_every": 0}, InvalidArgumentError, "at least 1"),
        ({"checkpoint_dir": "new", "keep_checkpoints": 0}, InvalidArgumentError, "at least 1"),
        ({"checkpoint_dir": "old"}, InvalidArgumentError, "holds checkpoints of an earlier run"),
        ({"checkpoint_dir": "old", "resume": "new"}, InvalidArgumentError, "an earlier run"),
        ({"resume": "empty"}, CheckpointError, "empty holds no checkpoints"),
        ({"resume": "missing"}, CheckpointError, "missing: can't be read"),
        ({"resume": "model.safetensors"}, CheckpointError, "is no checkpoint of a recovery run"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    CheckpointFolder("old", None, None, 1).write(0, {}, {})
    student, teacher = networks()
    cpx.save(student, "model.safetensors")
    with pytest.raises(error, match=message):
        run("plain", student, teacher, **options)


def test_leftovers_of_killed_writes_go(tmp_path: Path) -> None:
    leftover = tmp_path / ".checkpoint-000000003.safetensors.0a1b.tmp"
    leftover.write_bytes(b"half")
    CheckpointFolder(tmp_path, "auto", None, 2)
    assert not leftover.exists()


@pytest.mark.usefixtures("ctrl_c_counts")
def test_ctrl_c_finishes_the_update_and_a_second_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, pressed = signal.getsignal(signal.SIGINT), [1]
    step = TrainingLoop._step

    def interrupted(loop: TrainingLoop, batch: Any, rate: float) -> Any:
        if loop.at.update == 5:
            for _ in range(pressed[0]):
                signal.raise_signal(signal.SIGINT)
        return step(loop, batch, rate)

    monkeypatch.setattr(TrainingLoop, "_step", interrupted)
    student, teacher = networks()
    with pytest.raises(RecoveryInterrupted, match="after update 6 of 12") as caught:
        run("swa", student, teacher, checkpoint_dir=tmp_path)
    assert caught.value.checkpoint == tmp_path / "checkpoint-000000006.safetensors"
    assert signal.getsignal(signal.SIGINT) is handler
    assert_same(resumed("swa", tmp_path), reference_without(monkeypatch, step))
    pressed[0] = 2
    monkeypatch.setattr(TrainingLoop, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt) as plain:
        run("swa", student, teacher, checkpoint_dir=tmp_path / "second")
    assert not isinstance(plain.value, RecoveryInterrupted)
    assert signal.getsignal(signal.SIGINT) is handler


def reference_without(monkeypatch: pytest.MonkeyPatch, step: Any) -> dict[str, Any]:
    monkeypatch.setattr(TrainingLoop, "_step", step)
    return reference("swa")


def separate(call: Callable[..., Any], *arguments: Any, output: Path) -> int:
    """Begins ``call`` in a new interpreter, its output going to a file; the process's id.

    A fork of this process would not do: what ran in it before may have started threads.
    """
    ready = output.with_suffix(".ready")
    ready.unlink(missing_ok=True)
    process = multiprocessing.get_context("spawn").Process(
        target=in_a_process, args=(torch.get_num_threads(), call, arguments, output, ready)
    )
    process.start()
    while not ready.exists():
        assert process.is_alive()
        time.sleep(0.01)
    assert process.pid is not None
    return process.pid


def in_a_process(
    threads: int, call: Callable[..., Any], arguments: Any, output: Path, ready: Path
) -> None:
    torch.set_num_threads(threads)  # sums of several threads are rounded in another order
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    code = 1
    try:
        with output.open("w") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
            sys.stdout = sys.stderr = file
            ready.touch()
            call(*arguments)
            code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(code)


def on_the_command_line(arguments: list[str]) -> None:
    app(arguments)


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_again_and_again(
    kind: str, tmp_path: Path, kills: int, start: Callable[[list[str]], int]
) -> int:
    """Kills a run at random moments, lets it end, compares; how many kills came before its end."""
    draw, killed = random.Random(0), 0
    folder, out = tmp_path / "checkpoints", tmp_path / "out"
    arguments = [kind, str(folder), str(out)]
    for _ in range(kills):
        child = start([*arguments, "0.05"])
        time.sleep(draw.uniform(0.05, 0.5))
        os.kill(child, signal.SIGKILL)
        killed += exit_code(child) == -signal.SIGKILL
    assert exit_code(start([*arguments, "0"])) == 0
    record = json.loads(Path(f"{out}.json").read_text())
    found = {"weights": load_file(f"{out}.safetensors"), "record": record}
    assert_same(found, reference(kind))
    assert not list(folder.glob(".*"))
    return killed


def test_killed_at_random_moments(tmp_path: Path) -> None:
    def start(arguments: list[str]) -> int:
        return separate(main, *arguments, output=tmp_path / "log")

    assert killed_again_and_again("mixup", tmp_path, 4, start) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ema", "user loader"])
def test_a_program_killed_ten_times_at_random_moments(tmp_path: Path, kind: str) -> None:
    def start(arguments: list[str]) -> int:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, str(PROGRAM), *arguments]
        program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        return program.pid

    assert killed_again_and_again(kind, tmp_path, 10, start) >= 5


@pytest.mark.parametrize("moment", ["half written", "not yet renamed", "not yet rotated"])
def test_killed_while_a_checkpoint_is_written(tmp_path: Path, moment: str) -> None:
    """A process dies by SIGKILL inside the sixth write."""
    folder = tmp_path / "checkpoints"
    child = separate(die_in_a_write, folder, moment, output=tmp_path / "log")
    assert exit_code(child) == -signal.SIGKILL
    assert bool(list(folder.glob(".*.tmp"))) == (moment != "not yet rotated")
    assert_same(resumed("plain", folder), reference("plain"))
    assert not list(folder.glob(".*.tmp"))


def die_in_a_write(folder: Path, moment: str) -> None:
    save, replace = checkpoints.save_file, Path.replace
    written = []

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def saving(tensors: Any, path: Path, metadata: Any) -> None:
        save(tensors, path, metadata)
        written.append(path)
        if len(written) == 6 and moment == "half written":
            os.truncate(path, path.stat().st_size // 2)
            die()

    def renaming(path: Path, target: Path) -> Path:
        if len(written) == 6 and moment == "not yet renamed":
            die()
        found = replace(path, target)
        if len(written) == 6:
            die()
        return found

    checkpoints.save_file, Path.replace = saving, renaming  # type: ignore[assignment]
    student, teacher = networks()
    run("plain", student, teacher, checkpoint_dir=folder, checkpoint_every=1)


def test_ctrl_c_on_the_command_line(tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    cpx.save(resnet20(in_channels=1, width=4), small)
    command = (
        *("recover", "resnet20", "--model-arg", "in_channels=1", "--model-arg", "width=4"),
        *("--weights", str(small), "--data", "digits", "--device", "cpu", "--epochs", "1"),
        *("--batch-size", "64", "--mixup", "0.3"),
    )
    whole, again = tmp_path / "whole.safetensors", tmp_path / "again.safetensors"
    folder, log = tmp_path / "checkpoints", tmp_path / "log"
    kept = ("--checkpoints", str(folder), "--resume", "auto", "--out", str(again))
    child = separate(on_the_command_line, [*command, *kept], output=log)
    while not list(folder.glob("checkpoint-*")):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), log.read_text()
        time.sleep(0.02)
    time.sleep(0.1)
    os.kill(child, signal.SIGINT)
    assert exit_code(child) == 130, log.read_text()
    message = log.read_text()
    assert "interrupted after update" in message
    assert "go on with the same command and --resume auto" in message
    assert "Traceback" not in message
    assert not again.exists()
    assert max(folder.iterdir()).name < "checkpoint-000000022.safetensors"
    for arguments in (kept, ("--out", str(whole))):
        ended = CliRunner().invoke(app, [*command, *arguments])
        assert ended.exit_code == 0, ended.output
    one, two = load_file(whole), load_file(again)
    assert all(torch.equal(one[name], two[name]) for name in one)

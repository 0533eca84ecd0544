"""Measuring a pruned network against its original: figures, shares of modules, hints."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import chanprune_ext as cpx
from chanprune_ext.bench import bench
from chanprune_ext.cli import app
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.latency.module_times import ModuleTime, module_times
from chanprune_ext.latency.width_advice import advice, block_of, misfits
from chanprune_ext.models import CifarResNet, resnet20

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CPU = torch.device("cpu")


class Slow(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return x


class Parent(nn.Module):
    """Sleeps itself and lets a child sleep, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Slow(0.01)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.02)
        return self.child(self.child(x))


def test_every_module_gets_its_own_time() -> None:
    found = module_times({"a": Parent()}, torch.zeros(1), rounds=3)["a"]
    own = {t.name: t.milliseconds for t in found}
    assert list(own) == ["", "child"]
    assert 20 <= own[""] < 200
    assert 20 <= own["child"] < 200


def test_watching_leaves_no_hooks_and_no_mode(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout()).train()
    module_times({"a": model}, torch.zeros(1, 3), rounds=1)
    assert model.training
    assert model[1].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no")


def test_a_forward_that_raises_leaves_no_hooks() -> None:
    model = nn.Sequential(nn.Identity(), Fails())
    with pytest.raises(ValueError, match="no"):
        module_times({"a": model}, torch.zeros(1))
    assert not any(m._forward_hooks for m in model.modules())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads wait for each other; on a busy machine for longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_rows_say_what_was_measured() -> None:
    original, pruned = nn.Linear(512, 2048), nn.Linear(512, 128)
    found = bench(
        original, pruned, torch.randn(2, 512), batch_sizes=(1, 64), backends=["eager"], seconds=0.1
    )
    assert [(r.backend, r.batch_size) for r in found.rows] == [("eager", 1), ("eager", 64)]
    row = found.rows[1]
    assert row.speedup > 1.2
    assert row.rounds >= 9
    assert row.original_quartiles_ms[0] <= row.original_ms <= row.original_quartiles_ms[1]
    # Weights with bias, and the output of a batch of 64.
    assert row.original_memory == 4 * (2048 * 513 + 64 * 2048)
    assert row.pruned_memory == 4 * (128 * 513 + 64 * 128)
    assert row.throughput()[0] == pytest.approx(64e3 / row.original_ms)
    assert found.macs_ratio is None
    json.dumps(found.to_dict())


def test_a_plan_tells_the_ratios_of_all_its_prunings() -> None:
    model, x = CifarResNet(8, width=8).eval(), torch.zeros(1, 3, 16, 16)
    once = cpx.prune(model, x, 0.5)
    twice = cpx.prune(once, x, 0.5)
    one, two = cpx.plan_of(once), cpx.plan_of(twice)
    found = bench(model, twice, x, batch_sizes=[1], backends=["eager"], seconds=0.01)
    assert found.macs_ratio == pytest.approx(two.macs_after / one.macs_before)
    found = bench(once, twice, x, batch_sizes=[1], backends=["eager"], seconds=0.01)
    assert found.macs_ratio == pytest.approx(two.macs_after / two.macs_before)


def test_channels_last_measures_copies() -> None:
    model = CifarResNet(8, width=8).eval()
    found = bench(
        model,
        model,
        torch.zeros(1, 3, 16, 16),
        batch_sizes=[2],
        backends=["eager"],
        seconds=0.01,
        channels_last=True,
    )
    assert found.channels_last
    assert model.conv1.weight.is_contiguous()


def test_backends_that_cannot_run_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    layer = nn.Linear(4, 4)
    found = bench(layer, layer, torch.zeros(1, 4), backends=["eager", "onnxruntime"], seconds=0.01)
    assert {r.backend for r in found.rows} == {"eager"}
    assert "pip install 'chanprune_ext[export]'" in found.skipped["onnxruntime"]


@pytest.mark.slow
def test_compiled_and_onnxruntime() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    original, pruned = nn.Linear(512, 512), nn.Linear(512, 64)
    found = bench(original, pruned, torch.randn(1, 512), batch_sizes=[64], seconds=0.2)
    assert [r.backend for r in found.rows] == ["eager", "compile", "onnxruntime"]
    assert not found.skipped


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backends": ["fast"]}, "backends must be some of"),
        ({"backends": []}, "at least one of"),
        ({"batch_sizes": [0]}, "batch_sizes must be integers >= 1"),
        ({"batch_sizes": []}, "batch_sizes must be integers >= 1"),
        ({"example_inputs": 3}, "a tensor with a batch dimension"),
        ({"example_inputs": torch.zeros(1, 9)}, "original: the model can't run"),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    layer = nn.Linear(4, 4)
    arguments = {"example_inputs": torch.zeros(1, 4), **options}
    with pytest.raises(InvalidArgumentError, match=message):
        bench(layer, layer, **arguments)


# -- hints ---------------------------------------------------------------------------------------


def timed(name: str, ms: float, widths: tuple[int, int] | None, kind: str = "Conv2d") -> ModuleTime:
    return ModuleTime(name, kind, ms, widths)


def hints(pruned: list[ModuleTime], original: list[ModuleTime] | None = None, **options) -> str:
    before = original or [
        timed(t.name, 2 * t.milliseconds, t.widths and (99, 99), t.kind) for t in pruned
    ]
    settings = {"macs_ratio": None, "time_ratio": 0.5, "channels_last": False, **options}
    return " ".join(advice(before, pruned, CPU, **settings))


def test_widths_that_sit_badly_are_named_longest_first() -> None:
    times = [
        timed("stem", 1.0, (3, 64)),
        timed("a", 1.0, (64, 51)),
        timed("b", 2.0, (51, 64)),
        timed("tiny", 0.001, (51, 51)),
        timed("head", 1.0, (64, 10)),
    ]
    assert [t.name for t in misfits(times, 16)] == ["b", "a"]
    assert "2 layers have widths that are no multiples of" in hints(times)
    assert f"round_to={block_of(CPU)}" in hints(times)
    assert "multiples" not in hints([timed("a", 1.0, (64, 48)), timed("head", 1.0, (48, 10))])


def test_time_outside_the_layers_is_told() -> None:
    assert "70% of the pruned network's time" in hints(
        [timed("a", 3.0, (16, 16)), timed("bn", 7.0, None, "BatchNorm2d")]
    )


def test_layers_that_kept_their_widths_are_told() -> None:
    times = [timed("a", 5.0, (16, 16)), timed("b", 5.0, (16, 32))]
    before = [timed("a", 5.0, (16, 16)), timed("b", 9.0, (16, 64))]
    assert "50% of the time is in layers that have kept their widths: a." in hints(times, before)


def test_channels_last_is_advised_where_time_lags_behind() -> None:
    times = [timed("a", 5.0, (16, 16))]
    assert "--channels-last" in hints(times, macs_ratio=0.3, time_ratio=0.6)
    assert "--channels-last" not in hints(times, macs_ratio=0.3, time_ratio=0.6, channels_last=True)
    assert "--channels-last" not in hints(times, macs_ratio=0.5, time_ratio=0.5)
    linear = [timed("a", 5.0, (16, 16), "Linear")]
    assert "--channels-last" not in hints(linear, macs_ratio=0.3, time_ratio=0.6)


# -- the command ---------------------------------------------------------------------------------


def test_the_command(tmp_path: Path) -> None:
    file, out = tmp_path / "small.safetensors", tmp_path / "new" / "bench.json"
    runner = CliRunner()
    made = runner.invoke(
        app, ["prune", "resnet20", "--input-shape", "1,3,16,16", "--out", str(file)]
    )
    assert made.exit_code == 0, made.output
    options = ["--batch", "2", "--backend", "eager", "--seconds", "0.1", "--threads", "1"]
    result = runner.invoke(app, ["bench", str(file), *options, "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert "against resnet20" in result.output
    assert "where the time goes" in result.output
    assert max(map(len, result.output.split("hint:")[0].splitlines())) <= 100
    found = json.loads(out.read_text())
    assert found["rows"][0]["batch_size"] == 2
    assert found["threads"] == 1
    assert found["macs_ratio"] < 0.5
    assert len(found["original_modules"]) == len(list(resnet20().modules()))


def test_a_file_that_does_not_name_its_model(tmp_path: Path) -> None:
    file = tmp_path / "small.safetensors"
    cpx.save(cpx.prune(resnet20(), torch.zeros(1, 3, 16, 16)), file)
    runner = CliRunner()
    result = runner.invoke(app, ["bench", str(file)])
    assert result.exit_code == 2
    assert "--against: needed" in result.output
    options = ["--batch", "1", "--backend", "eager", "--seconds", "0.1", "--layers", "0"]
    result = runner.invoke(app, ["bench", str(file), "--against", "resnet20", *options])
    assert result.exit_code == 0, result.output
    assert "where the time goes" not in result.output
    result = runner.invoke(app, ["bench", str(file), "--against", "resnet32", *options])
    assert result.exit_code == 2
    result = runner.invoke(app, ["bench", str(file), "--against", "resnet20", "--backend", "fast"])
    assert result.exit_code == 2
    assert "backends must be some of" in result.output

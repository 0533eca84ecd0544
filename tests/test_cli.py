"""The command line: every command end to end, and what a user's mistake looks like."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from typer.testing import CliRunner, Result

import chanprune_ext as cpx
from chanprune_ext.checkpoint import load, save
from chanprune_ext.cli import app
from chanprune_ext.cli.model_spec import build_model, parse_arguments, parse_ratios, parse_shape
from chanprune_ext.errors import ChanpruneError, InvalidArgumentError
from chanprune_ext.models import CifarResNet, resnet20
from chanprune_ext.report import RunReport, Stage, write_report

if TYPE_CHECKING:
    from pathlib import Path

NARROW = ("--model-arg", "in_channels=1", "--model-arg", "width=4")

USER_MODULE = """
from torch import nn

def network(width=8):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 2, 3))

def number():
    return 7

def broken():
    raise OSError("disk on fire")

constant = 3
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def fail(*arguments: object) -> str:
    """Runs a command that must fail on purpose; returns its message."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    return result.stderr


@pytest.fixture
def narrow_weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "narrow.safetensors"
    save(resnet20(in_channels=1, width=4), path)
    return path


def test_help_lists_the_commands() -> None:
    output = succeed("--help")
    for command in ("demo", "reproduce", "prune", "recover", "evaluate", "report", "info"):
        assert command in output


def test_info_says_what_was_built() -> None:
    facts = json.loads(succeed("info", "--json"))
    assert facts["torch"] == torch.__version__
    assert torch.__version__ in succeed("info")


def test_prune_writes_model_and_plan(tmp_path: Path, narrow_weights: Path) -> None:
    out, plan_out = tmp_path / "new" / "small.safetensors", tmp_path / "plan.json"
    output = succeed(
        *("prune", "resnet20", *NARROW, "--weights", narrow_weights, "--input-shape", "1,1,8,8"),
        *("--ratios", "layer1.*.conv1=0.5", "--ratios", "layer2.*.conv1=0.25"),
        *("--out", out, "--plan-out", plan_out, "--check-numbers"),
    )

    pruned = load(out, resnet20(in_channels=1, width=4))
    assert isinstance(pruned, CifarResNet)
    assert pruned.layer1[0].conv1.out_channels == 2
    assert pruned.layer2[0].conv1.out_channels == 6
    assert pruned.layer3[0].conv1.out_channels == 16
    assert cpx.PruningPlan.load(plan_out).params_after == sum(
        p.numel() for p in pruned.parameters()
    )
    assert "layer1.0.conv1" in output


def test_prune_keeps_the_trained_weights(tmp_path: Path, narrow_weights: Path) -> None:
    out = tmp_path / "small.safetensors"
    succeed(
        *("prune", "resnet20", *NARROW, "--weights", narrow_weights, "--input-shape", "1,1,8,8"),
        *("--ratio", "0.5", "--criterion", "l2", "--out", out),
    )

    original = load(narrow_weights, resnet20(in_channels=1, width=4))
    pruned = load(out, resnet20(in_channels=1, width=4))
    plan = cpx.plan_of(pruned)
    assert plan is not None
    kept = plan.kept["layer1.0.conv1.weight"]
    expected = original.layer1[0].conv1.weight[kept[0]][:, kept[1]]
    assert torch.equal(pruned.layer1[0].conv1.weight, expected)


def test_prune_compensate_recover_evaluate_on_data(tmp_path: Path, narrow_weights: Path) -> None:
    small, better = tmp_path / "small.safetensors", tmp_path / "better.safetensors"
    common = ("resnet20", *NARROW, "--data", "digits", "--device", "cpu")

    output = succeed(
        *("prune", *common, "--weights", narrow_weights, "--macs", "0.6", "--out", small),
        *("--calibration-images", "64"),
    )
    assert output.count("(n = 360)") == 3
    output = succeed(
        *("recover", *common, "--weights", small, "--teacher-weights", narrow_weights),
        *("--out", better, "--epochs", "1", "--batch-size", "256"),
    )
    assert output.count("(n = 360)") == 2

    evaluated = succeed("evaluate", *common, "--weights", better)
    accuracy = output.split("after: top-1 ")[1].split(" (n")[0]
    assert accuracy in evaluated


def test_report_renders_a_saved_run_again(tmp_path: Path) -> None:
    stage = Stage("original", 0.9, 0.01, 100, 1000, 2000)
    page = write_report(RunReport("A run", "command", "now", (stage,)), tmp_path)
    page.unlink()

    assert "90.0 ± 1.0 %" in succeed("report", tmp_path / "report.json")
    assert page.exists()


def test_mistakes_read_as_one_message(
    tmp_path: Path, narrow_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("here first")
    narrow = ("resnet20", *NARROW, "--input-shape", "1,1,8,8")
    out = ("--out", "out.safetensors")

    assert "no model named 'resnet21'" in fail("prune", "resnet21", *out)
    assert "--input-shape: needed without --data" in fail("prune", "resnet20", *out)
    assert "1.5" in fail("prune", *narrow, "--ratio", "1.5", *out)
    assert "nothing.*" in fail("prune", *narrow, "--ratios", "nothing.*=0.5", *out)
    assert "expected glob=ratio" in fail("prune", *narrow, "--ratios", "0.5", *out)
    assert "missing.pt" in fail("prune", *narrow, "--weights", "missing.pt", *out)
    assert "--device: 'cuda:77'" in fail("prune", *narrow, "--device", "cuda:77", *out)
    assert "cannot be made a folder" in fail("prune", *narrow, "--out", "file/out.safetensors")
    assert "conv1.weight" in fail(
        "evaluate", "resnet20", "--weights", narrow_weights, "--data", "x"
    )
    assert "nowhere.npz" in fail("evaluate", "resnet20", "--data", "nowhere.npz")
    assert "cannot be read" in fail("report", "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", narrow_weights.name]


def test_debug_lets_the_error_through() -> None:
    result = run("--debug", "prune", "resnet21", "--out", "x")
    assert isinstance(result.exception, InvalidArgumentError)


def test_bugs_are_not_dressed_up_as_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    # By its name in sys.modules: the package's attribute `report` is the command itself.
    monkeypatch.setattr(sys.modules["chanprune_ext.cli.report"], "load_report", broken)
    assert isinstance(run("report", "x").exception, ZeroDivisionError)


def test_models_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_networks.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)

    assert build_model("resnet56").layer3[8].conv2.out_channels == 64
    assert build_model("torchvision:resnet18", {"num_classes": 7}).fc.out_features == 7
    assert build_model("user_networks:network", {"width": 5})[0].out_channels == 5


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet21", "expected one of resnet20, .*'torchvision:<name>'"),
        ("torchvision:resnet19", "torchvision has no model named 'resnet19'"),
        ("no_such_module:network", "cannot import module 'no_such_module'"),
        ("user_networks:other", "has no callable 'other'"),
        ("user_networks:constant", "has no callable 'constant'"),
        ("user_networks:number", "returned int, expected an nn.Module"),
        ("user_networks:broken", "could not be built with {} .OSError: disk on fire"),
    ],
)
def test_models_that_do_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str
) -> None:
    (tmp_path / "user_networks.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidArgumentError, match=message):
        build_model(spec)


def test_grammar_of_options() -> None:
    assert parse_arguments(["a=3", "b=true", "c=[1, 2]", "d=text", "e=x=y"]) == {
        "a": 3,
        "b": True,
        "c": [1, 2],
        "d": "text",
        "e": "x=y",
    }
    assert parse_ratios(["layer*.conv1=0.5", "fc=0"]) == {"layer*.conv1": 0.5, "fc": 0.0}
    assert parse_shape("1,3,224,224") == (1, 3, 224, 224)
    assert parse_shape("2x8") == (2, 8)


@pytest.mark.parametrize("text", ["", "1,,3", "1,-3", "0,3", "a,b", "1.5"])
def test_shapes_that_are_none(text: str) -> None:
    with pytest.raises(ChanpruneError, match="--input-shape"):
        parse_shape(text)

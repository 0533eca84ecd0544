"""The command line: every command end to end, and what a user's mistake looks like."""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from typing import TYPE_CHECKING

import pytest
import torch
from image_files import jpeg, write_folder, write_shards, write_tar
from typer.testing import CliRunner, Result

import chanprune_ext as cpx
from chanprune_ext.checkpoint import load, save
from chanprune_ext.cli import app
from chanprune_ext.cli.image_options import open_images
from chanprune_ext.cli.model_spec import build_model, parse_arguments, parse_ratios, parse_shape
from chanprune_ext.data.opening import classes_of_test
from chanprune_ext.errors import ChanpruneError, DataError, InvalidArgumentError
from chanprune_ext.jobs.published import ImageNetImages
from chanprune_ext.models import CifarResNet, resnet20
from chanprune_ext.report import RunReport, Stage, load_report, write_report

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

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.inner = nn.Embedding(9, 6), nn.Linear(6, 8)
        self.head = nn.Linear(8, 9)

    def forward(self, ids):
        return self.head(self.inner(self.embedding(ids)).relu())

def of_size(edge):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * (edge // 4) ** 2, 2)
    )
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
    for command in (
        *("demo", "reproduce", "prune", "recover", "evaluate", "inspect", "report", "info"),
    ):
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


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--preset", "ResNet18_Weights.DEFAULT"),
        ("--image-size", 96),
        ("--resize", 96),
        ("--crop-mode", "squash"),
    ],
)
def test_prune_refuses_to_ignore_how_images_are_read(
    tmp_path: Path, option: str, value: object
) -> None:
    asked = ("prune", "resnet20", "--ratio", 0.5, "--out", tmp_path / "small.safetensors")
    assert f"{option}: says how to read the images of --data" in fail(*asked, option, value)
    assert "needs --data" in fail(*asked, "--calibration-images", 8)
    assert not (tmp_path / "small.safetensors").exists()
    succeed(*asked, "--calibration-images", 0)


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
        *("--out", better, "--epochs", "1", "--batch-size", "256", "--report", tmp_path / "report"),
    )
    assert output.count("(n = 360)") == 2
    report = load_report(tmp_path / "report" / "report.json")
    assert [stage.name for stage in report.stages] == ["original", "pruned", "recovered"]
    original, pruned, recovered = report.stages
    assert pruned.macs == recovered.macs < 0.62 * original.macs
    assert pruned.latency == recovered.latency
    assert [epoch.val_accuracy for epoch in report.history] == [recovered.accuracy]
    assert any(width.after < width.before for width in report.widths)
    assert (tmp_path / "report" / "report.html").exists()

    record = tmp_path / "new" / "evaluated.json"
    evaluated = succeed("evaluate", *common, "--weights", better, "--json", record)
    accuracy = output.split("after: top-1 ")[1].split(" (n")[0]
    assert accuracy in evaluated
    found = json.loads(record.read_text())
    assert (found["top1"], found["n"], found["weights"]) == (recovered.accuracy, 360, better.name)
    # The recovered file says what it was built from, as the pruned one does.
    verified = succeed("verify", better, "--weights", narrow_weights)
    assert "as a CifarResNet of the plan's widths" in verified
    assert "tensors were changed after the cut" in " ".join(verified.split())


def test_verify_says_what_it_could_not_do(tmp_path: Path, narrow_weights: Path) -> None:
    assert "neither rebuilt nor run" in succeed("verify", narrow_weights)
    asked = ("verify", narrow_weights, "--weights", narrow_weights)
    assert "--model: needed" in fail(*asked)
    assert "forward" in succeed(*asked, "--model", "resnet20", *NARROW, "--input", "1x1x8x8")


def test_prune_and_sensitivity_take_images_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sized_networks.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    images = {
        f"{split}/{'ab'[i % 2]}/{i}.jpg": jpeg(i, 96, 96)
        for split in ("train", "test")
        for i in range(6)
    }
    write_folder(tmp_path / "images", images)
    model = ("sized_networks:of_size", "--model-arg", "edge=96", "--data", "images")
    out = ("--out", "small.safetensors")
    # Fewer images than compensation usually draws, and of the size of the input.
    assert succeed("prune", *model, *out, "--input-shape", "1,3,96,96").count("(n = 6)") == 3
    size = ("--image-size", 96)
    assert succeed("prune", *model, *out, *size, "--resize", 96).count("(n = 6)") == 3
    message = fail("prune", *model, *out, *size, "--input", "1x3x224x224")
    assert "--data: expected images of 3x224x224" in message
    message = fail("prune", *model, *out, *size, "--calibration-images", 7)
    assert "--calibration-images: expected at most 6" in message

    curves = ("sensitivity", *model, *size, "--ratios", 0.5, "--out", "curves.json")
    assert "6 images" in succeed(*curves, "--compensate", 6)
    assert "--compensate: expected at most 6" in fail(*curves, "--compensate", 7)
    assert "6 images" in succeed(*curves, "--criterion", "taylor")


def test_images_that_the_model_does_not_take_are_told_in_one_line(
    tmp_path: Path, narrow_weights: Path
) -> None:
    out = tmp_path / "small.safetensors"
    narrow = ("resnet20", *NARROW)
    succeed("prune", *narrow, "--weights", narrow_weights, "--input", "1x1x8x8", "--out", out)
    colours = write_folder(
        tmp_path / "images",
        {f"{s}/{c}/{i}.jpg": jpeg(i) for s in ("train", "test") for c in "ab" for i in range(2)},
    )
    images = ("--data", colours, "--image-size", 16)
    told = "--data: the model does not run on images of 3x16x16, expected 1x8x8 ("
    again = ("--out", tmp_path / "again.safetensors")
    for command in (
        ("evaluate", *narrow, "--weights", out, *images),
        ("recover", *narrow, "--weights", out, *images, *again, "--epochs", 1),
        ("prune", *narrow, "--weights", out, *images, *again),
        ("sensitivity", *narrow, "--weights", out, *images, "--out", tmp_path / "curves.json"),
    ):
        message = fail(*command)
        assert message.strip().startswith(f"error: {told}")
        assert "--image-size scales images" in message
    message = fail("evaluate", "resnet20", "--data", "digits")
    assert "images of 1x8x8, expected 3x32x32 (" in message


def test_arguments_of_the_model_are_those_of_its_file(tmp_path: Path, narrow_weights: Path) -> None:
    small, smaller = tmp_path / "small.safetensors", tmp_path / "smaller.safetensors"
    narrow = ("prune", "resnet20", *NARROW, "--weights", narrow_weights, "--input", "1x1x8x8")
    succeed(*narrow, "--out", small)
    assert "360" in succeed("evaluate", "resnet20", "--weights", small, "--data", "digits")
    succeed("prune", "resnet20", "--weights", small, "--input", "1x1x8x8", "--out", smaller)
    assert "returns 1x10" in succeed("verify", smaller)
    message = fail("evaluate", "resnet32", "--weights", small, "--data", "digits")
    assert "made for another model" in message


def test_scores_that_compete_are_made_comparable(tmp_path: Path, narrow_weights: Path) -> None:
    narrow = ("prune", "resnet20", *NARROW, "--weights", narrow_weights, "--input", "1x1x8x8")
    chosen = ("--criterion", "l2", "--scope", "global", "--out", tmp_path / "small.safetensors")
    plans = {}
    for how in ("mean", "lamp"):
        succeed(*narrow, *chosen, "--normalise", how, "--plan-out", tmp_path / "plan.json")
        plans[how] = cpx.PruningPlan.load(tmp_path / "plan.json")
        assert plans[how].options["normalise"] == how
    assert plans["mean"].params_after != plans["lamp"].params_after
    assert "lamp" in run(*narrow, *chosen, "--normalise", "median").stderr


def test_messages_name_the_options_to_change(tmp_path: Path, narrow_weights: Path) -> None:
    narrow, out = ("resnet20", *NARROW), ("--out", tmp_path / "out.safetensors")
    assert fail("prune", *narrow, "--input", "1x3x8x8", *out).strip().endswith("that is --input")
    weighted = ("recover", *narrow, "--weights", narrow_weights, "--data", "digits", *out)
    assert "here that is --teacher-weights" in fail(*weighted, "--loss", "kd=1")
    assert "here that is --checkpoints" in fail(*weighted, "--resume", "auto")
    assert "is a file; name the model that it holds" in fail("inspect", narrow_weights)
    missing = tmp_path / "missing.safetensors"
    message = fail("export", missing, "--out", tmp_path / "out.pt2")
    assert "damaged" not in message
    assert message.count("missing.safetensors") == 2  # as a file, and in the system's words


def test_torch_logs_nothing_of_a_forward_that_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "quiet_networks.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    log = logging.getLogger("torch._subclasses.fake_tensor")
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    model = ("quiet_networks:of_size", "--model-arg", "edge=96")
    fail("prune", *model, "--input", "1x3x224x224", "--out", "small.safetensors")
    assert not caplog.records


def test_prune_takes_inputs_of_any_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token_networks.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    out = ("--out", "small.safetensors")
    assert "--input: needed for" in fail("prune", "token_networks:Tokens", *out)
    succeed("prune", "token_networks:Tokens", "--input", "1x7:int64", *out)
    assert "returns 1x7x9" in succeed("verify", "small.safetensors")
    # Models named by a package need none.
    succeed("prune", "resnet20", "--model-arg", "width=4", *out)
    assert "returns 1x10" in succeed("verify", "small.safetensors")


def test_prune_of_named_channels(tmp_path: Path, narrow_weights: Path) -> None:
    out = tmp_path / "small.safetensors"
    asked = ("prune", "resnet20", *NARROW, "--weights", narrow_weights, "--out", out)
    asked += ("--input", "1x1x8x8")
    channels = ("--remove", "layer1.0.conv1=0,3", "--remove", "layer1.0.conv1=1")
    succeed(*asked, *channels, "--remove", "layer1.1.conv1=2")
    pruned = load(out, resnet20(in_channels=1, width=4))
    assert pruned.layer1[0].conv1.out_channels == 1
    assert pruned.layer1[1].conv1.out_channels == 3
    assert "expected integers like 0,3,5" in fail(*asked, "--remove", "layer1.0.conv1=0-3")
    assert "--remove: expected" in fail(*asked, "--remove", "layer1.0.conv1")
    assert "either ratio or remove" in fail(*asked, *channels, "--ratio", 0.5)


def test_prune_by_threshold_and_kind(tmp_path: Path, narrow_weights: Path) -> None:
    out, record = tmp_path / "small.safetensors", tmp_path / "new" / "found.json"
    common = ("prune", "resnet20", *NARROW, "--weights", narrow_weights, "--input", "1x1x8x8")
    pruned = (*common, "--threshold", "0.9", "--kinds", "hidden", "--out", out, "--json", record)
    succeed(*pruned)
    found = json.loads(record.read_text())
    cut = {g["kind"] for g in found["groups"] if g["width_after"] < g["width_before"]}
    assert cut == {"hidden"}
    assert found["options"]["threshold"] == 0.9
    assert found["params"][1] < found["params"][0]
    assert found["accuracy"] == {}
    assert "give either ratio or threshold" in fail(*pruned, "--ratio", "0.5")
    assert "kinds must be some of" in fail(*common, "--kinds", "heart", "--out", out)


@pytest.mark.parametrize("criterion", ["elimination", "fluctuation", "taylor"])
def test_prune_by_what_images_say(tmp_path: Path, narrow_weights: Path, criterion: str) -> None:
    out, record = tmp_path / "small.safetensors", tmp_path / "found.json"
    common = ("prune", "resnet20", *NARROW, "--weights", narrow_weights, "--out", out)
    asked = (*common, "--criterion", criterion)
    succeed(*asked, "--data", "digits", "--calibration-images", 32, "--json", record)
    found = json.loads(record.read_text())
    assert found["criterion"] == criterion
    assert list(found["accuracy"]) == ["original", "pruned", "compensated"]
    assert found["accuracy"]["pruned"]["n"] == 360
    message = fail(*asked, "--input", "1x1x8x8")
    assert f"--criterion: {criterion!r} is made of training images" in message


def test_recover_and_evaluate_read_shards(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    train = {f"{'ab'[i % 2]}/{i}.jpg": jpeg(i, 66, 66) for i in range(8)}
    write_shards(tmp_path / "train", train, (5, 3))
    write_tar(tmp_path / "test" / "0.tar", {f"b/{i}.jpg": jpeg(i, 70, 90) for i in range(3)})
    model = ("resnet20", "--model-arg", "width=2", "--model-arg", "num_classes=2")
    plain, small, better = (tmp_path / f"{name}.safetensors" for name in ("0", "small", "better"))
    save(resnet20(width=2, num_classes=2), plain)
    succeed(
        *("prune", *model, "--weights", plain, "--ratio", "0.5", "--out", small),
        *("--input-shape", "1,3,66,66"),
    )
    (tmp_path / "classes.txt").write_text("a\nb\n")
    common = ("--class-file", tmp_path / "classes.txt", "--image-size", 66, "--resize", 66)
    output = succeed(
        *("recover", *model, "--weights", small, "--out", better, *common, "--epochs", "1"),
        *("--data", tmp_path / "train", "--test-data", tmp_path / "test", "--batch-size", 4),
        *("--auto-augment", "randaugment", "--random-erasing", 0.5, "--repeats", 2),
    )
    assert output.count("(n = 3)") == 2
    evaluated = succeed(
        *("evaluate", *model, "--weights", better, "--data", tmp_path / "test", *common)
    )
    assert output.split("after: top-1 ")[1].split(" (n")[0] in evaluated
    message = fail(
        *("evaluate", *model, "--weights", better, "--data", tmp_path / "test"),
        *("--preset", "ResNet9_Weights.BEST"),
    )
    assert "ResNet50_Weights.IMAGENET1K_V2" in message


def test_recover_keeps_its_recipe(tmp_path: Path, narrow_weights: Path) -> None:
    model = ("resnet20", *NARROW)
    data = ("--data", "digits")
    small = tmp_path / "small.safetensors"
    succeed("prune", *model, "--weights", narrow_weights, "--out", small, *data)
    common = ("recover", *model, "--weights", small, "--teacher-weights", narrow_weights, *data)
    mix = ("--loss", "kd=1", "--loss", "features=0.5", "--mixup", "0.2", "--epochs", "1")
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    succeed(*common, *mix, "--batch-size", "512", "--seed", "3", "--out", first)
    recipe = json.loads((tmp_path / "first.recipe.json").read_text())
    assert recipe["losses"] == {"kd": 1.0, "features": 0.5}
    assert (recipe["mixup"], recipe["epochs"], recipe["batch_size"]) == (0.2, 1, 512)
    succeed(*common, "--recipe", tmp_path / "first.recipe.json", "--out", second)
    assert json.loads((tmp_path / "second.recipe.json").read_text())["seed"] == 3
    one, two = (load(path, resnet20(in_channels=1, width=4)) for path in (first, second))
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
    assert "--loss: expected name=weight" in fail(*common, "--loss", "kd", "--out", second)
    assert "losses: expected names among" in fail(*common, "--loss", "kl=1", "--out", second)


def test_sensitivity_writes_curves_and_draws_them(tmp_path: Path, narrow_weights: Path) -> None:
    out, page = tmp_path / "curves.json", tmp_path / "page"
    common = ("sensitivity", "resnet20", *NARROW, "--weights", narrow_weights, "--data", "digits")
    small = ("--images", "40", "--ratios", "0.5")
    shown = succeed(*common, *small, "--out", out, "--report", page)
    data = json.loads(out.read_text())
    assert data["samples"] == 40
    assert 0 <= data["accuracy"] <= 1
    assert all(len(curve["accuracy"]) == 1 for curve in data["curves"])
    assert "layer3.2.conv1" in shown
    assert "accuracy (%), as cut" in (page / "report.html").read_text()
    assert "--ratios: expected numbers" in fail(*common, "--ratios", "half", "--out", out)


def test_report_renders_a_saved_run_again(tmp_path: Path) -> None:
    stage = Stage("original", 0.9, 0.01, 100, 1000, 2000)
    page = write_report(RunReport("A run", "command", "now", (stage,)), tmp_path)
    page.unlink()

    assert "90.0 ± 1.0 %" in succeed("report", tmp_path / "report.json")
    assert "90.0 ± 1.0 %" in succeed("report", tmp_path)
    assert page.exists()


def test_inspect_shows_groups_and_what_must_stay(tmp_path: Path) -> None:
    out = tmp_path / "new" / "found.json"
    output = succeed("inspect", "resnet20", *NARROW, "--input", "1x1x8x8", "--json", out)
    # One group inside each of nine blocks; the stream carries 4 channels, padded to 8 and to 16.
    assert f"12 groups; {4 + 6 * (4 + 8 + 16)} of {4 + 6 * (4 + 8 + 16) + 10} output" in output
    assert "layer1.0.conv1" in output
    assert "the model's output" in output

    found = json.loads(out.read_text())
    first = found["groups"][0]
    assert (first["name"], first["width"], first["units"]) == ("conv1", 4, 4)
    every = [f"layer{stage}.{k}.conv2" for stage in (1, 2, 3) for k in range(3)]
    assert first["producers"] == ["conv1", *every]
    assert [f["entry"] for f in found["frozen"]] == ["linear.weight"]
    assert found["model"] == "resnet20"


def test_inspect_tells_about_layers() -> None:
    output = succeed(
        *("inspect", "resnet20", *NARROW, "--input", "1x1x8x8"),
        *("--layer", "layer2.1.conv2", "--layer", "linear"),
    )
    assert "layer2.1.conv2\n  makes group 'conv1': 4 channels\n" in output
    assert "  makes group 'layer2.0.conv2': 4 channels\n" in output
    assert re.search(r"layer2\.2\.conv2 .* -- add in 'layer2\.2' \(models\.py:\d+\) -- ", output)
    assert "keeps 10 channels (linear.weight dim 0, linear.bias dim 0) that must stay" in output


def test_inspect_follows_a_model_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inspected_networks.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    spec = "inspected_networks:network"
    assert "--input: needed for 'inspected_networks:network'" in fail("inspect", spec)
    assert "1 groups; 8 of 10 output" in succeed("inspect", spec, "--input", "2x3x8x8")
    assert "--input: expected positive integers" in fail("inspect", spec, "--input", "2x3xa")
    assert "expected a torch dtype" in fail("inspect", spec, "--input", "2x3x8x8:floaty")
    wrong = fail("inspect", spec, "--input", "2x4x8x8")
    assert "while tracing" in wrong
    layer = ("--input", "2x3x8x8", "--layer", "00")
    assert "name '00' is no module or parameter of the model" in fail("inspect", spec, *layer)


def test_inspect_knows_what_models_of_a_family_take() -> None:
    output = succeed("inspect", "torchvision:squeezenet1_1")
    assert "on meta tensors" in output
    assert "torchvision has no model named 'resnet19' (did you mean" in fail(
        "inspect", "torchvision:resnet19"
    )


def test_inspect_models_of_timm() -> None:
    pytest.importorskip("timm")
    assert "output channels may go" in succeed("inspect", "timm:resnet18")
    assert "did you mean 'resnet" in fail("inspect", "timm:resnet18x")


@pytest.mark.parametrize("spec", ["hf:bert", "hf:vit:AutoModelForImageClassification", "hf:t5"])
def test_inspect_models_of_transformers(spec: str) -> None:
    pytest.importorskip("transformers")
    size = ("--model-arg", "num_hidden_layers=2", "--model-arg", "num_layers=2")
    output = succeed("inspect", spec, *size)
    assert "output channels may go" in output
    assert " 0 of " not in output


def test_inspect_gives_weights_to_a_model_that_looks_at_values() -> None:
    """Longformer asks whether any token has global attention: the meta device cannot say."""
    pytest.importorskip("transformers")
    size = ("--model-arg", "num_hidden_layers=1", "--model-arg", "attention_window=[8]")
    assert "on real tensors" in succeed("inspect", "hf:longformer", *size)


def test_models_of_transformers_that_do_not_exist() -> None:
    pytest.importorskip("transformers")
    assert "no model type 'beert' (did you mean 'bert'" in fail("inspect", "hf:beert")
    assert "no auto class 'AutoNothing'" in fail("inspect", "hf:bert:AutoNothing")
    assert "no auto class 'BertModel'" in fail("inspect", "hf:bert:BertModel")
    twice = ("--input", "1x8", "--input", "1x8")
    assert "expected the shape of 'input_ids' alone" in fail("inspect", "hf:bert", *twice)


def test_a_transformers_folder_is_a_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.BertConfig(
        num_hidden_layers=1, hidden_size=48, num_attention_heads=4
    ).to_json_file(tmp_path / "config.json")
    model = build_model(f"hf:{tmp_path}", on_meta=True)
    assert all(p.is_meta for p in model.parameters())
    assert model.config.hidden_size == 48
    assert not next(build_model(f"hf:{tmp_path}").parameters()).is_meta


@pytest.mark.parametrize(("package", "spec"), [("timm", "timm:x"), ("transformers", "hf:bert")])
def test_a_package_that_is_missing(
    package: str, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = fail("inspect", spec)
    assert f"needs the package {package}" in message
    assert "pip install 'chanprune_ext[models]'" in message


def test_mistakes_read_as_one_message(
    tmp_path: Path, narrow_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("here first")
    narrow = ("resnet20", *NARROW, "--input-shape", "1,1,8,8")
    out = ("--out", "out.safetensors")

    assert "no model named 'resnet21'" in fail("prune", "resnet21", *out)
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


def test_a_result_that_can_not_be_written_shows_before_the_work(
    tmp_path: Path, narrow_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worked(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    for command, work in (
        *(("prune", "plan"), ("recover", "train_back")),
        *(("evaluate", "measure"), ("sensitivity", "measure")),
    ):
        monkeypatch.setattr(sys.modules[f"chanprune_ext.cli.{command}"], work, worked)
    (tmp_path / "folder").mkdir()
    common = (*NARROW, "--weights", narrow_weights, "--data", "digits")
    for command, option in (
        *(("prune", "--out"), ("recover", "--out"), ("sensitivity", "--out")),
        ("evaluate", "--json"),
    ):
        message = fail(command, "resnet20", *common, option, tmp_path / "folder")
        assert "it is a folder" in message
    shut = fail("export", narrow_weights, "--out", "/proc/a.pt2")
    assert "/proc: no file can be made there" in shut


def test_paths_with_brackets_are_printed_as_they_are(tmp_path: Path) -> None:
    out = tmp_path / "run[x]" / "a[" / "b]" / "m.safetensors"
    model = ("resnet20", *NARROW, "--input-shape", "1,1,8,8", "--ratio", "0.5")
    assert f"model: {out}" in succeed("prune", *model, "--out", out)
    assert "run[x]/a[/b]/m" in succeed("verify", out).replace("\n", "")


def test_terminals_that_know_ascii_alone(narrow_weights: Path) -> None:
    arguments = ("evaluate", "resnet20", *NARROW, "--weights", narrow_weights, "--data", "digits")
    result = CliRunner(charset="ascii").invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert re.search(r"top-1 +\d+\.\d+ \? \d", result.output)


def test_test_images_are_labelled_as_the_training_images(tmp_path: Path) -> None:
    train = write_folder(tmp_path / "train", {f"{c}/0.jpg": jpeg(0) for c in "abc"})
    test = write_folder(tmp_path / "test", {f"{c}/0.jpg": jpeg(0) for c in "ac"})
    classes = classes_of_test(str(train), str(test), None)
    assert open_images(str(test), "test", classes).labels.tolist() == [0, 2]
    # The published job labels them likewise.
    images = ImageNetImages(str(train), str(test))
    assert images.test().labels.tolist() == [0, 2]
    assert images.training().labels.tolist() == [0, 1, 2]
    write_folder(test, {"d/0.jpg": jpeg(0)})
    with pytest.raises(DataError, match=r"'d' .* the 3 names of the training images"):
        open_images(str(test), "test", classes)
    assert classes_of_test(str(train), "digits", None) is None
    assert classes_of_test("digits", str(test), None) is None
    common = ("evaluate", "resnet20", "--data", test, "--image-size", "32")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert "warning: the model has 10 classes, the images 3" in run(*common).stderr
    (tmp_path / "classes.txt").write_text("\n".join("abcdefghij"))
    succeed(*common, "--class-file", tmp_path / "classes.txt")


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
    with pytest.raises(ChanpruneError, match="--input"):
        parse_shape(text)

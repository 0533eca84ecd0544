"""Pruned models in other formats, checked by running them; files checked by themselves."""

from __future__ import annotations

import json
import resource
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import chanprune_ext as cpx
from chanprune_ext.cli import app
from chanprune_ext.errors import ExportError, InvalidArgumentError, OutputError
from chanprune_ext.export import export
from chanprune_ext.file_checks import check_file, check_model
from chanprune_ext.models import CifarResNet, resnet56

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SUFFIXES = {"torch-export": ".pt2", "torchscript": ".ts", "onnx": ".onnx"}
# The module, not the function of the same name that the package offers.
EXPORT = sys.modules["chanprune_ext.export"]


def small() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 5)).eval()


def need_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)


def check_all_formats(
    make: Callable[[], nn.Module],
    inputs: Any,
    folder: Path,
    formats: tuple[str, ...] = tuple(SUFFIXES),
    **options: Any,
) -> None:
    """Save, load and export a pruned model; each must compute what it computes."""
    torch.manual_seed(0)
    model = make().eval()
    pruned = cpx.prune(model, inputs, 0.5, **options)
    cpx.save(pruned, folder / "a.safetensors")
    loaded = cpx.load(folder / "a.safetensors", make()).eval()
    for name, tensor in pruned.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert all(check.passed for check in check_file(folder / "a.safetensors"))
    for kind in formats:
        found = export(loaded, inputs, folder / f"a{SUFFIXES[kind]}")
        assert found.error <= 1e-4
        assert found.format == kind


@pytest.mark.parametrize("kind", ["torch-export", "torchscript"])
def test_small_models(kind: str, tmp_path: Path) -> None:
    x = torch.randn(1, 3, 8, 8)
    pruned = cpx.prune(small(), x, 0.5).train()
    found = export(pruned, x, tmp_path / "a.bin", format=kind)
    assert pruned.training
    assert found.dynamic_batch
    assert found.error < 1e-6
    assert found.bytes == (tmp_path / "a.bin").stat().st_size
    assert [f.name for f in tmp_path.iterdir()] == ["a.bin"]


def test_small_model_as_onnx(tmp_path: Path) -> None:
    need_onnx()
    import onnxruntime

    x = torch.randn(1, 3, 8, 8)
    pruned = cpx.prune(small(), x, 0.5)
    found = export(pruned, x, tmp_path / "a.onnx")
    assert found.dynamic_batch
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    more = torch.randn(7, 3, 8, 8)
    (result,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    assert torch.allclose(torch.from_numpy(result), pruned(more), atol=1e-4)


@pytest.mark.slow
def test_weights_too_large_for_one_file_lie_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_onnx()
    import onnxruntime

    monkeypatch.setattr(EXPORT, "_LARGEST_PROTOBUF", 0)
    x = torch.randn(1, 3, 8, 8)
    found = export(small(), x, tmp_path / "a.onnx")
    files = sorted(tmp_path.iterdir())
    assert [f.name for f in files] == ["a.onnx", "a.onnx.data"]
    assert found.bytes == sum(f.stat().st_size for f in files)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(result), small()(x), atol=1e-4)


@pytest.mark.parametrize("suffix", [".pt2", ".ts"])
def test_of_a_wrapped_model_the_one_inside_is_written(tmp_path: Path, suffix: str) -> None:
    model, x = small().eval(), torch.randn(2, 3, 8, 8)
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    found = export(wrapped, x, tmp_path / f"small{suffix}")
    assert found.dynamic_batch, found.note
    program = (
        torch.export.load(found.path).module() if suffix == ".pt2" else torch.jit.load(found.path)
    )
    assert {name for name, _ in program.named_parameters()} == dict(model.named_parameters()).keys()


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(2, 8))


def test_a_batch_that_must_stay_is_told(tmp_path: Path) -> None:
    found = export(FixedBatch().eval(), torch.randn(2, 8), tmp_path / "a.pt2")
    assert not found.dynamic_batch
    assert "batch size" in found.note


@pytest.mark.parametrize("suffix", [".pt2", ".ts"])
def test_a_batch_that_a_script_can_not_change_is_told(tmp_path: Path, suffix: str) -> None:
    found = export(FixedBatch().eval(), torch.randn(2, 8), tmp_path / f"a{suffix}")
    assert not found.dynamic_batch
    assert found.note


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x).masked_fill(torch.arange(6) > 3, float("-inf"))


def test_logits_masked_by_infinity_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Masked().eval(), torch.randn(2, 8)
    assert export(model, x, tmp_path / "a.pt2").error < 1e-6
    assert model.calls == 0  # left as it was
    with torch.no_grad():
        finite = model(x).clone()
    finite[0, 0] += 1
    monkeypatch.setattr(EXPORT, "_run_program", lambda path, inputs: [finite])
    with pytest.raises(ExportError, match="computes something else"):
        export(model, x, tmp_path / "a.pt2", dynamic_batch=False)


@pytest.mark.parametrize("suffix", [".pt2", ".ts"])
def test_a_really_full_disk_is_told(tmp_path: Path, suffix: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(OutputError, match="has room"):
            export(small(), torch.randn(1, 3, 8, 8), tmp_path / f"a{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_what_a_link_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a.ts").symlink_to(tmp_path / "elsewhere" / "b.ts")
    export(small(), torch.randn(1, 3, 8, 8), tmp_path / "a.ts")
    assert (tmp_path / "a.ts").is_symlink()
    assert torch.jit.load(tmp_path / "elsewhere" / "b.ts")(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_keyword_and_several_inputs(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Bilinear(3, 4, 2)

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"out": self.layer(a, b)}

    a, b = torch.randn(2, 3), torch.randn(2, 4)
    assert export(Two(), (a, b), tmp_path / "a.pt2").dynamic_batch
    assert export(Two(), {"a": a, "b": b}, tmp_path / "b.pt2").dynamic_batch


def test_a_file_that_computes_something_else_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(path: Path, inputs: Any) -> list[Tensor]:
        return [torch.ones(1, 5)]

    monkeypatch.setattr(EXPORT, "_run_program", wrong)
    (tmp_path / "a.pt2").write_text("old")
    with pytest.raises(ExportError, match="computes something else: relative difference"):
        export(small(), torch.randn(1, 3, 8, 8), tmp_path / "a.pt2", dynamic_batch=False)
    assert [f.name for f in tmp_path.iterdir()] == ["a.pt2"]
    assert (tmp_path / "a.pt2").read_text() == "old"


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if float(x.sum()) > 0 else x


def test_models_that_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="can't be exported as torch-export: "):
        export(Branching(), torch.ones(2, 3), tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())


def test_bad_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(InvalidArgumentError, match=r"can't be told from 'a\.tflite'"):
        export(small(), x, tmp_path / "a.tflite")
    with pytest.raises(InvalidArgumentError, match="format must be one of"):
        export(small(), x, tmp_path / "a", format="tflite")
    with pytest.raises(InvalidArgumentError, match="got meta tensors"):
        export(small().to("meta"), x, tmp_path / "a.pt2")
    with pytest.raises(OutputError, match="it is a folder"):
        export(small(), x, tmp_path, format="torchscript")
    with pytest.raises(OutputError, match="check that the folder exists"):
        export(small(), x, tmp_path / "no" / "a.ts")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    pytest.importorskip("onnx")
    with pytest.raises(InvalidArgumentError, match=r"pip install 'chanprune_ext\[export\]'"):
        export(small(), x, tmp_path / "a.onnx")


def test_resnet56(tmp_path: Path) -> None:
    check_all_formats(resnet56, torch.randn(1, 3, 32, 32), tmp_path, ("torchscript",))


def tiny_llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config.use_cache = False
    return transformers.LlamaForCausalLM(config)


@pytest.mark.slow
def test_llama(tmp_path: Path) -> None:
    need_onnx()
    tokens = {"input_ids": torch.randint(0, 96, (1, 12))}
    check_all_formats(tiny_llama, tokens, tmp_path, outputs=lambda out: out.logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet56", "mobilenet_v2", "resnet50", "vit_b_16"])
def test_networks_of_the_field(name: str, tmp_path: Path) -> None:
    need_onnx()
    import torchvision

    side = 32 if name == "resnet56" else 224
    make = resnet56 if name == "resnet56" else getattr(torchvision.models, name)
    check_all_formats(make, torch.randn(1, 3, side, side), tmp_path)


# -- checks of files -----------------------------------------------------------------------------


def by_name(checks: list[Any]) -> dict[str, Any]:
    return {check.name: check for check in checks}


def test_a_whole_file_passes(tmp_path: Path) -> None:
    model, x = CifarResNet(8, width=8).eval(), torch.randn(2, 3, 16, 16)
    twice = cpx.prune(cpx.prune(model, x, 0.25), x, 0.5)
    cpx.save(twice, tmp_path / "a")
    found = by_name(check_file(tmp_path / "a"))
    assert all(check.passed for check in found.values())
    assert "2 prunings" in found["plan"].detail
    cpx.save(model, tmp_path / "b")
    assert by_name(check_file(tmp_path / "b"))["plan"].passed is None


def rewritten(source: Path, target: Path, change: Callable[[dict, dict], None]) -> Path:
    with safe_open(source, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, target, metadata)
    return target


def test_damaged_files_fail(tmp_path: Path) -> None:
    model, x = CifarResNet(8, width=8).eval(), torch.randn(2, 3, 16, 16)
    once = cpx.prune(model, x, 0.25)
    good = tmp_path / "good"
    cpx.save(cpx.prune(once, x, 0.5), good)

    def not_finite(tensors: dict, metadata: dict) -> None:
        tensors["linear.bias"][3] = float("nan")

    checks = by_name(check_file(rewritten(good, tmp_path / "a", not_finite)))
    assert (checks["weights"].passed, checks["weights"].detail) == (
        False,
        "not finite: linear.bias",
    )

    def misshapen(tensors: dict, metadata: dict) -> None:
        tensors["conv1.weight"] = tensors["conv1.weight"][:2].clone()

    checks = by_name(check_file(rewritten(good, tmp_path / "a", misshapen)))
    assert checks["plan"].passed is False
    assert "'conv1.weight' has shape [2, 3, 3, 3], the plan leaves" in checks["plan"].detail

    def missing(tensors: dict, metadata: dict) -> None:
        del tensors["conv1.weight"]

    checks = by_name(check_file(rewritten(good, tmp_path / "a", missing)))
    assert "'conv1.weight' is in the plan and not in the file" in checks["plan"].detail

    def swapped(tensors: dict, metadata: dict) -> None:
        metadata["plans"] = json.dumps(json.loads(metadata["plans"])[::-1])

    checks = by_name(check_file(rewritten(good, tmp_path / "a", swapped)))
    assert "plan 2 begins with" in checks["plan"].detail

    def no_plan(tensors: dict, metadata: dict) -> None:
        metadata["plans"] = "[{}]"

    checks = check_file(rewritten(good, tmp_path / "a", no_plan))
    assert [(c.name, c.passed) for c in checks] == [("file", False)]
    (tmp_path / "cut").write_bytes(good.read_bytes()[:1000])
    assert [c.passed for c in check_file(tmp_path / "cut")] == [False]


def test_a_rebuilt_model_is_held_against_the_original() -> None:
    model, x = small(), torch.randn(2, 3, 8, 8)
    pruned = cpx.prune(model, x, 0.5)
    checks = by_name(check_model(model, pruned, x, original=True))
    assert checks["exact"].passed
    assert checks["forward"].detail == "returns 2x5"
    assert "exact" not in by_name(check_model(model, pruned, x, original=False))

    with torch.no_grad():
        pruned[5].bias.add_(1)
    checks = by_name(check_model(model, pruned, x, original=True))
    assert checks["original"].passed is None
    assert "1 of " in checks["original"].detail

    with torch.no_grad():
        pruned[5].bias.fill_(float("inf"))
    assert by_name(check_model(model, pruned, x, original=False))["forward"].passed is False


def test_verify_and_export_commands(tmp_path: Path) -> None:
    runner = CliRunner()
    file, weights = tmp_path / "small.safetensors", tmp_path / "original.safetensors"
    narrow = ["--model-arg", "width=4"]
    save_file(CifarResNet(20, width=4).state_dict(), weights)
    arguments = ["--weights", str(weights), "--input-shape", "1,3,16,16", "--out", str(file)]
    made = runner.invoke(app, ["prune", "resnet20", *narrow, *arguments])
    assert made.exit_code == 0, made.output

    found = runner.invoke(app, ["verify", str(file), "--weights", str(weights)])
    assert found.exit_code == 0, found.output
    assert "equals the original with the removed channels zeroed" in " ".join(found.output.split())
    wrong = runner.invoke(app, ["verify", str(file), "--model", "resnet32"])
    assert wrong.exit_code == 2
    assert "parameter 'conv1.weight' is [16, 3, 3, 3], the plan expects [4" in wrong.output

    out = tmp_path / "new" / "small.ts"
    found = runner.invoke(app, ["export", str(file), "--out", str(out), "--input", "2x3x16x16"])
    assert found.exit_code == 0, found.output
    assert torch.jit.load(str(out))(torch.zeros(3, 3, 16, 16)).shape == (3, 10)
    wrong = runner.invoke(app, ["export", str(file), "--out", str(tmp_path / "a.bin")])
    assert wrong.exit_code == 2
    assert "can't be told from 'a.bin'" in wrong.output

    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(file.read_bytes()[:500])
    wrong = runner.invoke(app, ["verify", str(broken)])
    assert wrong.exit_code == 1
    assert "failed" in wrong.output
    plain = tmp_path / "plain.safetensors"
    cpx.save(cpx.prune(small(), torch.zeros(1, 3, 8, 8)), plain)
    found = runner.invoke(app, ["verify", str(plain)])
    assert found.exit_code == 0
    assert "give --model" in found.output

"""The examples run, do what they say, and stay short."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import chanprune_ext as cpx
from chanprune_ext.models import resnet20

FOLDER = Path(__file__).parents[1] / "examples"
FILES = sorted(FOLDER.glob("*.py"))


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_fewer_than_forty_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 40


def small_network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 4))


def test_timm_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timm = pytest.importorskip("timm")
    found = example("timm_model").main("resnet10t", str(tmp_path / "small.safetensors"))
    assert "MACs: " in capsys.readouterr().out
    plan = cpx.plan_of(found)
    assert plan is not None
    assert 0.4 < plan.macs_after / plan.macs_before <= 0.5
    plain = timm.create_model("resnet10t", num_classes=10)
    assert sum(p.numel() for p in found.parameters()) < sum(p.numel() for p in plain.parameters())
    assert torch.isfinite(found(torch.randn(1, 3, 176, 176))).all()


@pytest.mark.filterwarnings("ignore")
def test_lightning_callback(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.randn(16, 3, 8, 8), torch.randint(0, 4, (16,)))
    net = small_network()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    example("lightning_callback").main(
        net,
        DataLoader(data, batch_size=4),
        epochs=2,
        accelerator="cpu",
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **quiet,
    )
    assert net[0].out_channels == 8
    assert cpx.plan_of(net) is not None
    # It went on training what is left: those are not the weights of the cut any more.
    cut = cpx.plan_of(net).apply(small_network())
    assert not torch.equal(net[0].weight, cut[0].weight)


def test_several_gpus(tmp_path: Path) -> None:
    """On two CPU processes, as a user starts it."""
    pytest.importorskip("sklearn")
    file = tmp_path / "recovered.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--local-addr", "127.0.0.1"]  # a host's own name can't be looked up everywhere
    command += [str(FOLDER / "several_gpus.py"), "digits", "1", str(file)]
    paths = os.pathsep.join([str(FOLDER.parent), *sys.path])
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Of 1437 images 44 batches of 32 are full, 22 for each.
    assert done.stdout.count("1408 images an epoch") == 1
    assert cpx.plan_of(cpx.load(file, resnet20(10, 1))) is not None
    assert len(list(Path(f"{file}.checkpoints").iterdir())) == 2


@pytest.mark.filterwarnings("ignore")
def test_trainer_callback(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    model = transformers.BertForSequenceClassification(config)
    rows = [{"input_ids": torch.randint(0, 50, (6,)), "labels": k % 2} for k in range(16)]
    tokens = {"input_ids": torch.randint(0, 50, (2, 6))}
    trainer = example("trainer_callback").main(model, rows, tokens, str(tmp_path), steps=4)
    layer = trainer.model.bert.encoder.layer[0]
    assert layer.intermediate.dense.out_features == 32
    assert layer.attention.self.query.out_features == 16
    assert trainer.state.global_step == 4
    loaded = cpx.load(
        tmp_path / "small.safetensors", transformers.BertForSequenceClassification(config)
    )
    assert torch.equal(loaded.eval()(**tokens).logits, model.eval()(**tokens).logits)

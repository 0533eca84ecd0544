"""Types of arithmetic: their names, and a word where a processor has no instructions for one."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import chanprune_ext as cpx
from chanprune_ext import precision
from chanprune_ext.checkpoint import save
from chanprune_ext.cli import app
from chanprune_ext.cli.options import Precision
from chanprune_ext.models import resnet20
from chanprune_ext.precision import AUTOCAST_DTYPES, in_software
from chanprune_ext.reconstruction import reconstruct
from chanprune_ext.recovery import recover

CPU_INFO = Path("/proc/cpuinfo")
HALVES = (torch.bfloat16, torch.float16)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


@pytest.fixture
def nothing_in_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_has_instructions", lambda _: False)


def test_the_command_line_offers_every_type() -> None:
    assert [choice.value for choice in Precision] == list(AUTOCAST_DTYPES)


@pytest.mark.skipif(
    not CPU_INFO.exists() or "avx2" not in CPU_INFO.read_text(), reason="not Linux on x86"
)
def test_what_this_processor_has() -> None:
    flags = CPU_INFO.read_text().split()
    if "avx512_bf16" in flags:
        assert in_software("cpu", torch.bfloat16) is None
    if "avx512bw" not in flags:  # oneDNN works on halves by AVX-512, and only by that
        assert "bfloat16" in (in_software("cpu", None, torch.bfloat16) or "")
        assert "float16" in (in_software("cpu", None, torch.float16) or "")


@pytest.mark.usefixtures("nothing_in_hardware")
def test_nothing_is_said_of_float32_and_of_other_devices() -> None:
    assert in_software("cpu", None, None) is None
    assert in_software("cuda", *HALVES) is None


@pytest.mark.usefixtures("nothing_in_hardware")
@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"teacher_precision": "bf16"}])
def test_recovery_warns(settings: dict[str, str]) -> None:
    data = [(torch.randn(4, 3, 8, 8), torch.arange(4))]
    with pytest.warns(UserWarning, match="bfloat16 in software") as caught:
        recover(network(), network(), train=data, epochs=1, progress=False, **settings)
    assert caught[0].filename == __file__  # the line that asked for it
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        recover(network(), network(), train=data, epochs=1, progress=False)


@pytest.mark.usefixtures("nothing_in_hardware")
def test_reconstruction_warns() -> None:
    original, images = network(), torch.randn(8, 3, 8, 8)
    pruned = cpx.plan(original, images[:1], ratio=0.5).apply(original)
    with pytest.warns(UserWarning, match="float16 in software") as caught:
        reconstruct(pruned, original, images, epochs=1, amp=torch.float16, progress=False)
    assert caught[0].filename == __file__


@pytest.mark.usefixtures("nothing_in_hardware")
@pytest.mark.parametrize("debug", [False, True])
def test_the_command_line_warns_in_a_line(debug: bool, tmp_path: Path) -> None:
    save(resnet20(in_channels=1, width=4), tmp_path / "network.safetensors")
    network = ("--model-arg", "in_channels=1", "--model-arg", "width=4", "--data", "digits")
    files = ("--weights", tmp_path / "network.safetensors", "--out", tmp_path / "out.safetensors")
    run = ("--epochs", "1", "--batch-size", "1024", "--precision", "bf16")
    before = warnings.showwarning
    command = ("recover", "resnet20", *network, *files, *run)
    if debug:
        with pytest.warns(UserWarning, match="in software"):
            result = CliRunner().invoke(app, ["--debug", *map(str, command)])
    else:
        result = CliRunner().invoke(app, [str(word) for word in command])
        line = next(line for line in result.stderr.splitlines() if "in software" in line)
        assert line.startswith("warning: this processor computes bfloat16 in software")
        assert line.endswith("use precision='fp32' (--precision fp32)")
        assert "recover.py" not in result.stderr
    assert result.exit_code == 0, result.output
    assert warnings.showwarning is before

"""The CIFAR residual networks: sizes, key names, the published weights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from chanprune_ext.checkpoint import load_weights
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.models import CIFAR_RESNETS, CifarResNet, PadShortcut, resnet56

DATA = Path(os.environ.get("CHANPRUNE_DATA", Path(__file__).parents[2] / "shared/data"))
WEIGHTS = DATA / "resnet56-cifar10.safetensors"


@pytest.mark.parametrize(
    ("name", "parameters"),  # He et al. 2016, table 6: 0.27, 0.46, 0.66, 0.85 and 1.7 M
    [
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet44", 658_586),
        ("resnet56", 853_018),
        ("resnet110", 1_727_962),
    ],
)
def test_sizes_are_those_of_the_paper(name: str, parameters: int) -> None:
    model = CIFAR_RESNETS[name]()
    assert sum(p.numel() for p in model.parameters()) == parameters
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == int(name.removeprefix("resnet"))


def test_shapes_for_grey_images_other_classes_and_odd_sizes() -> None:
    model = CifarResNet(8, num_classes=7, in_channels=1, width=5).eval()
    for edge in (8, 9, 32):
        assert model(torch.zeros(2, 1, edge, edge)).shape == (2, 7)


def test_shortcut_puts_zeros_in_front_and_behind() -> None:
    x = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4)
    out = PadShortcut(1, 2)(x)
    assert out.shape == (2, 6, 2, 2)
    assert torch.equal(out[:, 1:4], x[:, :, ::2, ::2])
    assert not out[:, :1].any()
    assert not out[:, 4:].any()


def test_shortcut_amounts_fill_up_to_the_next_stage() -> None:
    model = CifarResNet(8, width=5)
    pads = [m for m in model.modules() if isinstance(m, PadShortcut)]
    assert [(m.pad_front, m.pad_back) for m in pads] == [(2, 3), (5, 5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 21}, "depth: expected 6n"),
        ({"depth": 2}, "depth: expected 6n"),
        ({"depth": 8, "num_classes": 0}, "num_classes: expected a positive number, got 0"),
        ({"depth": 8, "in_channels": -1}, "in_channels"),
        ({"depth": 8, "width": 0}, "width"),
    ],
)
def test_impossible_sizes_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        CifarResNet(**arguments)


@pytest.mark.skipif(not WEIGHTS.exists(), reason=f"no {WEIGHTS.name} in CHANPRUNE_DATA")
def test_keys_and_shapes_are_those_of_published_weights() -> None:
    model = load_weights(resnet56(), WEIGHTS)
    with safe_open(WEIGHTS, framework="pt") as file:
        stored = set(file.keys())
        assert torch.equal(model.state_dict()["linear.bias"], file.get_tensor("linear.bias"))
    assert stored == {k for k in model.state_dict() if not k.endswith("num_batches_tracked")}

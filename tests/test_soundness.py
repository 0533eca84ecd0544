"""Masks of -inf are no broken weights: such models are pruned, trained and saved like others."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext.data import TensorImages
from chanprune_ext.file_checks import check_file
from chanprune_ext.soundness import is_sound

if TYPE_CHECKING:
    from pathlib import Path


class Masked(nn.Module):
    """A classifier with one layer of causal attention over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Linear(24, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.hidden, self.classes = nn.Linear(16, 32), nn.Linear(32, 3)
        self.register_buffer("mask", torch.full((8, 8), -math.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.transpose(1, 2).flatten(2))
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights = (0.5 * q @ k.mT + self.mask).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        out: Tensor = self.classes(self.hidden(x.mean(1)).relu())
        return out


def test_a_model_with_a_mask(tmp_path: Path) -> None:
    model, x = Masked().eval(), torch.randn(8, 3, 8, 8)
    pruned = cpx.prune(model, x, 0.5, verify="numeric")
    assert pruned.hidden.out_features == 16
    cpx.compensate(pruned, model, [x, torch.randn(8, 3, 8, 8)])
    images = torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8)
    data = TensorImages(images, torch.arange(32) % 3, "abc", (0.5,) * 3, (0.5,) * 3)
    result = cpx.recover(pruned, model, train=data, val=data, epochs=1, device="cpu")
    assert math.isfinite(result.history[-1].loss)
    cpx.save(pruned, tmp_path / "masked.safetensors")
    assert torch.equal(cpx.load(tmp_path / "masked.safetensors", Masked()).eval()(x), pruned(x))
    assert all(check.passed for check in check_file(tmp_path / "masked.safetensors"))


@pytest.mark.parametrize(
    ("name", "values", "parameter", "sound"),
    [
        ("mask", [0.5, -math.inf], False, True),
        ("mask", [0.0, -math.inf], True, True),
        ("weight", [0.5, 0.0, -math.inf], True, False),
        ("weight", [-math.inf, -math.inf], True, False),
        ("weight", [0.0, math.inf], True, False),
        ("mask", [0.0, math.inf], False, False),
        ("mask", [math.inf, math.inf], False, False),
        ("input_max", math.inf, False, True),
        ("input_max", math.nan, False, False),
        ("input_max", math.inf, True, False),
        ("bn.running_var", math.inf, False, False),
        ("mask", [0.0, math.nan], False, False),
        ("bn.running_var", [0.0, -math.inf], False, False),
        ("mask", [0.0, 1.0], True, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinity_is_meant_in_masks(
    name: str, values: list[float] | float, parameter: bool, sound: bool, dtype: torch.dtype
) -> None:
    assert is_sound(name, torch.tensor(values, dtype=dtype), parameter=parameter) is sound


def test_other_dtypes() -> None:
    assert is_sound("a", torch.tensor([1, 2]))
    assert is_sound("a", torch.ones(2).to(torch.float8_e5m2))
    assert not is_sound("a", torch.tensor([math.nan]).to(torch.float8_e4m3fn))
    assert not is_sound("a", torch.tensor([complex(-math.inf, 0)]))
    assert not is_sound("a", nn.Parameter(torch.tensor([-math.inf])))

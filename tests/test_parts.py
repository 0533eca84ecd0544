"""Models of which a part was pruned on its own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext.allocation.saved_size import saved_bytes
from chanprune_ext.checkpoint import load_weights
from chanprune_ext.errors import CheckpointError, InvalidArgumentError
from chanprune_ext.file_checks import check_file, check_model

if TYPE_CHECKING:
    from pathlib import Path

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Whole(nn.Module):
    def __init__(self, backbone: nn.Module | None = None) -> None:
        super().__init__()
        convolutions = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1)
        self.backbone = backbone or nn.Sequential(*convolutions)
        self.head = nn.Sequential(nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)).mean((2, 3))


def whole(seed: int = 0) -> Whole:
    torch.manual_seed(seed)
    return Whole().eval()


def with_pruned_backbone(ratio: float = 0.5) -> Whole:
    model = whole()
    model.backbone = cpx.prune(model.backbone, X, ratio)
    return model


def assert_same_after_loading(model: nn.Module, plain: nn.Module, path: Path) -> None:
    cpx.save(model, path)
    assert saved_bytes(model) == path.stat().st_size
    before = copy.deepcopy(plain.state_dict())
    loaded = cpx.load(path, plain)
    assert torch.equal(loaded(X), model(X))
    assert all(torch.equal(before[name], value) for name, value in plain.state_dict().items())
    cpx.save(loaded, path)  # the plans came along
    assert torch.equal(cpx.load(path, whole(2))(X), model(X))


def test_a_pruned_part_is_rebuilt(tmp_path: Path) -> None:
    model = with_pruned_backbone()
    assert model.backbone[0].out_channels == 8
    assert_same_after_loading(model, whole(1), tmp_path / "a.safetensors")


def test_plans_of_a_part_and_of_the_whole_in_any_order(tmp_path: Path) -> None:
    model = with_pruned_backbone(0.25)
    model = cpx.prune(model, X, 0.25)
    cpx.prune(model.backbone, X, 0.25, inplace=True)
    assert model.backbone[0].out_channels == 7
    assert_same_after_loading(model, whole(1), tmp_path / "a.safetensors")
    cpx.prune(model, X, 0.5, inplace=True)
    assert_same_after_loading(model, whole(1), tmp_path / "a.safetensors")


def test_the_plain_model_may_be_built_around_a_pruned_part(tmp_path: Path) -> None:
    model = with_pruned_backbone()
    cpx.save(model, tmp_path / "a.safetensors")
    again = Whole(cpx.prune(whole(1).backbone, X, 0.5)).eval()
    assert torch.equal(cpx.load(tmp_path / "a.safetensors", again)(X), model(X))


def test_another_architecture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    cpx.save(with_pruned_backbone(), path)
    with pytest.raises(CheckpointError, match=r"no module 'backbone', which was pruned on its own"):
        cpx.load(path, nn.Linear(2, 2))
    other = Whole(nn.Sequential(nn.Conv2d(3, 8, 1))).eval()
    with pytest.raises(CheckpointError, match=r"the plan was made for another model"):
        cpx.load(path, other)
    with pytest.raises(CheckpointError, match=r"read it with chanprune_ext\.load"):
        load_weights(whole(), path)


def test_checks_of_a_file_name_the_parts(tmp_path: Path) -> None:
    model = cpx.prune(with_pruned_backbone(), X, 0.25)
    cpx.prune(model.backbone, X, 0.25, inplace=True)
    cpx.save(model, tmp_path / "a.safetensors")
    checks = check_file(tmp_path / "a.safetensors")
    assert all(check.passed is not False for check in checks)
    assert "backbone" in next(check.detail for check in checks if check.name == "parts")
    checks = check_model(whole(), model, X, original=True)
    assert all(check.passed for check in checks)


def test_compensation_finds_the_plan_of_a_part() -> None:
    model, batches = with_pruned_backbone(), [torch.randn(32, 3, 8, 8) for _ in range(4)]
    with torch.no_grad():
        before = (model(batches[0]) - whole()(batches[0])).norm()
        assert cpx.compensate(model, whole(), batches, progress=False).kept == "least_squares"
        assert (model(batches[0]) - whole()(batches[0])).norm() < before / 2
    with pytest.raises(InvalidArgumentError, match="reconstruct each part"):
        cpx.reconstruct(model, whole(), batches, progress=False)

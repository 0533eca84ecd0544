"""Arguments of a wrong kind, exchanged ones too: named, by errors of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import chanprune_ext as cpx
from chanprune_ext.bench import bench
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.export import export

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

X = torch.randn(4, 6)
BATCHES = [(X, torch.arange(4) % 3)]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def pruned() -> nn.Module:
    return cpx.prune(net(), X, 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cpx.plan(net(), X, criterion=cpx.elimination), r"criterion=elimination\(batches"),
        (lambda: cpx.plan(net(), X, criterion=cpx.criteria.taylor), r"criterion=taylor\(batches\)"),
        (lambda: cpx.prune_within(net(), X, [X] * 9, criterion=cpx.elimination), "=elimination"),
        (lambda: cpx.sensitivity(net(), X, BATCHES, ratios=0.5), "ratios: .* got 0.5"),
        (lambda: cpx.save("a.safetensors", net()), r"model: .* got str; call save\(model, path"),
        (lambda: cpx.save(net(), None), "path: .* got NoneType"),
        (lambda: cpx.load(net(), "a.safetensors"), r"plain_model: .* call load\(path, plain_mod"),
        (lambda: cpx.load("a.safetensors", nn.ReLU), "plain_model: .* got the class ReLU"),
        (lambda: cpx.recover(net(), train=BATCHES, recipe=3), "recipe: expected a Recipe, got int"),
        (lambda: cpx.recover(net(), train=BATCHES, device="cuda:99"), "device: 'cuda:99' is not"),
        (lambda: cpx.recover(net(), train=BATCHES, device="gpu"), "device: expected 'cpu'"),
        (lambda: cpx.sparsify(net(), 0.5, train=BATCHES), "plan: .* got float"),
        (lambda: cpx.reconstruct(pruned(), net(), [X], seed="a"), "seed: .* got 'a'"),
        (lambda: bench(pruned(), net(), X), r"call bench\(original, pruned"),
        (lambda: cpx.Recipe(epochs=2.5), "epochs: expected an integer, got 2.5"),
        (lambda: cpx.Recipe(batch_size=None), "batch_size: expected an integer, got None"),
        (lambda: cpx.Recipe(seed="a"), "seed: expected an integer, got 'a'"),
        (lambda: cpx.Recipe(lr="a"), "lr: expected a number, got 'a'"),
    ],
)
def test_arguments_of_a_wrong_kind(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        call()


def test_counts_of_numpy_are_integers() -> None:
    recipe = cpx.Recipe(epochs=np.int64(3))
    assert type(recipe.epochs) is int
    assert cpx.Recipe(patience=None, lr=1).patience is None


@pytest.mark.parametrize(
    ("inputs", "file", "options", "message"),
    [
        (torch.randn(4, 5), "a.ts", {}, "example_inputs: the model can't run on them .*shape"),
        (torch.randn(4, 5), "a.pt2", {}, "example_inputs: the model can't run on them"),
        (X, "a.ts", {"tolerance": -1}, "tolerance: expected a finite number >= 0, got -1"),
    ],
)
def test_what_export_does_not_take(
    tmp_path: Path, inputs: torch.Tensor, file: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        export(net(), inputs, tmp_path / file, **options)
    with pytest.raises(InvalidArgumentError, match=r"call export\(model, example_inputs, path\)"):
        export(net(), str(tmp_path / file), inputs)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_torch_does_not_run_fixes_the_size(tmp_path: Path) -> None:
    class Fixed(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).view(4, 3)

    found = export(Fixed(6, 3), X, tmp_path / "a.ts")
    assert not found.dynamic_batch
    assert "only the example's batch size works" in found.note

"""Copies of models that hold what has ways of its own of being copied, or cannot be."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext.copying import copied
from chanprune_ext.errors import InvalidArgumentError


def doubled(x: Tensor) -> Tensor:
    return torch.relu(x) * 2.0


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 1)
        self.b = nn.Conv2d(16, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class HoldsScripted(Plain):
    def __init__(self, *, listed: bool) -> None:
        super().__init__()
        scripted = torch.jit.script(doubled)
        self.act: Any = [scripted] if listed else scripted

    def forward(self, x: Tensor) -> Tensor:
        act = self.act[0] if isinstance(self.act, list) else self.act
        return self.b(act(self.a(x)))


class HoldsGraph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.fx.symbolic_trace(Plain())
        self.c = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.body(x).relu())


MODELS: dict[str, Any] = {
    "scripted function": lambda: HoldsScripted(listed=False),
    "listed scripted function": lambda: HoldsScripted(listed=True),
    "nested graph": HoldsGraph,
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("name", MODELS)
def test_is_pruned_compensated_and_reconstructed(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    images = torch.randn(16, 3, 5, 5)
    before = model(images)
    pruned = cpx.plan(model, images[:2], 0.5).apply(model, verify="numeric")
    batches = [images[:8], images[8:]]
    cpx.compensate(pruned, model, batches)
    cpx.reconstruct(pruned, model, batches)
    assert torch.equal(model(images), before)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())


def test_a_copied_graph_has_parameters_of_its_own() -> None:
    model = HoldsGraph()
    copy = copied(model)
    assert list(dict(copy.named_parameters())) == list(dict(model.named_parameters()))
    originals = {id(p) for p in model.parameters()}
    assert not any(id(p) in originals for p in copy.parameters())
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(copy(x), model(x))


def test_the_error_names_what_cannot_be_copied() -> None:
    model = nn.Sequential(Plain(), nn.ReLU())
    model[0].lock = threading.Lock()
    with pytest.raises(InvalidArgumentError, match=r"attribute 'lock' of '0': .*inplace=True"):
        copied(model)

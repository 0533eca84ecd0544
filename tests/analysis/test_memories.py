"""What code remembers beside its modules: neither found by an analysis nor left behind by one."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chanprune_ext as cpx

TABLES: dict[int, Tensor] = {}
X = torch.randn(2, 3, 6, 6)


@functools.lru_cache(maxsize=64)
def split_shape(batch: int, channels: int, height: int, width: int) -> tuple[int, ...]:
    return batch, 4, channels // 4, height, width


@functools.lru_cache(maxsize=64)
def ramp(channels: int) -> Tensor:
    return torch.arange(channels).float()[:, None, None]


@functools.lru_cache(maxsize=64)
def label_of(channels: int) -> object:
    return object()


class Net(nn.Module):
    """A convolution, something that remembers, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.between(self.first(x)))
        return out

    def between(self, h: Tensor) -> Tensor:
        raise NotImplementedError


class Shapes(Net):
    def between(self, h: Tensor) -> Tensor:
        parts = h.reshape(split_shape(*h.shape))
        return (parts * parts.sigmoid()).flatten(1, 2)


class Tables(Net):
    def between(self, h: Tensor) -> Tensor:
        return h + ramp(h.shape[3])[:, 0, 0]


class Windowed(Net):
    def window(self, size: int) -> Tensor:
        raise NotImplementedError

    def between(self, h: Tensor) -> Tensor:
        return h * self.window(h.shape[-1])


class OfClass(Windowed):
    @functools.lru_cache(maxsize=8)  # noqa: B019 - what people write
    def window(self, size: int) -> Tensor:
        return torch.hann_window(size)


class OfModule(Windowed):
    """As ``compile_compatible_method_lru_cache`` of transformers does it."""

    def window(self, size: int) -> Tensor:
        if "cached" not in self.__dict__:
            self.cached = functools.lru_cache(maxsize=8)(self.make)
        found: Tensor = self.cached(size)
        return found

    def make(self, size: int) -> Tensor:
        return torch.hann_window(size)


class OfFile(Net):
    def between(self, h: Tensor) -> Tensor:
        size = h.shape[-1]
        if size not in TABLES:
            TABLES[size] = torch.hann_window(size)
        return h * TABLES[size]


KINDS = [Shapes, Tables, OfClass, OfModule, OfFile]


@pytest.fixture(autouse=True)
def _nothing_remembered() -> None:
    for remembers in (split_shape, ramp, OfClass.window):
        remembers.cache_clear()
    TABLES.clear()


@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_plans_do_not_depend_on_what_is_remembered(kind: type[Net], ran_before: bool) -> None:
    model = kind().eval()
    expected = model(X) if ran_before else None
    plan = cpx.plan(model, X, 0.5)
    assert [(group.name, group.width_after) for group in plan.groups] == [("first", 8)]
    assert [entry.entry for entry in plan.frozen] == ["last.weight"]
    small = plan.apply(model, verify="numeric")
    assert small(X).shape == (2, 2, 4, 4)
    if expected is not None:
        assert torch.equal(model(X), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_stand_ins_are_not_left_behind(kind: type[Net]) -> None:
    model = kind().eval()
    cpx.plan(model, X, 0.5)
    assert TABLES == {}
    assert ramp(4).device.type == "cpu"
    assert type(split_shape(2, 16, 4, 4)[2]) is int
    other = kind().eval()
    assert cpx.plan(other, X, 0.5).params_after < cpx.plan(other, X, 0.25).params_after
    assert model(X).shape == (2, 2, 4, 4)
    assert type(model(X)) is Tensor


def test_plain_results_stay_remembered() -> None:
    class Labels(Net):
        def between(self, h: Tensor) -> Tensor:
            seen.append(label_of(7))
            return h

    seen: list[Any] = [label_of(7)]
    cpx.plan(Labels().eval(), X, 0.5)
    assert len(seen) > 2
    assert len(set(seen)) == 1
    assert label_of.cache_info().currsize == 1


def test_what_is_replaced_in_a_container_is_put_back() -> None:
    class Replacing(Net):
        def between(self, h: Tensor) -> Tensor:
            TABLES[0] = torch.hann_window(h.shape[-1])
            return h * TABLES[0]

    model = Replacing().eval()
    model(X)
    table = TABLES[0]
    cpx.plan(model, X, 0.5)
    assert list(TABLES) == [0]
    assert TABLES[0] is table


def test_models_are_not_kept_alive() -> None:
    model = OfModule().eval()
    model(X)
    cpx.plan(model, X, 0.5)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None

"""Sizes that code rounds or makes plain: ``int(x.shape[1] / 2)``."""

from __future__ import annotations

import copy
import math
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext.analysis.equations import attribute_key, evaluate
from chanprune_ext.analysis.provenance import Attribute, TracedInt, TracedRatio, plain
from chanprune_ext.analysis.recollection import noting, recollected
from chanprune_ext.errors import NothingToPruneError

if TYPE_CHECKING:
    from collections.abc import Callable

X = torch.randn(2, 3, 6, 6)


def gated(x: Tensor, width: int) -> Tensor:
    return torch.cat([x[:, :width].sigmoid() * x[:, width:], x[:, :width]], 1)


def split_in_halves(x: Tensor) -> Tensor:
    first, second = torch.split(x, int(x.shape[1] / 2), dim=1)
    return torch.cat([second.sigmoid(), first], 1)


def slice_half(x: Tensor) -> Tensor:
    width = int(x.size(1) * 0.5)
    return torch.cat([x[:, :width].sigmoid() * x[:, width:], x[:, :width]], 1)


def slice_floor(x: Tensor) -> Tensor:
    return gated(x, math.floor(x.shape[1] / 2))


def slice_ceil(x: Tensor) -> Tensor:
    return gated(x, math.ceil(x.shape[1] / 2))


def slice_round(x: Tensor) -> Tensor:
    return gated(x, round(x.shape[1] / 2))


def slice_shift(x: Tensor) -> Tensor:
    return gated(x, x.shape[1] >> 1)


def slice_divmod(x: Tensor) -> Tensor:
    return gated(x, divmod(x.shape[1], 2)[0])


def view_of_plain_sizes(x: Tensor) -> Tensor:
    batch, channels, height, width = (int(size) for size in x.shape)
    return x.reshape(batch, channels, -1).softmax(-1).view(batch, channels, height, width)


def view_of_a_list(x: Tensor) -> Tensor:
    sizes = [int(size) for size in x.shape]
    return x.flatten(1).sigmoid().view(sizes)


def shuffle(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, 2, int(c / 2), h, w).transpose(1, 2).reshape(b, -1, h, w)


def rows_to_channels(x: Tensor, share: float = 0.5) -> Tensor:
    b, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1).reshape(b, h, int(w * share), int(c / share))
    x = x.sin().view(b, int(h * share), int(w * share), int(c / share / share))
    return x.view(b, h, w, c).permute(0, 3, 1, 2)


def numpy_product(x: Tensor) -> Tensor:
    rows = x.reshape(x.shape[0], np.prod(x.shape[1:])).sigmoid()
    return rows.view(-1, int(np.prod(x.shape[1:3])), x.shape[3]).cos().view(x.shape)


def numpy_product_of_a_list(x: Tensor) -> Tensor:
    count = np.prod([*x.shape[1:]]).item()
    return x.reshape(-1, count).sin().reshape(x.shape)


def normalise(x: Tensor) -> Tensor:
    width = int(x.shape[1])
    return F.layer_norm(x.movedim(1, -1), [width]).movedim(-1, 1)


class Between(nn.Module):
    """Two convolutions and a function between them."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 16) -> None:
        super().__init__()
        self.function = function
        self.first, self.last = nn.Conv2d(3, width, 3), nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.function(self.first(x)))
        return out


FOLLOWED = [
    *(split_in_halves, slice_half, slice_floor, slice_ceil, slice_round, slice_shift),
    *(slice_divmod, view_of_plain_sizes, view_of_a_list, shuffle, rows_to_channels),
    *(numpy_product, numpy_product_of_a_list),
]


@pytest.mark.parametrize("function", FOLLOWED, ids=lambda f: f.__name__)
def test_rounded_sizes_are_followed(function: Callable[[Tensor], Tensor]) -> None:
    model = Between(function).eval()
    plan = cpx.plan(model, X, 0.5)
    assert [(group.name, group.width_after) for group in plan.groups] == [("first", 8)]
    assert plan.apply(model, verify="numeric")(X).shape == (2, 2, 4, 4)


def test_numpy_is_left_as_it_was() -> None:
    before, seen = np.prod, []

    def product(x: Tensor) -> Tensor:
        seen.append(np.prod)
        of_batch, of_plain = np.prod(x.shape[:1]), np.prod([2, 3])
        assert of_batch.dtype == of_plain.dtype == np.prod(x.shape[1:]).dtype == np.int64
        assert np.prod(x.shape[1:], dtype=float) == float(np.prod(np.array(x.shape[1:])))
        return x

    cpx.plan(Between(product).eval(), X, 0.5)
    assert np.prod is before
    assert seen[0] is not before

    def failing(x: Tensor) -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(cpx.ChanpruneError):
        cpx.plan(Between(failing).eval(), X, 0.5)
    assert np.prod is before


class Patches(Between):
    """As MobileViT: channels times rounded numbers of patches, told by an attribute that stays."""

    def __init__(self) -> None:
        super().__init__(self.through_patches)
        self.side = 3

    def through_patches(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        rows, columns = (math.ceil(n / self.side) * self.side // self.side for n in (h, w))
        x = x.reshape(b * c * rows, self.side, columns, self.side).transpose(1, 2)
        x = x.reshape(b, c, rows * columns, self.side**2).softmax(-1)
        return x.reshape(b, c, rows * self.side, columns * self.side)


def test_a_rounded_quotient_of_what_stays_is_a_number() -> None:
    model = Patches().eval()
    plan = cpx.plan(model, torch.randn(2, 3, 8, 11), 0.5)
    assert [(group.name, group.width_after) for group in plan.groups] == [("first", 8)]


def test_a_plain_size_may_be_a_normalised_shape() -> None:
    assert cpx.plan(Between(normalise).eval(), X, 0.5).groups[0].width_after == 8


def test_a_literal_of_the_same_value_stays_a_literal() -> None:
    def function(x: Tensor) -> Tensor:
        width = int(x.shape[1])
        return x.reshape(len(x), 16, -1).reshape(len(x), width, 4, 4)

    with pytest.raises(NothingToPruneError, match=r"16 channels .*size 16"):
        cpx.plan(Between(function).eval(), X, 0.5)


def test_two_sizes_of_one_value_are_not_mixed_up() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            wide, wider = int(a.shape[1]), int(b.shape[1])
            rows = a.view(-1, wide, 1) @ b.view(-1, 1, wider)
            out: Tensor = self.out(rows.sum(1))
            return out

    with pytest.raises(NothingToPruneError, match="size 8"):
        cpx.plan(Two().eval(), torch.randn(3, 5), 0.5)


def test_another_size_may_have_the_value_of_a_noted_one() -> None:
    model, x = Between(shuffle).eval(), torch.randn(1, 3, 10, 10)
    assert model.first(x).shape[-1] == model.first.out_channels // 2
    assert cpx.plan(model, x, 0.5).groups[0].width_after == 8


def test_other_runs_of_a_function_are_others() -> None:
    """Each block notes its own width, equal or not."""
    blocks = [Between(shuffle), nn.Conv2d(2, 3, 1), Between(shuffle), nn.Conv2d(2, 3, 1)]
    model = nn.Sequential(*blocks, Between(shuffle, 8)).eval()
    x = torch.randn(1, 3, 12, 12)
    plan = cpx.plan(model, x, 0.5, ignore=["0.*"])
    widths = {group.name: group.width_after for group in plan.groups}
    assert (widths["2.first"], widths["4.first"]) == (8, 4)
    assert plan.apply(model, verify="numeric")(x).shape == model(x).shape


def test_a_run_is_another_though_it_has_the_place_of_one_that_ended() -> None:
    def made_plain(width: TracedInt) -> int:
        (again,) = recollected([int(width)], TracedInt)
        assert isinstance(again, int)
        return again

    with noting():
        for layer in range(20):
            expr = Attribute(str(layer), "width", None, 16)
            found = made_plain(TracedInt(16, expr))
            assert isinstance(found, TracedInt)
            assert found.expr == expr


def width(value: int) -> TracedInt:
    return TracedInt(value, Attribute("net", "width", None, value))


WAYS: list[Callable[[Any, int], Any]] = [
    lambda w, d: math.floor(w / d),
    lambda w, d: math.ceil(w / d),
    lambda w, d: math.trunc(w / d),
    lambda w, d: round(w * d / d),
    lambda w, d: math.floor(w * 0.75 / d),
    lambda w, d: math.ceil(d * (w / 2)),
    lambda w, d: math.floor(d / w),
    lambda w, d: math.floor(w / 0.375 / d),
    lambda w, d: math.floor(w / d / 0.5),
    lambda w, d: math.ceil(w / d * 0.25),
    lambda w, d: (w << 2) >> 1,
    lambda w, d: divmod(w, d)[1],
]


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 64), st.sampled_from(WAYS))
def test_expressions_say_what_the_code_does(
    now: int, later: int, other: int, way: Callable[[Any, int], Any]
) -> None:
    traced = way(width(now), other)
    assert plain(traced) == way(now, other)
    assert isinstance(traced, TracedInt)
    key = attribute_key(Attribute("net", "width", None, now))
    assert evaluate(traced.expr, None, {key: later}) == way(later, other)  # type: ignore[arg-type]


def test_ratios_are_floats_to_everybody_else() -> None:
    ratio = width(7) / 2
    assert isinstance(ratio, TracedRatio)
    for same in (plain(ratio), copy.deepcopy(ratio), pickle.loads(pickle.dumps(ratio))):
        assert type(same) is float
        assert same == 3.5
    assert type(plain([ratio])[0]) is float
    assert torch.full((1,), ratio).item() == 3.5
    assert (type(ratio + 1), type(ratio * 0.3), type(width(7) * 0.3)) == (float,) * 3
    assert (width(7) * math.inf, round(ratio), round(ratio, 1)) == (math.inf, 4, 3.5)
    assert int(width(7) / -2) == -3
    assert (type(width(7) / 0.3), type(ratio / 0.3), width(7) / math.inf) == (float, float, 0.0)
    for nothing in (0, 0.0):
        with pytest.raises(ZeroDivisionError):
            width(7) / nothing
    assert type(int(width(7))) is int

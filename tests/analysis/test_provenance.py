"""Integers that remember where they came from."""

from __future__ import annotations

import copy
import operator
import pickle
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from chanprune_ext.analysis.provenance import (
    Attribute,
    Const,
    Dim,
    Expr,
    Op,
    TracedInt,
    expression,
    leaves,
    plain,
    traced_attributes,
)

if TYPE_CHECKING:
    from collections.abc import Callable

OPERATIONS = [operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod]


def attribute(value: int, name: str = "width") -> TracedInt:
    return TracedInt(value, Attribute("net", name, None, value))


def evaluated(expr: Expr) -> int:
    if isinstance(expr, (Const, Attribute)):
        return expr.value
    assert isinstance(expr, Op)
    function = dict(zip("+-*", OPERATIONS, strict=False)) | {
        "//": OPERATIONS[3],
        "%": OPERATIONS[4],
    }
    return function[expr.symbol](evaluated(expr.left), evaluated(expr.right))


@given(
    st.integers(-50, 50),
    st.integers(-50, 50).filter(bool),
    st.sampled_from(OPERATIONS),
    st.sampled_from(["left", "right", "both"]),
)
def test_arithmetic_is_that_of_ints(
    a: int, b: int, operation: Callable[[int, int], int], traced: str
) -> None:
    left = attribute(a, "a") if traced != "right" else a
    right = attribute(b, "b") if traced != "left" else b
    result = operation(left, right)
    assert type(result) is TracedInt
    assert int(result) == operation(a, b)
    assert evaluated(result.expr) == operation(a, b)
    assert {leaf.name for leaf in leaves(result.expr) if isinstance(leaf, Attribute)} == {
        "left": {"a"},
        "right": {"b"},
        "both": {"a", "b"},
    }[traced]


def test_signs() -> None:
    size = attribute(6)
    assert +size is size
    assert (-size, evaluated((-size).expr)) == (-6, -6)
    negative = -size
    assert evaluated((-negative).expr) == 6


def test_what_is_not_whole_is_a_plain_number() -> None:
    size = attribute(6)
    for value in (size / 2, size * 0.5, size**-0.5, size**2, int(size), float(size), abs(size)):
        assert not isinstance(value, TracedInt)
    assert [*range(size)] == [0, 1, 2, 3, 4, 5]
    assert "abcdefgh"[size] == "g"
    assert f"{size}" == "6"


def test_copies_and_pickles_are_plain() -> None:
    for made in (copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        assert type(made(attribute(6))) is int
    nested = copy.deepcopy({"sizes": [attribute(6)]})
    assert type(nested["sizes"][0]) is int


def test_plain() -> None:
    size = attribute(6)
    value = plain((size, [size, 2.5], {"k": slice(None, size)}, "text", torch.Size([size, 2])))
    assert value == (6, [6, 2.5], {"k": slice(None, 6)}, "text", (6, 2))
    assert type(value[0]) is type(value[1][0]) is type(value[2]["k"].stop) is int
    assert type(value[4][0]) is int
    untouched = [1, 2]
    assert plain(untouched) is untouched


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.sizes = [2, 6]
        self.shape = (8, 4, 4)
        self.flag = True
        self.rate = 0.5
        self.name = "layer"
        self.mixed = [1, 0.5]
        self.kernel_size = 3
        self.conv = nn.Conv2d(4, 8, 3, groups=2)


def test_attributes_are_traced_and_put_back() -> None:
    model = Layer()
    before = dict(model.__dict__)
    with traced_attributes(model, lambda *_: None, lambda _: None):
        assert expression(model.width) == Attribute("", "width", None, 8)
        assert expression(model.sizes[1]) == Attribute("", "sizes", 1, 6)
        assert expression(model.shape[0]) == Attribute("", "shape", 0, 8)
        assert expression(model.conv.groups) == Attribute("conv", "groups", None, 2)
        assert type(model.shape) is tuple
        for name in ("flag", "rate", "name", "mixed", "kernel_size", "training"):
            assert getattr(model, name) is before.get(name, True)
        assert type(model.conv.kernel_size[0]) is int
        model.width = model.width * 2
        model.fresh = model.conv.groups
    assert model.sizes is before["sizes"]
    assert model.shape is before["shape"]
    # What the forward computed stays, as a plain number.
    assert (model.width, type(model.width)) == (16, int)
    assert type(model.conv.groups) is int


def test_attributes_are_put_back_after_an_error() -> None:
    model = Layer()
    with pytest.raises(RuntimeError), traced_attributes(model, lambda *_: None, lambda _: None):
        raise RuntimeError
    assert type(model.width) is int
    assert type(model.sizes[0]) is int


def test_comparisons_are_noticed() -> None:
    model = Layer()
    found: list[tuple[Expr, Expr]] = []
    apart: list[tuple[Expr, Expr]] = []
    slots = np.arange(8)[None]
    size = TracedInt(8, Dim(slots))
    asked: list[Expr] = []

    def compared(a: Expr, b: Expr, equal: bool) -> None:
        (found if equal else apart).append((a, b))

    with traced_attributes(model, compared, asked.append):
        assert model.width > 1
        assert size == model.width
        differs = size != model.width
        assert not differs
        assert size != 7
        assert size == 8
        assert 8 == size  # noqa: SIM300 - the traced one on the right
        assert size != "8"
        assert size == 8.0
        assert size in (1, model.width)
    assert [(type(a), b) for a, b in apart] == [(Dim, Const(7)), (Dim, Const(1))]
    width = Attribute("", "width", None, 8)
    assert [{type(a), type(b)} for a, b in found] == [
        {Dim, Attribute},
        {Dim, Attribute},
        {Dim, Const},
        {Dim, Const},
        {Dim, Attribute},
    ]
    assert found[0][1] == width
    assert asked == [width]
    found.clear()
    assert size == 8
    assert size > 7
    assert not found
    assert len(asked) == 1
    assert hash(size) == hash(8)
    assert {8: "eight"}[size] == "eight"

"""Everyday calls run by hand: the same operation, and a result of the same form, as torch's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from chanprune_ext.analysis.calls import CallMode, steady_calls, tensors_in
from chanprune_ext.analysis.meta_calls import run_call
from chanprune_ext.analysis.meta_kernels import lowered
from chanprune_ext.analysis.stand_ins import substrate_device, substrate_mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ERRORS = (RuntimeError, IndexError)
DEVICES = {"meta": torch.device("meta"), "fake": torch.device("cpu")}


@pytest.fixture(params=DEVICES, autouse=True)
def substrate(request: pytest.FixtureRequest) -> Iterator[str]:
    with substrate_mode(request.param), torch.device(DEVICES[request.param]):
        yield request.param


def e(*shape: int) -> Tensor:
    return torch.empty(shape)


def last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Torch reserves memory for cuDNN in front of every batch norm, and asks fake tensors where
        # they are.
        if func not in (torch.ops.aten.empty.memory_format, torch.ops.prim.device.default):
            self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


class _Compare(CallMode):
    """Runs each call both ways."""

    def __init__(self, substrate: str) -> None:
        super().__init__(substrate_device(substrate))
        self.lowered = 0

    def run(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = lowered(name, args, kwargs)
        with _Operations() as operations:
            expected = func(*args, **kwargs)
        if found is None:
            return expected
        self.lowered += 1
        result = found.result
        assert type(result) is type(expected)
        assert result.device == expected.device
        assert _is_seen_of(result, args) == _is_seen_of(expected, args)
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
        assert result.stride() == expected.stride()
        assert (result is args[0]) == (expected is args[0])
        if name == "linear":  # the one that torch takes to pieces
            assert found.op is torch.ops.aten.linear.default
            return result
        ((op, given),) = operations.seen
        assert found.op is op
        assert list(map(id, tensors_in(given))) == list(map(id, tensors_in(found.args)))
        assert _numbers(found.args)[: len(_numbers(given))] == _numbers(given)
        return result


def _is_seen_of(result: Tensor, args: tuple[Any, ...]) -> list[bool]:
    """Of which arguments it shares the memory."""
    storages = [t.untyped_storage()._cdata for t in (result, *tensors_in(args))]
    return [storage == storages[0] for storage in storages[1:]]


def _numbers(args: tuple[Any, ...]) -> list[Any]:
    return [list(a) if isinstance(a, tuple) else a for a in args if not tensors_in(a)]


LOWERED: dict[str, Callable[[], Any]] = {
    "convolution": lambda: F.conv2d(e(2, 8, 9, 7), e(6, 8, 3, 2), e(6), (2, 1), (1, 0), (2, 1), 1),
    "depthwise": lambda: F.conv2d(e(2, 8, 5, 5), e(8, 1, 3, 3), None, (1, 1), (1, 1), (1, 1), 8),
    "1d": lambda: F.conv1d(e(2, 8, 9), e(6, 4, 3), None, (2,), (1,), (1,), 2),
    "3d": lambda: F.conv3d(
        e(1, 2, 5, 5, 5), e(4, 2, 3, 1, 1), e(4), (1,) * 3, (1, 0, 0), (1,) * 3, 1
    ),
    "batch norm": lambda: F.batch_norm(e(2, 8, 4), e(8), e(8), e(8), e(8)),
    "batch norm, plain": lambda: F.batch_norm(e(2, 8, 4, 4), e(8), e(8)),
    "layer norm": lambda: F.layer_norm(e(2, 4, 3), (4, 3), e(4, 3), e(4, 3)),
    "relu": lambda: F.relu(e(2, 3)),
    "relu_": lambda: F.relu(e(2, 3), inplace=True),
    "relu, channels last": lambda: F.relu(last(e(2, 3, 4, 5))),
    "hardtanh_": lambda: F.hardtanh(e(2, 3), 0.0, 6.0, inplace=True),
    "hardswish": lambda: F.hardswish(e(2, 3)),
    "silu": lambda: F.silu(e(2, 3)),
    "sigmoid": lambda: e(2, 3).sigmoid(),
    "hardsigmoid": lambda: F.hardsigmoid(e(2, 3)),
    "gelu": lambda: F.gelu(e(2, 3)),
    "sum": lambda: e(2, 3) + e(2, 3),
    "sum in place": lambda: e(2, 3).add_(e(2, 1)),
    "gate": lambda: e(2, 3, 1, 1) * e(2, 3, 4, 4),
    "scale": lambda: e(2, 3, 4) * e(1, 1, 4),
    "global average": lambda: F.adaptive_avg_pool2d(e(2, 3, 4, 5), (1, 1)),
    "cat": lambda: torch.cat([e(2, 3, 4), e(2, 1, 4)], dim=-2),
    "linear": lambda: F.linear(e(2, 8), e(3, 8), e(3)),
    "linear of tokens": lambda: F.linear(e(2, 5, 8), e(3, 8)),
    "view": lambda: e(2, 6).view(3, -1),
    "view of a shape": lambda: e(2, 6).view(e(3, 4).shape),
    "permute": lambda: e(2, 3, 4).permute(2, 0, 1),
    "permute by a list": lambda: torch.permute(e(2, 3, 4), [0, -1, 1]),
    "transpose": lambda: e(2, 3, 4).transpose(0, -1),
}
LEFT: dict[str, Callable[[], Any]] = {
    "channels last": lambda: F.conv2d(last(e(2, 8, 5, 5)), e(6, 8, 3, 3), None, 1, 0, 1, 1),
    "padding in words": lambda: F.conv2d(e(2, 8, 5, 5), e(6, 8, 3, 3), None, 1, "same"),
    "a gelu of another kind": lambda: F.gelu(e(2, 3), approximate="tanh"),
    "another dtype": lambda: e(2, 3) + e(2, 3).double(),
    "both broadcast": lambda: e(2, 1) + e(1, 3),
    "a number": lambda: e(2, 3) * 2.0,
    "wider windows": lambda: F.adaptive_avg_pool2d(e(2, 3, 4, 5), 2),
    "transposed cat": lambda: torch.cat([e(3, 2).t(), e(2, 3)]),
    "a view as another dtype": lambda: e(2, 4).view(torch.int32),
    "dims by name": lambda: e(2, 3).transpose(dim0=0, dim1=1),
    "truth values": lambda: torch.relu(torch.zeros(3, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", LOWERED)
def test_is_what_torch_runs(substrate: str, name: str) -> None:
    with steady_calls(nn.Identity()), _Compare(substrate) as mode:
        LOWERED[name]()
    assert mode.lowered == 1


@pytest.mark.parametrize("name", LEFT)
def test_torch_is_asked(substrate: str, name: str) -> None:
    with steady_calls(nn.Identity()), _Compare(substrate) as mode:
        LEFT[name]()
    assert mode.lowered == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: F.conv2d(e(2, 8, 5, 5), e(6, 7, 3, 3)),
        lambda: F.conv2d(e(2, 8, 2, 2), e(6, 8, 3, 3)),
        lambda: F.linear(e(2, 8), e(3, 7)),
        lambda: e(2, 3) + e(2, 4),
        lambda: torch.cat([e(2, 3), e(3, 3)], 1),
        lambda: e(2, 3).view(4, 2),
        lambda: e(2, 3).t().view(-1),
        lambda: e(2, 3, 4).permute(0, 0, 1),
        lambda: e(2, 3).transpose(0, 2),
    ],
)
def test_errors_are_those_of_torch(substrate: str, call: Callable[[], Any]) -> None:
    with (
        steady_calls(nn.Identity()),
        _Compare(substrate),
        pytest.raises((RuntimeError, IndexError)),
    ):
        call()


class _Outcomes(CallMode):
    """Runs each call both ways, where only what comes out of it counts."""

    def __init__(self, substrate: str) -> None:
        super().__init__(substrate_device(substrate))
        self.asked = 0

    def run(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name.startswith("empty"):
            return func(*args, **kwargs)

        def torch_itself(*args: Any, **kwargs: Any) -> Any:
            self.asked += 1
            return func(*args, **kwargs)

        expected = func(*args, **kwargs)
        result = run_call(name, torch_itself, args, kwargs)
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
        assert result.stride() == expected.stride()
        return result


OUTCOMES: dict[str, Callable[[], Any]] = {
    "batched product": lambda: e(2, 3, 4, 5) @ torch.empty_strided((2, 3, 5, 6), (90, 30, 1, 5)),
    "bmm": lambda: torch.bmm(e(3, 4, 5), e(3, 5, 2)),
    "attention": lambda: F.scaled_dot_product_attention(
        e(2, 4, 7, 8), e(2, 4, 5, 8), e(2, 4, 5, 9), scale=0.5
    ),
    "causal attention": lambda: F.scaled_dot_product_attention(
        e(2, 4, 7, 8), e(2, 4, 7, 8), e(2, 4, 7, 8), None, 0.0, True
    ),
    "roll": lambda: torch.roll(e(2, 3, 4), shifts=(1, -1), dims=(0, -1)),
}
ASKED: dict[str, Callable[[], Any]] = {
    "a product that is broadcast": lambda: e(1, 4, 5) @ e(3, 5, 6),
    "attention with a mask": lambda: F.scaled_dot_product_attention(
        e(2, 4, 7, 8), e(2, 4, 7, 8), e(2, 4, 7, 8), e(7, 7)
    ),
    "shared key heads": lambda: F.scaled_dot_product_attention(
        e(2, 4, 7, 8), e(2, 2, 7, 8), e(2, 2, 7, 8), enable_gqa=True
    ),
    "roll of all": lambda: torch.roll(e(2, 3), 1),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_what_comes_out_is_of_the_form_that_torch_gives(substrate: str, name: str) -> None:
    with steady_calls(nn.Identity()), _Outcomes(substrate) as mode:
        OUTCOMES[name]()
    assert mode.asked == 0


@pytest.mark.parametrize("name", ASKED)
def test_torch_is_asked_where_the_form_may_differ(substrate: str, name: str) -> None:
    with steady_calls(nn.Identity()), _Outcomes(substrate) as mode:
        ASKED[name]()
    assert mode.asked == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda: e(3, 4, 5) @ e(3, 4, 2),
        lambda: F.scaled_dot_product_attention(e(2, 4, 7, 8), e(2, 4, 7, 6), e(2, 4, 7, 6)),
        lambda: torch.roll(e(2, 3), (1, 1), (0, 2)),
    ],
)
def test_errors_of_what_comes_out_are_those_of_torch(
    substrate: str, call: Callable[[], Any]
) -> None:
    with (
        steady_calls(nn.Identity()),
        _Outcomes(substrate),
        pytest.raises((RuntimeError, IndexError)),
    ):
        call()

"""One operation at a time between two convolutions: what goes, what stays, and the numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from between import assert_normalises, assert_passes, assert_stays, between
from models import relative_error, run, zeroed
from torch import Tensor

import chanprune_ext as cpx
from chanprune_ext.analysis import analyse
from chanprune_ext.analysis.rules.registry import _RULES
from chanprune_ext.errors import NothingToPruneError

if TYPE_CHECKING:
    from collections.abc import Callable


# All channels can go by themselves, and the result is exact.
def with_rows_of(x: Tensor, other: Tensor) -> Tensor:
    """Every other column of images taken, in order, from other images."""
    mask = (torch.arange(6, device=x.device) % 2 > 0)[:, None]
    rows, others = x.permute(0, 2, 3, 1), other.permute(0, 2, 3, 1)
    return rows.masked_scatter(mask, others).permute(0, 3, 1, 2)


PASSES: dict[str, Callable[..., Tensor]] = {
    **{
        name: lambda m, x, name=name: getattr(F, name)(x)
        for name in (
            *("relu", "relu6", "gelu", "silu", "elu", "selu", "celu", "leaky_relu", "mish"),
            *("hardswish", "hardsigmoid", "hardtanh", "hardshrink", "softshrink", "softplus"),
            *("softsign", "tanhshrink", "logsigmoid"),
        )
    },
    **{
        name: lambda m, x, name=name: getattr(torch, name)(x)
        for name in (
            *("sigmoid", "tanh", "exp", "sin", "cos", "abs", "square", "neg", "floor", "erf"),
            *("sign", "nan_to_num", "clone", "detach", "zeros_like", "ones_like"),
        )
    },
    "dropout": lambda m, x: F.dropout2d(F.dropout(x, training=False), training=False),
    "relu_": lambda m, x: x.relu_(),
    "sigmoid_": lambda m, x: x.sigmoid_(),
    "hardtanh_": lambda m, x: F.hardtanh(x, -2, 3, inplace=True),
    "threshold": lambda m, x: F.threshold(x, 0.1, 0.5),
    "clamp": lambda m, x: x.clamp(-0.5, 0.5),
    "clamp_min": lambda m, x: x.clamp(min=0.1),
    "pow": lambda m, x: x**2,
    "arithmetic": lambda m, x: 2 - (x + 1) * 0.5 / 3,
    "scalar tensor": lambda m, x: x * torch.tensor(0.5) + m.parts.one,
    "compare": lambda m, x: (x > 0).to(x.dtype) * x,
    "where": lambda m, x: torch.where(x > 0, x, -x),
    "where scalar": lambda m, x: torch.where(x > 0, x, 0.5),
    "masked_fill": lambda m, x: x.masked_fill(x < 0, 0.3),
    "sum of rows": lambda m, x: x * with_rows_of(x, x.sin()).sum(1, keepdim=True),
    "maximum": lambda m, x: torch.maximum(x, x * 0.5),
    "lerp": lambda m, x: torch.lerp(x, x.tanh(), 0.3),
    "addcmul": lambda m, x: torch.addcmul(x, x, x.sin(), value=0.2),
    "vector": lambda m, x: x * m.parts.vector.view(1, -1, 1, 1),
    "vector, indexed": lambda m, x: x + m.parts.vector[None, :, None, None],
    "buffer": lambda m, x: x / m.parts.fixed[:, None, None],
    "prelu": lambda m, x: F.prelu(x, m.parts.vector),
    "prelu of one": lambda m, x: F.prelu(x, m.parts.one),
    "rrelu": lambda m, x: F.rrelu(x),
    "max_pool": lambda m, x: F.max_pool2d(x, 2),
    "max_pool with indices": lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0],
    "avg_pool": lambda m, x: F.avg_pool2d(x, 3, 1, 1),
    "lp_pool": lambda m, x: F.lp_pool2d(x.abs() + 1, 2, 2),
    "adaptive_avg_pool": lambda m, x: F.adaptive_avg_pool2d(x, (2, 3)),
    "adaptive_avg_pool to one": lambda m, x: F.adaptive_avg_pool2d(x, 1),
    "adaptive_max_pool": lambda m, x: F.adaptive_max_pool2d(x, 2),
    "mean over positions": lambda m, x: x.mean((2, 3), keepdim=True),
    "max over positions": lambda m, x: x.amax((2, 3), keepdim=True),
    "norm over positions": lambda m, x: x.norm(dim=3, keepdim=True),
    "normalize over positions": lambda m, x: F.normalize(x + 0.1, dim=3),
    "softmax over positions": lambda m, x: x.flatten(2).softmax(2).view_as(x),
    "sum over positions": lambda m, x: x.sum(-1, keepdim=True),
    "std over positions": lambda m, x: x.std((2, 3), keepdim=True),
    "cumsum over positions": lambda m, x: x.cumsum(2),
    "sort over positions": lambda m, x: x.sort(3).values,
    "topk over positions": lambda m, x: x.topk(2, 3).values,
    **{
        f"interpolate {mode}": lambda m, x, mode=mode: F.interpolate(x, scale_factor=2, mode=mode)
        for mode in ("nearest", "bilinear", "bicubic", "nearest-exact", "area")
    },
    "interpolate to a size": lambda m, x: F.interpolate(x, size=(3, 3), mode="bilinear"),
    **{
        f"pad {mode}": lambda m, x, mode=mode: F.pad(x, (1, 1, 1, 1), mode=mode)
        for mode in ("constant", "reflect", "replicate", "circular")
    },
    "pad with a value": lambda m, x: F.pad(x, (1, 0, 0, 1), value=0.7),
    "crop by negative pad": lambda m, x: F.pad(x, (-1, -1, 0, 0)),
    "grid_sample": lambda m, x: F.grid_sample(x, x.new_zeros(2, 3, 3, 2), align_corners=False),
    "flip": lambda m, x: x.flip(1),
    "flip twice": lambda m, x: x.flip((1, -1)).flip(1),
    "roll positions": lambda m, x: x.roll(1, 2),
    "permute": lambda m, x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "movedim": lambda m, x: x.movedim(1, -1).movedim(-1, 1),
    "transpose twice": lambda m, x: x.transpose(1, 2).transpose(2, 1),
    "swapaxes": lambda m, x: x.swapaxes(1, 3).swapaxes(1, 3),
    "flatten and back": lambda m, x: x.flatten(2).view(*x.shape),
    "view by shape": lambda m, x: x.view(x.size(0), x.size(1), -1).reshape(x.shape),
    "flatten all": lambda m, x: x.reshape(-1).view(x.shape),
    "merge batch and channels": lambda m, x: x.flatten(0, 1).view(x.shape),
    "unsqueeze": lambda m, x: x.unsqueeze(2).squeeze(2),
    "index none": lambda m, x: x[:, :, None].squeeze(2),
    "ellipsis": lambda m, x: x[..., 1:],
    "positions by list": lambda m, x: x[:, :, [0, 2]],
    "every second position": lambda m, x: x[:, :, ::2, ::2],
    "one position": lambda m, x: x[:, :, 0, :, None],
    "stack": lambda m, x: torch.stack([x, -x], 0).sum(0),
    "sum of stacked channels": lambda m, x: x * torch.stack([x, -2 * x]).sum(2)[1][:, None],
    "unbind positions": lambda m, x: torch.stack(x.unbind(2), 2),
    "cat positions": lambda m, x: torch.cat([x, x], 3),
    "split positions": lambda m, x: x.split(3, 3)[0],
    "chunk positions": lambda m, x: x.chunk(2, 3)[1],
    "cat with itself": lambda m, x: torch.cat([x, x.relu()], 1),
    "cat then slice by shape": lambda m, x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "repeat positions": lambda m, x: x.repeat(1, 1, 2, 1),
    "repeat channels": lambda m, x: x.repeat(1, 3, 1, 1),
    "expand": lambda m, x: x.mean((2, 3), keepdim=True).expand(-1, -1, 2, 2),
    "broadcast_to": lambda m, x: torch.broadcast_to(x[:, :, :1], x.shape) * x,
    "expand_as": lambda m, x: x.mean((2, 3), keepdim=True).expand_as(x) + x,
    "pixel_shuffle": lambda m, x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda m, x: F.pixel_unshuffle(x, 2),
    "channel_shuffle": lambda m, x: F.channel_shuffle(x, 2),
    "glu": lambda m, x: F.glu(x, 1),
    "chunk": lambda m, x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1],
    "slice by attribute": lambda m, x: x[:, : m.half] + x[:, m.half :],
    "narrow by attribute": lambda m, x: x.narrow(1, 0, m.half) * x.narrow(1, m.half, m.half),
    "positions by lists": lambda m, x: x[:, :, [0, 2], [1, 1]][..., None],
    "positions from the end": lambda m, x: x.index_select(-1, torch.tensor([0, 2])),
    "positions by apart lists": lambda m, x: x[[1, 0], :, :, [1, 1]][..., None],
    "repeat_interleave": lambda m, x: x.repeat_interleave(2, 1),
    "empty_like": lambda m, x: torch.empty_like(x).copy_(x),
    "full_like": lambda m, x: x + torch.full_like(x, 0.5),
    "linear on the last dim": lambda m, x: F.linear(x.mT, m.parts.matrix[:4, :4]).mT,
    "matmul": lambda m, x: (x.permute(0, 2, 3, 1) @ m.parts.matrix).permute(0, 3, 1, 2),
    "einsum": lambda m, x: torch.einsum("nchw,cd->ndhw", x, m.parts.matrix),
    "tensordot": lambda m, x: torch.tensordot(x, m.parts.matrix, ([1], [0])).permute(0, 3, 1, 2),
    "bmm over positions": lambda m, x: torch.bmm(x.flatten(2), x.flatten(2).mT @ x.flatten(2))[
        ..., None
    ],
    "instance_norm": lambda m, x: F.instance_norm(x),
    "batch_norm": lambda m, x: F.batch_norm(x, m.parts.fixed, m.parts.fixed, m.parts.vector),
    "sum of what is zero": lambda m, x: x * x.relu().sum(1, keepdim=True),
    "sum of what a ReLU in place leaves zero": lambda m, x: x * x.relu_().sum(1, keepdim=True),
    "sum of what is scaled in place": lambda m, x: x * x.mul_(0.5).sum(1, keepdim=True),
    "sum of what is added in place": lambda m, x: x * x.add_(x.tanh()).sum(1, keepdim=True),
    "sum of what is copied over": lambda m, x: x * x.sigmoid().copy_(x).sum(1, keepdim=True),
    "transposed in place": lambda m, x: x.clone().transpose_(1, 2).transpose_(1, 2),
    "pool beside channels": lambda m, x: F.avg_pool2d(x.transpose(1, 2), (1, 2)).transpose(1, 2),
    "max_pool beside channels": lambda m, x: F.max_pool2d(
        x.transpose(1, 2), (1, 3), (1, 2), (0, 1)
    ).transpose(1, 2),
    "triangles": lambda m, x: x.tril() + x.clone().triu_(1).sum(1, keepdim=True),
    "triangular systems": lambda m, x: torch.linalg.solve_triangular(
        x[..., :4].tril(-1), x, upper=False, unitriangular=True
    ),
    "in place on a view": lambda m, x: x[:, :, 1:].mul_(2).sum(2, keepdim=True) + x,
}


def positions_filled(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, 0].fill_(1)
    return x


# Channels go; a statistic over them is then one over those that stay.
NORMALISED: dict[str, Callable[..., Tensor]] = {
    "mean": lambda m, x: x - x.mean(1, keepdim=True),
    "amax": lambda m, x: x - x.amax(1, keepdim=True),
    "max with positions that nobody reads": lambda m, x: x - x.max(1, keepdim=True)[0],
    "var": lambda m, x: x / (x.var(1, keepdim=True, unbiased=False) + 1),
    "logsumexp": lambda m, x: x - x.logsumexp(1, keepdim=True),
    "norm": lambda m, x: x / (x.norm(dim=1, keepdim=True) + 1),
    "normalize": lambda m, x: F.normalize(x, dim=1),
    "group_norm": lambda m, x: F.group_norm(x, 2),
    "layer_norm": lambda m, x: F.layer_norm(x.permute(0, 2, 3, 1), [x.shape[1]]).permute(
        0, 3, 1, 2
    ),
    "sum of sigmoids": lambda m, x: x * x.sigmoid().sum(1, keepdim=True),
    "prod": lambda m, x: x * x.prod(1, keepdim=True),
    "sum of positions after sorting": lambda m, x: (
        x * x.flatten(2).sort(2).indices.sum(1).view(2, 1, 4, 6)
    ),
    "sum of positions of a pool": lambda m, x: (
        x[..., :2, :3] * F.max_pool2d(x, 2, return_indices=True)[1].sum(1, keepdim=True)
    ),
    "sum of a sigmoid copied over": lambda m, x: x * x.clone().copy_(x.sigmoid()).sum(1, True),
    "sum of a shift scaled in place": lambda m, x: x * x.add(1).mul_(2).sum(1, keepdim=True),
    "sum of filled positions": lambda m, x: x * positions_filled(x).sum(1, keepdim=True),
    "sum of what is masked": lambda m, x: x * x.masked_fill(x <= 0, 0.5).sum(1, keepdim=True),
    "sum of sigmoids in rows": lambda m, x: x * with_rows_of(x, x.sigmoid()).sum(1, keepdim=True),
    "sum of truth values": lambda m, x: x * (x == 0).to(x.dtype).sum(1, keepdim=True),
    "sum of positions beside sigmoids": lambda m, x: (
        x * torch.cat([x, x.sigmoid()], 2).sum(1, keepdim=True)[:, :, 4:]
    ),
    "sum of channels stacked with sigmoids": lambda m, x: (
        x * torch.stack([x, x.sigmoid()], 2).sum(1, keepdim=True).sum(2)
    ),
    "sum of quotients of zeros": lambda m, x: x * (x / x).nan_to_num(0.5).sum(1, keepdim=True),
    "sum after a shift in place": lambda m, x: x * x.add_(1).sum(1, keepdim=True),
    "sum after a shift of a view": lambda m, x: (x[:, :, :2].add_(1), x.sum(1, keepdim=True) + x)[
        1
    ],
}

# Nothing of the first convolution may go.
STAYS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "softmax": (lambda m, x: x.softmax(1), "depends on all others"),
    "log_softmax": (lambda m, x: x.log_softmax(1), "depends on all others"),
    "cumsum": (lambda m, x: x.cumsum(1), "depends on all others"),
    "sort": (lambda m, x: x.sort(1).values, "depends on all others"),
    "position of the max": (
        lambda m, x: x - x.max(1, keepdim=True)[1],
        "index into these channels",
    ),
    "argmax": (lambda m, x: x + x.argmax(1, keepdim=True), "index into these channels"),
    "topk": (lambda m, x: x.topk(3, 1).values, "sorted by value"),
    "roll": (lambda m, x: x.roll(1, 1), "fixed distance"),
    "select": (lambda m, x: x.select(1, 3).unsqueeze(1) + x, "fixed position"),
    "index": (lambda m, x: x[:, 3:4] + x[:, 5:6] + x[:, [1]] + x, ""),
    "unbind": (lambda m, x: torch.stack(x.unbind(1), 1), "fixed position"),
    "strided, not to the end": (lambda m, x: x[:, :7:2], "every n-th"),
    "strided, with a rest": (lambda m, x: x[:, ::3], "every n-th"),
    "strided, from the second pair": (lambda m, x: x[:, 2::2], "every n-th"),
    "positions of a window of one": (
        lambda m, x: (
            F.max_pool2d(x.transpose(1, 2), (1, 2), return_indices=True)[1]
            .to(x.dtype)
            .transpose(1, 2)
        ),
        "a number counts",
    ),
    "view by literals": (lambda m, x: x.view(2, 8, 24).view(2, 8, 4, 6), "size 8"),
    "no rule": (
        lambda m, x: torch.bucketize(x, x.new_tensor([0.0])).to(x.dtype),
        "no rule for aten::bucketize",
    ),
    "triangle of channels": (lambda m, x: x.transpose(1, 2).triu().transpose(1, 2), "triangle"),
    "as_strided": (lambda m, x: x.as_strided(x.shape, x.stride()), "as_strided"),
    "mask": (lambda m, x: x[:, x.new_tensor([1, 0] * 4) > 0], "fixed position"),
    "channels by list": (lambda m, x: x[:, [1, 3, 4]], "fixed position"),
    "arange": (
        lambda m, x: x * torch.arange(x.shape[1], device=x.device)[:, None, None],
        "numbered",
    ),
    "one channel against a number": (lambda m, x: x * x.shape[1], "used in a computation"),
    "conv over channels": (
        lambda m, x: F.conv3d(x[:, None], torch.ones(1, 1, 3, 1, 1), padding=(1, 0, 0))[:, 0],
        "slides",
    ),
    "pool over pairs of channels": (
        lambda m, x: F.avg_pool2d(x.transpose(1, 2), (2, 1), (1, 1)).transpose(1, 2),
        "slides",
    ),
    "windows of one, every second": (
        lambda m, x: F.max_pool2d(x.transpose(1, 2), 1, (2, 1)).transpose(1, 2),
        "slides",
    ),
    "pool over channels": (lambda m, x: F.max_pool1d(x.flatten(2).mT, 2).mT[..., None], "slides"),
    "lambda of numpy": (lambda m, x: x + x.new_tensor(list(range(8)))[:, None, None], ""),
}


@pytest.mark.parametrize("name", PASSES)
def test_passes(name: str) -> None:
    assert_passes(PASSES[name])


@pytest.mark.parametrize("name", NORMALISED)
def test_normalises(name: str) -> None:
    assert_normalises(NORMALISED[name])


# Channels go in pairs of neighbours.
PAIRS: dict[str, Callable[..., Tensor]] = {
    "the first of each": lambda m, x: x[:, ::2],
    "the second of each": lambda m, x: x[:, 1::2],
    "both": lambda m, x: x[:, 1::2].sigmoid() * x[:, ::2],
    "both, to a bound": lambda m, x: x[:, 0 : x.shape[1] : 2] - x[:, 1 : x.shape[1] : 2],
    "both, beside positions": lambda m, x: x[:, 1::2, ::3, 1::2] * x[:, ::2, 1:2, ::2],
    # As the rotary embedding of GPT-J.
    "turned": lambda m, x: torch.stack([-x[:, 1::2], x[:, ::2]], 2).flatten(1, 2) * 0.5 + x,
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str) -> None:
    model, images = between(PAIRS[name])
    plan = cpx.plan(model, images, 0.5)
    kept = plan.kept["a.weight"][0].tolist()
    assert len(kept) == 4
    assert {k // 2 for k in kept} == {k // 2 for k in kept if k % 2} == {kept[0] // 2, kept[2] // 2}
    assert relative_error(run(plan.apply(model), images), run(zeroed(model, plan), images)) < 1e-9


@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str) -> None:
    assert_stays(*STAYS[name])


def test_channels_of_a_literal_slice_stay_and_others_go() -> None:
    model, images = between(lambda m, x: torch.cat([x[:, :3], x[:, 4:]], 1))
    plan = cpx.plan(model, images, 0.5)
    kept = plan.kept["a.weight"][0].tolist()
    assert kept[:4] == [0, 1, 2, 3]
    assert len(kept) == 6


def test_own_rule() -> None:
    """An operation of the user's own becomes prunable with one function."""

    @torch.library.custom_op("chanprune_rules::double", mutates_args=())
    def double(x: Tensor) -> Tensor:
        return x * 2

    @double.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    model, images = between(lambda m, x: double(x))
    with pytest.raises(NothingToPruneError, match="no rule for chanprune_rules::double"):
        cpx.plan(model, images, 0.5)

    @cpx.register_rule("chanprune_rules::double")
    def rule(tracer: Any, func: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        tracer.set(output, tracer.dims(args[0]))

    try:
        plan = cpx.plan(model, images, 0.5)
        error = relative_error(run(plan.apply(model), images), run(zeroed(model, plan), images))
        assert error < 1e-9
    finally:
        del _RULES["chanprune_rules::double"]


def test_own_rule_that_fails_freezes() -> None:
    @torch.library.custom_op("chanprune_rules::triple", mutates_args=())
    def triple(x: Tensor) -> Tensor:
        return x * 3

    @triple.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @cpx.register_rule("chanprune_rules::triple")
    def rule(tracer: Any, func: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        tracer.set(output, tracer.dims(args[0])[:1])

    try:
        model, images = between(lambda m, x: triple(x))
        analysis = analyse(model, images)
        (told,) = [f for f in analysis.frozen if f.entry == "a.weight"]
        assert "the rule failed" in told.why
        assert told.op == "chanprune_rules::triple"
    finally:
        del _RULES["chanprune_rules::triple"]


def test_rule_names_need_a_namespace() -> None:
    with pytest.raises(ValueError, match="namespace::operation"):
        cpx.register_rule("double")

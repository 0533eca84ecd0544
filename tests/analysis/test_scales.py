"""Constants that follow a pruned width are folded into the weights in front of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import randomised, relative_error, run, zeroed
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext.errors import NothingToPruneError

HEADS, WIDTH, INNER = 2, 12, 16


class Attention(nn.Module):
    """One packed projection, four heads of four, and the scale that a subclass takes."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.qkv = nn.Linear(WIDTH, 3 * INNER)
        self.proj = nn.Linear(INNER, WIDTH)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attend(*self.project(x))
        return self.proj(y.transpose(1, 2).flatten(2))


class ScaledQuery(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q * q.shape[-1] ** -0.5
        return (q @ k.mT).softmax(-1) @ v


class DividedLogits(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT) / math.sqrt(q.shape[-1])).softmax(-1) @ v


class Rotated(Attention):
    """Rotary positions mix two rows of a head: both are scaled."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.turn(q), self.turn(k), v)

    def turn(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = torch.linspace(0, 1, x.shape[-2], device=x.device).to(x.dtype)[:, None]
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        return x * angle.cos() + turned * angle.sin()


class Separate(Attention):
    """Three projections, one of them without bias, and a norm over nothing that is pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Identity()
        self.q = nn.Linear(WIDTH, INNER, bias=False)
        self.kv = nn.Linear(WIDTH, 2 * INNER)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, -1).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return q, k, v


class LateBias(Separate):
    """The bias is a parameter of its own, added later: it is scaled too."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(INNER))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        _, k, v = super().project(x)
        q = (self.q(x) + self.shift).view(b, n, self.heads, -1).transpose(1, 2)
        return q, k, v


class Converting(Separate):
    """Its layers bring their weights to the dtype of the input, as Whisper's do."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        q = F.linear(x, self.q.weight.to(x.dtype)).view(b, n, self.heads, -1).transpose(1, 2)
        kv = F.linear(x, self.kv.weight.type_as(x), self.kv.bias.to(x.dtype))
        k, v = kv.view(b, n, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return q, k, v


class ByName(Separate):
    """Calls that name all their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Conv1d(WIDTH, INNER, 1)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        q = F.conv1d(input=x.mT, weight=self.q.weight, bias=self.q.bias)
        q = torch.mul(input=torch.add(input=q, other=q), other=0.5)
        kv = F.linear(input=x, weight=self.kv.weight, bias=self.kv.bias)
        k, v = kv.view(b, n, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return q.view(b, self.heads, -1, n).mT, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = torch.matmul(input=q, other=k.mT)
        return torch.div(input=logits, other=q.shape[-1] ** 0.5).softmax(-1) @ v


class Transposed(Separate):
    """Falcon's layers multiply by transposed weights; others keep them transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.randn(WIDTH, INNER))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        _, k, v = super().project(x)
        q = x @ self.q.weight.T.to(x.dtype) + F.linear(x, self.turned.permute(1, 0))
        return q.view(b, n, self.heads, -1).transpose(1, 2), k, v


class Convolved(Attention):
    """Heads cut from the channels of an image, with a batch norm that does the scaling."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(WIDTH, 3 * INNER, 1, bias=False)
        self.norm = nn.BatchNorm2d(3 * INNER)
        self.proj = nn.Conv2d(INNER, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        image = x.transpose(1, 2).reshape(b, c, n, 1)
        q, k, v = self.norm(self.qkv(image)).view(b, 3, self.heads, -1, n).mT.unbind(1)
        return self.proj(self.attend(q, k, v).mT.reshape(b, -1, n, 1)).flatten(2).mT


class QueryReadTwice(Attention):
    """The query's rows end up in the output as well: scaling them would show."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v) + q.sigmoid()


class NotLinear(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q.sigmoid(), k, v)


class OwnQueries(Attention):
    """Queries and keys are the same rows."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, v)


def made(kind: type[Attention]) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return randomised(kind()).double(), torch.randn(2, 5, WIDTH).double()


@pytest.mark.parametrize(
    "kind",
    [
        *(Attention, ScaledQuery, DividedLogits, Rotated, Separate, LateBias, Converting, ByName),
        *(Transposed, Convolved),
    ],
    ids=lambda kind: kind.__name__,
)
def test_head_width_is_pruned_and_the_logits_keep_their_scale(kind: type[Attention]) -> None:
    model, x = made(kind)
    plan = cpx.plan(model, x, 0.5)
    assert plan.kept["proj.weight"][1].numel() == INNER // 2
    assert plan.rescalings
    # Heads stay, their width is halved: the default scale grows by sqrt(2).
    assert {round(r.factor, 6) for r in plan.rescalings} == {round(0.5**0.5, 6)}
    reference = run(zeroed(model, plan), x)
    assert relative_error(run(plan.apply(model), x), reference) < 1e-12
    again = cpx.PruningPlan.from_dict(plan.to_dict())
    assert relative_error(run(again.apply(model), x), reference) < 1e-12


@pytest.mark.parametrize("kind", [Attention, Separate, LateBias], ids=lambda kind: kind.__name__)
def test_without_the_rescaling_the_result_is_another(kind: type[Attention]) -> None:
    model, x = made(kind)
    plan = cpx.plan(model, x, 0.5)
    data = plan.to_dict()
    data["rescalings"] = data["rescalings"][:-1]
    changed = cpx.PruningPlan.from_dict(data)
    error = relative_error(run(changed.apply(model), x), run(zeroed(model, plan), x))
    assert error > 1e-6


@pytest.mark.parametrize(
    "kind", [QueryReadTwice, NotLinear, OwnQueries], ids=lambda kind: kind.__name__
)
def test_where_nothing_can_be_scaled_whole_heads_go(kind: type[Attention]) -> None:
    model, x = made(kind)
    whole = nn.Sequential(nn.Linear(WIDTH, WIDTH), model).double()
    plan = cpx.plan(whole, x, 0.5)
    assert not plan.rescalings
    kept = plan.kept["1.proj.weight"][1]
    assert kept.tolist() in (list(range(INNER // 2)), list(range(INNER // 2, INNER)))
    assert relative_error(run(plan.apply(whole), x), run(zeroed(whole, plan), x)) < 1e-12
    # The width of the heads stays, but not the channels.
    assert not [f for f in plan.frozen if f.entry == "1.qkv.weight"]
    with pytest.raises(NothingToPruneError, match=r"cannot be folded into a weight .*test_scales"):
        cpx.plan(whole, x, 0.5, kinds=("head_dim",), ignore=("0",))


def test_dtype_is_that_of_the_parameter() -> None:
    model, x = made(Attention)
    model.half()
    plan = cpx.plan(model, x.half(), 0.5)
    pruned = plan.apply(model)
    assert pruned.qkv.weight.dtype == torch.float16
    assert pruned.qkv.weight.requires_grad
    assert torch.equal(model.qkv.weight, made(Attention)[0].half().qkv.weight)  # left alone
    plan.apply(model.float(), verify="numeric", example_inputs=x.float())

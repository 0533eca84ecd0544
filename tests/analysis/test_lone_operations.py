"""Operations that belong to no Python-level call: constructors, TorchScript, torch.func."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import randomised, relative_error, run, zeroed
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext.analysis.trace import trace_model
from chanprune_ext.errors import VerificationError

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.jit.script
def scripted_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


@torch.jit.script
def scripted_constants(x: Tensor) -> Tensor:
    return x * torch.tensor(0.5) * torch.ones(1) + torch.arange(8).to(x.dtype)


@torch.jit.script
def scripted_gate(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, 1)
    return value * torch.sigmoid(gate)


@torch.jit.script
def scripted_mean_scale(x: Tensor) -> Tensor:
    return x / math.sqrt(x.size(1))


@torch.jit.script
def scripted_product(x: Tensor, n: int) -> Tensor:
    return x * n


@torch.jit.script
def scripted_positions(x: Tensor) -> Tensor:
    return x + torch.linspace(0, float(x.size(1)), 8)


@torch.jit.script
def scripted_tail(x: Tensor) -> Tensor:
    return x[:, 4:]


@torch.jit.script
def scripted_groups(x: Tensor, weight: Tensor) -> Tensor:
    return torch.conv2d(x, weight, groups=4)


@torch.jit.script
def scripted_group_norm(x: Tensor) -> Tensor:
    return torch.group_norm(x, 4)


@torch.jit.script
def scripted_layer_norm(x: Tensor) -> Tensor:
    return torch.layer_norm(x.transpose(1, 3), [x.size(1)]).transpose(1, 3)


class Net(nn.Module):
    """Whatever is between ``b`` and ``c``."""

    def __init__(self, between: Callable[[Tensor], Tensor], left: int = 16) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 16, 1)
        self.c = nn.Conv2d(left, 8, 1)
        self.d = nn.Conv2d(8, 4, 1)

        def run_between(x: Tensor) -> Tensor:
            return between(x)

        self.between = run_between  # a scripted function of its own cannot be copied

    def forward(self, x: Tensor) -> Tensor:
        return self.d(F.relu(self.c(self.between(F.relu(self.b(F.relu(self.a(x))))))))


def pruned_exactly(model: nn.Module, inputs: Any = IMAGES) -> cpx.PruningPlan:
    plan = cpx.plan(model, inputs, 0.5)
    assert relative_error(run(plan.apply(model), inputs), run(zeroed(model, plan), inputs)) < 1e-12
    return plan


def widths(plan: cpx.PruningPlan) -> dict[str, int]:
    return {group.name: group.width_after for group in plan.groups}


def net(between: Callable[[Tensor], Tensor], left: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return randomised(Net(between, left))


FEW = [0.5 + i / 8 for i in range(8)]


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x - torch.FloatTensor(FEW),
        lambda x: x - torch.Tensor(FEW),
        lambda x: x - torch.from_numpy(np.array(FEW, dtype=np.float32)),
        lambda x: x - torch.FloatTensor([FEW] * 8),
        lambda x: x[..., torch.LongTensor([2, 1, 0])],
        lambda x: x * torch.Tensor(2, 1, 1, 1).fill_(2),
        scripted_gelu,
        scripted_constants,
        lambda x: scripted_gate(torch.cat([x, x], 1)),
        lambda x: scripted_product(x, 3),
        torch.vmap(F.gelu),
        torch.vmap(lambda v: v - v.amax(1, keepdim=True)),
        torch.vmap(lambda v: v * v.mean(), in_dims=1, out_dims=1),
    ],
    ids=[
        *("FloatTensor", "Tensor", "from_numpy", "large", "LongTensor", "sizes", "gelu"),
        *("constants", "chunk", "number", "vmap", "per_sample", "per_channel"),
    ],
)
def test_all_channels_may_go(between: Callable[[Tensor], Tensor]) -> None:
    model = net(between)
    for _ in range(3):  # TorchScript changes what it runs after a run or two
        assert widths(pruned_exactly(model)) == {"a": 4, "b": 8, "c": 4}


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (lambda x: x / torch.FloatTensor([x.shape[1]]).sqrt(), "(16.0,) to (8.0,)"),
        (lambda x: x * torch.from_numpy(np.array([x.shape[1]])), "lift_fresh"),
        (lambda x: x + torch.FloatTensor([x.shape[1] + i for i in range(64)]).view(8, 8), ""),
        (scripted_mean_scale, "(4.0,) to"),
        (lambda x: scripted_product(x, x.shape[1]), "16 to"),
        (scripted_positions, "(16.0,) to (8.0,)"),
        (torch.vmap(lambda v: v / v.shape[0]), "16 to"),
    ],
    ids=["constant", "array", "large", "size", "given", "positions", "vmap"],
)
def test_a_number_that_follows_a_width_keeps_it(
    between: Callable[[Tensor], Tensor], why: str
) -> None:
    plan = pruned_exactly(net(between))
    assert widths(plan) == {"a": 4, "b": 16, "c": 4}
    held = next(frozen for frozen in plan.frozen if frozen.entry == "b.weight")
    assert why in held.why
    assert held.source.startswith("test_lone_operations.py")


def test_what_is_in_front_of_a_fixed_slice_stays() -> None:
    for between in (scripted_tail, torch.vmap(lambda v: v[4:])):
        plan = pruned_exactly(net(between, 12))
        assert plan.kept["b.weight"][0][:4].tolist() == [0, 1, 2, 3]
        assert widths(plan)["b"] < 16


def test_scripted_norms_are_as_any_other() -> None:
    def layer_norm(x: Tensor) -> Tensor:
        return F.layer_norm(x.transpose(1, 3), [x.size(1)]).transpose(1, 3)

    for scripted, eager in (
        (scripted_group_norm, lambda x: F.group_norm(x, 4)),
        (scripted_layer_norm, layer_norm),
    ):
        plan, expected = (cpx.plan(net(between), IMAGES, 0.5) for between in (scripted, eager))
        assert plan.groups == expected.groups
        assert widths(plan)["b"] == 8


def test_groups_of_a_scripted_convolution_stay() -> None:
    class Grouped(Net):
        def __init__(self) -> None:
            super().__init__(torch.relu)
            self.weight = nn.Parameter(torch.randn(16, 4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.d(F.relu(self.c(scripted_groups(self.b(F.relu(self.a(x))), self.weight))))

    torch.manual_seed(0)
    plan = pruned_exactly(randomised(Grouped()))
    assert plan.kept["b.weight"][0].div(4, rounding_mode="floor").unique().tolist() == [0, 1, 2, 3]


def test_each_is_numbered_as_a_call_of_its_own() -> None:
    """And the Python code that torch runs for an operation on stand-ins is not."""
    for between, names in (
        (lambda x: x - torch.FloatTensor(FEW), ["aten::lift_fresh", "sub"]),
        (scripted_mean_scale, ["aten::div"]),
        (torch.vmap(torch.tanh), ["aten::tanh"]),
    ):
        trace = trace_model(net(between), IMAGES)
        assert trace.substrate == "meta"
        assert [call.name for call in trace.calls[4:-3]] == names


class Attention(nn.Module):
    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

        def run_attend(*qkv: Tensor) -> Tensor:
            return attend(*qkv)

        self.attend = run_attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x * torch.FloatTensor([2.0])), self.k(x), self.v(x)
        return self.o(self.attend(q, k, v))


@torch.jit.script
def scripted_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / math.sqrt(k.shape[-1])).softmax(-1) @ v


def attention(substrate: str, attend: Callable[..., Tensor]) -> nn.Module:
    def on_cpu(q: Tensor, *kv: Tensor) -> Tensor:
        return attend(q * torch.ones(1, device="cpu"), *kv)

    torch.manual_seed(0)
    return randomised(Attention(attend if substrate == "meta" else on_cpu)).double()


STATES = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("substrate", ["meta", "fake"])
def test_a_scale_behind_a_constant_is_folded(substrate: str) -> None:
    plan = pruned_exactly(attention(substrate, _attention), STATES)
    assert plan.options["substrate"] == substrate
    assert plan.rescalings
    assert "q.weight" in plan.kept


@pytest.mark.parametrize("substrate", ["meta", "fake"])
def test_the_scale_that_a_scripted_attention_implies_stays(substrate: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scripted_attention(q + v, k, q + v)

    with pytest.raises(VerificationError, match=r"has changed from \(\d\.\d+,\)"):
        cpx.plan(attention(substrate, attend), STATES)


def test_scripted_modules_without_weights_are_followed() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.SiLU(), nn.Dropout()))
    torch.manual_seed(0)
    model = randomised(Net(nn.Identity()))
    model.between = scripted
    assert widths(pruned_exactly(model)) == {"a": 4, "b": 8, "c": 4}

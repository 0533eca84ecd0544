"""The numbered sequence of calls: recorded, tapped, and the same in a pruned copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import network, randomised
from torch import Tensor, nn
from toys import TOYS

import chanprune_ext as cpx
from chanprune_ext.analysis.call_trace import record_calls, tap_calls
from chanprune_ext.analysis.calls import steady_calls, tensors_in
from chanprune_ext.errors import AnalysisError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)
        self.block = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.w = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(self.a(x))
        if y.shape[1] > 100:  # a question, not a call
            return y
        y += self.w
        z = torch.cat([y, y], 1)
        z[:, 0] = 0
        return z.flatten(1)


IMAGES = torch.randn(2, 3, 6, 6)


def test_names_modules_and_sources() -> None:
    trace = record_calls(Net(), IMAGES)
    assert [(c.name, c.module) for c in trace.calls] == [
        ("conv2d", "a"),
        ("batch_norm", "block.0"),
        ("relu_", "block.1"),
        ("add_", ""),
        ("cat", ""),
        ("__setitem__", ""),
        ("flatten", ""),
    ]
    assert [c.index for c in trace.calls] == list(range(7))
    lines = {c.name: c.source for c in trace.calls}
    assert {s.split(":")[0] for s in lines.values()} == {"test_calls.py"}
    assert int(lines["flatten"].split(":")[1]) == int(lines["__setitem__"].split(":")[1]) + 1


def test_values_link_calls() -> None:
    trace = record_calls(Net(), IMAGES)
    conv, norm, relu, add, cat, write, flat = trace.calls
    assert norm.inputs[0] == conv.outputs[0]
    assert relu.inputs == norm.outputs
    # An in-place call makes a new value of the same tensor.
    assert relu.outputs != relu.inputs
    assert add.inputs[0] == relu.outputs[0]
    assert cat.inputs == (add.outputs[0], add.outputs[0])
    assert write.inputs[0] == cat.outputs[0]
    assert flat.inputs == write.outputs
    assert trace.output_values == frozenset(flat.outputs)
    assert trace.consumers()[add.outputs[0]] == [cat.index]
    assert trace.producer()[flat.outputs[0]] == flat.index
    assert set(conv.parameters.values()) == {"a.weight", "a.bias"}
    assert set(norm.parameters.values()) == {
        f"block.0.{name}" for name in ("weight", "bias", "running_mean", "running_var")
    }
    assert list(add.parameters.values()) == ["w"]


def test_functions_made_of_others_show_their_parts() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    names = [c.name for c in record_calls(attention, (torch.randn(1, 5, 8),) * 3).calls]
    assert "linear" in names
    assert "softmax" in names
    assert "view" in names
    assert "multi_head_attention_forward" not in names


def test_torch_is_left_as_it_was() -> None:
    before = (
        torch.nn.functional.has_torch_function,
        torch.nn.functional.has_torch_function_unary,
        torch.functional.has_torch_function,
        torch.backends.mha.get_fastpath_enabled(),
    )
    model = Net().train()
    model.block[0].eval()
    flags = [m.training for m in model.modules()]
    record_calls(model, IMAGES)
    with pytest.raises(AnalysisError):
        record_calls(model, torch.randn(2, 5, 6, 6))
    with steady_calls(model), steady_calls(model):
        pass
    assert before == (
        torch.nn.functional.has_torch_function,
        torch.nn.functional.has_torch_function_unary,
        torch.functional.has_torch_function,
        torch.backends.mha.get_fastpath_enabled(),
    )
    assert [m.training for m in model.modules()] == flags
    hooks = torch.nn.modules.module
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks


def test_eval_mode_without_gradients() -> None:
    class Mode(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            assert not torch.is_grad_enabled()
            return x + 1

    model = Mode().train()
    record_calls(model, IMAGES)
    tap_calls(model, IMAGES)
    assert model.training


def test_inputs_by_position_and_by_name() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> dict[str, Any]:
            return {"difference": a - b, "more": [a + b]}

    a, b = torch.ones(2), torch.zeros(2)
    for inputs in ((a, b), {"b": b, "a": a}):
        trace = record_calls(Two(), inputs)
        assert [c.name for c in trace.calls] == ["sub", "add"]
        assert len(trace.output_values) == 2
        output = tap_calls(Two(), inputs)
        assert torch.equal(output["difference"], torch.ones(2))


def test_tied_parameters_have_their_first_name() -> None:
    torch.manual_seed(0)
    model = TOYS["TiedParameter"].make()
    names = [
        n for c in record_calls(model, torch.randn(1, 3, 8, 8)).calls for n in c.parameters.values()
    ]
    assert names.count("encode.weight") == 2
    assert "decode.weight" not in names


def test_error_names_the_module() -> None:
    with pytest.raises(AnalysisError, match=r"'a'.*expected input"):
        record_calls(Net(), torch.randn(2, 5, 6, 6))


def test_taps_see_the_very_tensors() -> None:
    model = Net().eval()
    seen: dict[str, Any] = {}

    def double_weight(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["weight"] = args[1]
        args[1].mul_(2)

    plain = model.a(IMAGES)
    tap_calls(
        model,
        IMAGES,
        before={0: double_weight},
        after={0: lambda y: seen.update(conv=y.clone()), 5: lambda z: seen.update(written=z)},
    )
    assert seen["weight"] is model.a.weight
    bias = model.a.bias[:, None, None]
    assert torch.allclose(seen["conv"], 2 * (plain - bias) + bias, atol=1e-5)
    assert (seen["written"][:, 0] == 0).all()
    assert seen["written"].shape == (2, 8, 4, 4)


def test_stop_early() -> None:
    model = Net()
    calls: list[str] = []
    model.block.register_forward_hook(lambda *_: calls.append("block"))
    assert tap_calls(model, IMAGES, stop_after=0) is None
    assert calls == []
    assert tap_calls(model, IMAGES, stop_after=2) is None
    assert tap_calls(model, IMAGES).shape == (2, 128)


@pytest.mark.parametrize("name", ["resnet56", "shufflenet_v2_x1_0", "efficientnet_b0"])
def test_a_pruned_network_makes_the_same_calls(name: str) -> None:
    model, inputs = network(name)
    pruned = cpx.prune(model, inputs, 0.5)
    before, after = record_calls(model, inputs), record_calls(pruned, inputs)
    assert [(c.name, c.module, c.inputs, c.outputs) for c in before.calls] == [
        (c.name, c.module, c.inputs, c.outputs) for c in after.calls
    ]


@pytest.mark.parametrize("toy", ["Checkpointed", "Einsum", "FilledBuffer", "LongShortTermMemory"])
def test_positions_are_the_same_every_time(toy: str) -> None:
    torch.manual_seed(0)
    model, inputs = randomised(TOYS[toy].make()), TOYS[toy].inputs()
    names = [c.name for c in record_calls(model, inputs).calls]
    assert names == [c.name for c in record_calls(model, inputs).calls]
    seen: list[int] = []
    tap_calls(model, inputs, after={i: lambda _, i=i: seen.append(i) for i in range(len(names))})
    assert seen == list(range(len(names)))


def test_a_module_made_on_the_fly_runs_under_its_parent() -> None:
    class Maker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return nn.Sigmoid()(self.inner(x)) + F.relu(x)

    calls = record_calls(Maker(), IMAGES).calls
    assert [(c.name, c.module) for c in calls] == [
        ("relu", "inner.0"),
        ("sigmoid", ""),
        ("relu", ""),
        ("add", ""),
    ]


@dataclass
class Sizes:
    """Settings of which one differs between layers, and can't be read of all at once."""

    width: int
    head_dim: int
    table: Tensor

    def __getattribute__(self, name: str) -> Any:
        if name == "head_dim":
            raise RuntimeError("every layer has one of its own")
        return super().__getattribute__(name)


@dataclass(slots=True)
class Slotted:
    table: Tensor


def test_tensors_of_settings_that_refuse_to_be_read() -> None:
    table = torch.ones(3)
    assert tensors_in([Sizes(16, 4, table), Slotted(table)]) == [table, table]

    class Configured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = Sizes(16, 4, table)
            self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x).view(-1, self.config.width))
            return out

    small = cpx.prune(Configured(), torch.randn(3, 4), 0.5)
    assert (small.a.out_features, small.config.width) == (8, 8)

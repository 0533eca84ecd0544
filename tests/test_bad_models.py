"""Models that cannot be followed: each is refused or kept whole, with the place and the reason."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from models import randomised, relative_error, run, zeroed
from torch import Tensor, nn
from torch.library import custom_op

import chanprune_ext as cpx
from chanprune_ext.errors import AnalysisError, InvalidArgumentError, NothingToPruneError

if TYPE_CHECKING:
    from pathlib import Path

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 4, 1)


class Branches(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y.relu() if x.mean() > 0 else y.tanh())


def test_a_branch_on_values_is_followed_on_real_tensors_and_told() -> None:
    torch.manual_seed(0)
    model = randomised(Branches())
    with pytest.warns(UserWarning, match=r"reads values of tensors \(test_bad_models.py:\d+\)"):
        plan = cpx.plan(model, X, 0.5)
    assert plan.options["substrate"] == "real"
    assert relative_error(run(plan.apply(model), X), run(zeroed(model, plan), X)) < 1e-12


def test_a_model_that_reads_no_values_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cpx.plan(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)), X, 0.5)


def test_a_branch_on_values_of_a_meta_model_names_its_line() -> None:
    with torch.device("meta"):
        model = Branches()
    with pytest.raises(AnalysisError, match=r"at test_bad_models.py:\d+.*give it real ones"):
        cpx.plan(model, X.to("meta"), 0.5, criterion="random")


def test_values_that_leave_torch_keep_their_channels() -> None:
    class ThroughNumpy(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.from_numpy(np.maximum(self.a(x).numpy(), 0)))

    with (
        pytest.warns(UserWarning, match="reads values"),
        pytest.raises(NothingToPruneError, match=r"values leave torch \(test_bad_models.py:\d+\)"),
    ):
        cpx.plan(ThroughNumpy(), X, 0.5)


def test_the_models_own_error_is_told_with_its_line() -> None:
    class Troubled(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.a(x)
            raise ValueError("my own trouble")

    with pytest.raises(
        AnalysisError, match=r"ValueError at test_bad_models.py:\d+: my own"
    ) as info:
        cpx.plan(Troubled(), X, 0.5)
    assert "while tracing" in str(info.value)
    assert isinstance(info.value.__cause__, ValueError)


@pytest.mark.parametrize("change", ["data", "no_grad", "assign"])
def test_a_forward_that_changes_its_parameters_leaves_the_model_alone(change: str) -> None:
    class Changing(Net):
        def forward(self, x: Tensor) -> Tensor:
            if change == "data":
                self.a.weight.data.mul_(0.5)
            elif change == "no_grad":
                with torch.no_grad():
                    self.a.weight.clamp_(-0.01, 0.01)
            else:
                self.a.weight = nn.Parameter(self.a.weight.detach() * 0.5)
            return self.b(self.a(x).relu())

    torch.manual_seed(0)
    model = Changing()
    weight = model.a.weight
    before = weight.clone()
    try:
        cpx.plan(model, X, 0.5)
    except NothingToPruneError:
        assert change == "assign"
    assert model.a.weight is weight
    assert torch.equal(weight, before)


@custom_op("chanprune_tests::gate", mutates_args=())
def gate(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Gated(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.ops.chanprune_tests.gate(self.a(x)))


def test_an_operation_of_ones_own_freezes_and_is_named() -> None:
    with pytest.raises(NothingToPruneError, match=r"no rule for chanprune_tests::gate \(test_bad"):
        cpx.plan(Gated(), X, 0.5)


def test_one_function_teaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from chanprune_ext.analysis.rules import registry

    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))

    @cpx.register_rule("chanprune_tests::gate")
    def rule(tracer: Any, func: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        tracer.set(output, tracer.dims(args[0]))

    torch.manual_seed(0)
    model = randomised(Gated())
    plan = cpx.plan(model, X, 0.5)
    assert len(plan.kept["a.weight"][0]) == 4
    assert relative_error(run(plan.apply(model), X), run(zeroed(model, plan), X)) < 1e-12


def test_wrappers_that_hold_the_parameters_are_refused(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
        wrapped = nn.parallel.DistributedDataParallel(model)
        for outer in (wrapped, nn.Sequential(wrapped)):
            with pytest.raises(InvalidArgumentError, match="wrapped in DistributedDataParallel"):
                cpx.plan(outer, X, 0.5)
        # As docs/recipes.md has it: a pruned copy, wrapped.
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            wrapped(X).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            plan = cpx.plan(wrapped.module, X, 0.5)
            copied = plan.apply(wrapped.module, optimizer=optimizer)
            wrapped = nn.parallel.DistributedDataParallel(copied)
        assert wrapped.module[0].out_channels == 2
    finally:
        torch.distributed.destroy_process_group()


def test_control_flow_operators_are_kept_whole() -> None:
    class Conditional(Net):
        def forward(self, x: Tensor) -> Tensor:
            taken = torch.cond(torch.tensor(True), torch.relu, torch.sigmoid, (self.a(x),))
            return self.b(taken)

    with pytest.raises(NothingToPruneError, match="operator cond"):
        cpx.plan(Conditional(), X, 0.5)


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_are_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    packed = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(InvalidArgumentError, match=r"quantised layer: '1' is a .*prune the float"):
        cpx.plan(packed, X, 0.5)


def test_helpers_of_a_later_quantisation_are_followed() -> None:
    class Float(Net):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(3, 8, 1)
            self.d = nn.Conv2d(16, 4, 1)
            self.f = torch.ao.nn.quantized.FloatFunctional()

        def forward(self, x: Tensor) -> Tensor:
            f, a, c = self.f, self.a(x), self.c(x)
            return f.add(self.b(f.add_relu(a, c)), self.d(f.cat([f.mul(a, c), a], 1)))

    torch.manual_seed(0)
    model = randomised(Float())
    plan = cpx.plan(model, X, 0.5)
    assert plan.kept["a.weight"][0].numel() == 4
    assert relative_error(run(plan.apply(model), X), run(zeroed(model, plan), X)) < 1e-12


def test_parameters_that_are_not_plain_tensors_are_refused() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    weight = model[0].weight.detach()
    model[0].weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    with pytest.raises(InvalidArgumentError, match=r"'0.weight' is a TwoTensor"):
        cpx.plan(model, torch.randn(2, 8), 0.5)

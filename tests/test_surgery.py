"""What surgery changes, what it leaves alone, and that it does all of it or nothing."""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from models import randomised, relative_error, run, zeroed
from torch import Tensor, nn
from toys import TOYS

import chanprune_ext as cpx
from chanprune_ext import surgery, widths
from chanprune_ext.copying import copied
from chanprune_ext.errors import InvalidArgumentError, PlanMismatchError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Net(nn.Module):
    """Two convolutions with batch norm and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 6, 3, padding=1, groups=2)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(F.relu(self.bn(self.a(x))))).mean((2, 3)))


def made(name: str = "") -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    if name:
        return randomised(TOYS[name].make()), TOYS[name].inputs()
    return randomised(Net()), torch.randn(2, 3, 8, 8)


def plan_for(model: nn.Module, inputs: Any, **options: Any) -> cpx.PruningPlan:
    return cpx.plan(model, inputs, 0.5, **options)


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Everything a model carries is the same object with the same content afterwards."""

    def snapshot() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path, module in model.named_modules():
            for name, value in module.__dict__.items():
                held = value.items() if isinstance(value, dict) else [("", value)]
                for key, item in held:
                    grad = item.grad if isinstance(item, Tensor) and item.is_leaf else None
                    content = item.detach().clone() if isinstance(item, Tensor) else item
                    found[f"{path}/{name}/{key}"] = (id(item), content, grad, id(grad))
        return found

    before = snapshot()
    yield
    after = snapshot()
    assert before.keys() == after.keys()
    for key, (identity, content, grad, grad_identity) in before.items():
        other = after[key]
        assert identity == other[0], key
        assert grad_identity == other[3], key
        assert grad is None or torch.equal(grad, other[2]), key
        if isinstance(content, Tensor):
            assert content.shape == other[1].shape, key
            assert torch.equal(content, other[1]), key
        elif isinstance(content, (int, float, str, tuple, bool)):
            assert content == other[1], key


# -- what changes --------------------------------------------------------------------------------


def test_weights_are_the_kept_slices() -> None:
    model, inputs = made()
    plan = plan_for(model, inputs)
    pruned = plan.apply(model)
    state = pruned.state_dict()
    for name, tensor in model.state_dict().items():
        expected = tensor
        for dim, kept in plan.kept.get(name, {}).items():
            expected = expected.index_select(dim, kept)
        assert torch.equal(state[name], expected), name


def test_widths_on_modules_follow() -> None:
    model, inputs = made()
    pruned = plan_for(model, inputs).apply(model)
    assert (pruned.a.in_channels, pruned.a.out_channels) == (3, 4)
    assert pruned.bn.num_features == 4
    assert (pruned.b.in_channels, pruned.b.out_channels, pruned.b.groups) == (4, 4, 2)
    assert (pruned.fc.in_features, pruned.fc.out_features) == (4, 4)
    assert "Conv2d(4, 4" in str(pruned)


@pytest.mark.parametrize(
    ("toy", "path", "attributes"),
    [
        ("Depthwise", "dw.0", {"in_channels": 8, "out_channels": 8, "groups": 8}),
        ("DepthwiseMultiplier", "dw.0", {"in_channels": 8, "out_channels": 16, "groups": 8}),
        ("TransposedConvolutions", "up", {"in_channels": 8, "out_channels": 6}),
        ("TransposedConvolutions", "grouped", {"in_channels": 6, "out_channels": 9, "groups": 3}),
        ("PReLUs", "each", {"num_parameters": 8}),
        ("PReLUs", "one", {"num_parameters": 1}),
        ("GroupNorm4", "norm", {"num_channels": 8, "num_groups": 4}),
        ("LayerNormOverChannels", "norm.norm", {"normalized_shape": (8,)}),
        ("LayerNormPlain", "norm.norm", {"normalized_shape": (8,)}),
        ("RMSNormOverChannels", "norm.norm", {"normalized_shape": (8,)}),
        ("InstanceNormAffine", "norm", {"num_features": 8}),
        ("InstanceNormPlain", "norm", {"num_features": 8}),
        ("Embedded", "table", {"num_embeddings": 20, "embedding_dim": 8}),
        ("UnflattenLayer", "grid", {"unflattened_size": (6, 4, 4)}),
        ("SplitByAttribute", "", {"sizes": [2, 6]}),
        ("LongShortTermMemory", "lstm", {"input_size": 8, "hidden_size": 4}),
        ("ComparedSizes", "", {"width": 8}),
    ],
)
def test_attributes(toy: str, path: str, attributes: dict[str, Any]) -> None:
    model, inputs = made(toy)
    pruned = plan_for(model, inputs).apply(model)
    module = pruned.get_submodule(path)
    for name, value in attributes.items():
        found = getattr(module, name)
        assert found == value
        kinds = [type(v) for v in found] if isinstance(found, (tuple, list)) else [type(found)]
        assert set(kinds) == {int}, "a traced size has leaked into the model"


def test_the_plan_is_attached() -> None:
    model, inputs = made()
    plan = plan_for(model, inputs)
    assert cpx.plan_of(model) is None
    assert cpx.plan_of(plan.apply(model)) is plan


# -- what is left alone --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "toy", ["", "WeightNormHook", "StoresOnItself", "SharedModuleUnderTwoPaths"]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_original_is_untouched(toy: str) -> None:
    model, inputs = made(toy)
    before = run(model, inputs)
    with unchanged(model):
        pruned = plan_for(model, inputs).apply(model)
    assert relative_error(run(model, inputs), before) == 0
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
        for buffer in pruned.buffers():
            buffer.zero_()
    assert relative_error(run(model, inputs), before) == 0, "pruned and original share memory"


@pytest.mark.parametrize("inplace", [False, True])
def test_flags_hooks_and_attributes_survive(inplace: bool) -> None:
    model, inputs = made()
    model.train()
    model.bn.eval()
    model.a.weight.requires_grad_(False)
    model.fc.bias.requires_grad_(False)
    model.b.weight.decay = 0.1
    model.fc.bias.decay = {"rate": 0.2}
    calls: list[str] = []
    model.bn.register_forward_hook(lambda *_: calls.append("forward"))
    model.fc.register_forward_pre_hook(lambda *_: calls.append("pre"))
    plan = plan_for(model, inputs)
    pruned = plan.apply(model, inplace=inplace)
    assert pruned.training
    assert pruned.b.training
    assert not pruned.bn.training
    frozen = {n for n, p in pruned.named_parameters() if not p.requires_grad}
    assert frozen == {"a.weight", "fc.bias"}
    assert pruned.b.weight.decay == 0.1
    assert pruned.fc.bias.decay == {"rate": 0.2}
    calls.clear()
    pruned(inputs)
    assert calls == ["forward", "pre"]


class Marked(nn.Parameter):
    """A parameter subclass, as quantisation and sharding libraries use."""


def test_parameter_subclasses_survive() -> None:
    model, inputs = made()
    model.a.weight = Marked(model.a.weight.detach())
    model.fc.bias = Marked(model.fc.bias.detach())
    pruned = plan_for(model, inputs).apply(model)
    assert type(pruned.a.weight) is Marked
    assert type(pruned.fc.bias) is Marked
    assert type(pruned.b.weight) is nn.Parameter


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_survives(dtype: torch.dtype) -> None:
    model, inputs = made()
    model.to(dtype)
    pruned = plan_for(model, inputs.to(dtype)).apply(model)
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    assert pruned.bn.running_var.dtype == dtype
    assert pruned.bn.num_batches_tracked.dtype == torch.int64


def test_mixed_dtypes_survive() -> None:
    model, inputs = made()
    model.fc.double()
    head = model.forward

    def forward(x: Tensor) -> Tensor:
        x = F.relu(model.b(F.relu(model.bn(model.a(x))))).mean((2, 3))
        return model.fc(x.double())

    assert head is not forward
    model.forward = forward  # type: ignore[method-assign]
    plan = plan_for(model, inputs)
    plan.apply(model, inplace=True)
    assert model.fc.weight.dtype == torch.float64
    assert model.a.weight.dtype == torch.float32
    assert model(inputs).shape == (2, 4)


@pytest.mark.parametrize("inplace", [False, True])
def test_channels_last_survives(inplace: bool) -> None:
    model, inputs = made("ChannelsLast")
    dense = [n for n, p in model.named_parameters() if p.dim() == 4 and p.shape[1] > 1]
    pruned = plan_for(model, inputs).apply(model, inplace=inplace)
    parameters = dict(pruned.named_parameters())
    for name in dense:
        weight = parameters[name]
        assert weight.is_contiguous(memory_format=torch.channels_last), name
    assert any(not parameters[n].is_contiguous() for n in dense)


def test_tied_weights_stay_tied() -> None:
    model, inputs = made("TiedParameter")
    pruned = plan_for(model, inputs).apply(model)
    assert pruned.encode.weight is pruned.decode.weight
    assert pruned.encode.weight.shape == (6, 8, 1, 1)
    assert sum(1 for _ in pruned.parameters()) == sum(1 for _ in model.parameters())


def test_shared_modules_stay_shared() -> None:
    model, inputs = made("SharedModuleUnderTwoPaths")
    pruned = plan_for(model, inputs).apply(model)
    assert pruned.a[0] is pruned.b[0]
    assert pruned.a[1] is not pruned.b[1]


def test_parametrisations_survive() -> None:
    model, inputs = made("WeightNormParametrised")
    pruned = plan_for(model, inputs).apply(model)
    assert torch.nn.utils.parametrize.is_parametrized(pruned.a, "weight")
    torch.nn.utils.parametrize.remove_parametrizations(pruned.a, "weight")
    assert pruned.a.weight.shape == (8, 3, 3, 3)


def test_looking_at_a_weight_does_not_change_the_model() -> None:
    """In training mode spectral norm moves its buffers on whenever its weight is read."""
    model, inputs = made("SpectralNorm")
    model.train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    plan = plan_for(model, inputs)
    pruned = plan.apply(model)
    for name, tensor in pruned.state_dict().items():
        expected = state[name]
        for dim, kept in plan.kept.get(name, {}).items():
            expected = expected.index_select(dim, kept)
        assert torch.equal(tensor, expected), name
    assert pruned.a.training


def test_buffers_keep_their_kind() -> None:
    model, inputs = made("ChannelVectors")
    pruned = plan_for(model, inputs).apply(model)
    assert pruned.mean.shape == (1, 8, 1, 1)
    assert "mean" in pruned.state_dict()
    assert "spread" not in pruned.state_dict()
    assert pruned.spread.shape == (8,)


@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_are_sliced(inplace: bool) -> None:
    model, inputs = made()
    model(inputs).square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    plan = plan_for(model, inputs)
    pruned = plan.apply(model, inplace=inplace)
    for name, parameter in pruned.named_parameters():
        expected = gradients[name]
        for dim, kept in plan.kept.get(name, {}).items():
            expected = expected.index_select(dim, kept)
        assert torch.equal(parameter.grad, expected), name
    if not inplace:
        assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters())


def test_inplace_keeps_identity() -> None:
    model, inputs = made()
    plan = plan_for(model, inputs)
    expected = plan.apply(model).state_dict()
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    assert plan.apply(model, inplace=True) is model
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert all(m is modules[n] for n, m in model.named_modules())
    assert all(torch.equal(v, expected[n]) for n, v in model.state_dict().items())
    assert cpx.plan_of(model) is plan


def test_inplace_needs_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that cannot be copied can be pruned in place, and is told apart otherwise."""
    model, inputs = made()

    class Lock(nn.Module):
        def __deepcopy__(self, memo: dict[int, Any]) -> Lock:
            raise TypeError("a lock cannot be copied")

        def forward(self, x: Tensor) -> Tensor:
            return x

    model.bn.add_module("lock", Lock())
    plan = plan_for(model, inputs)
    with unchanged(model), pytest.raises(InvalidArgumentError, match=r"lock.*inplace=True"):
        plan.apply(model)
    assert plan.apply(model, inplace=True).a.out_channels == 4


# -- optimizers ----------------------------------------------------------------------------------


def _optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for n, p in model.named_parameters() if n.startswith("a")], "lr": 0.01},
        {"params": [p for n, p in model.named_parameters() if not n.startswith("a")]},
    ]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-3)
    if kind == "adam":
        return torch.optim.Adam(groups, lr=0.1, amsgrad=True)
    if kind == "rmsprop":
        return torch.optim.RMSprop(groups, lr=0.1, momentum=0.5, centered=True)
    return torch.optim.Adafactor(groups, lr=0.1)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any) -> None:
    optimizer.zero_grad()
    model(inputs).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "adam", "rmsprop"])
def test_optimizer_goes_on(kind: str, inplace: bool) -> None:
    """The next step equals that of an optimizer built by hand with the sliced state."""
    model, inputs = made()
    optimizer = _optimizer(kind, model)
    for _ in range(3):
        _step(model, optimizer, inputs)
    plan = plan_for(model, inputs)

    twin = plan.apply(model)
    fresh = _optimizer(kind, twin)
    state = copy.deepcopy(optimizer.state_dict())
    order = [n for n, _ in model.named_parameters() if n.startswith("a")]
    order += [n for n, _ in model.named_parameters() if not n.startswith("a")]
    for position, values in state["state"].items():
        name = order[position]
        for key, value in values.items():
            if value.dim():
                for dim, kept in plan.kept.get(name, {}).items():
                    value = value.index_select(dim, kept)
                values[key] = value
    fresh.load_state_dict(state)

    pruned = plan.apply(model, inplace=inplace, optimizer=optimizer)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    named = dict(pruned.named_parameters())
    assert [id(p) for p in held] == [id(named[n]) for n in order]
    assert optimizer.state.keys() == set(held)
    assert optimizer.param_groups[0]["lr"] == 0.01
    for _ in range(2):
        _step(twin, fresh, inputs)
        _step(pruned, optimizer, inputs)
    for (name, a), b in zip(pruned.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_factored_moments_are_sliced() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    inputs = torch.randn(4, 6)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.1)
    _step(model, optimizer, inputs)
    before = {k: v.clone() for k, v in optimizer.state[model[2].weight].items()}
    plan = plan_for(model, inputs)
    pruned = plan.apply(model, optimizer=optimizer)
    after = optimizer.state[pruned[2].weight]
    kept = plan.kept["2.weight"]
    assert torch.equal(after["row_var"], before["row_var"][kept[0]])
    assert torch.equal(after["col_var"], before["col_var"][:, kept[1]])
    _step(pruned, optimizer, inputs)


def test_optimizer_of_another_model_is_refused() -> None:
    model, inputs = made()
    plan = plan_for(model, inputs)
    other = torch.optim.SGD(made()[0].parameters(), lr=0.1)
    with (
        unchanged(model),
        pytest.raises(InvalidArgumentError, match="optimizer holds no parameter"),
    ):
        plan.apply(model, inplace=True, optimizer=other)


def test_what_is_no_optimizer_or_no_model_is_refused() -> None:
    model, inputs = made()
    plan = plan_for(model, inputs)
    with unchanged(model), pytest.raises(InvalidArgumentError, match=r"optimizer must be .*got 3"):
        plan.apply(model, inplace=True, optimizer=3)  # type: ignore[arg-type]
    for use in (plan.apply, plan.check):
        with pytest.raises(InvalidArgumentError, match=r"model must be .*got NoneType"):
            use(None)  # type: ignore[arg-type]


def test_optimizer_state_of_unknown_shape_is_refused() -> None:
    model, inputs = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.a.weight]["sketch"] = torch.zeros(5, 7)
    plan = plan_for(model, inputs)
    with (
        unchanged(model),
        pytest.raises(InvalidArgumentError, match=r"state 'sketch' of 'a.weight'.*\(5, 7\)"),
    ):
        plan.apply(model, inplace=True, optimizer=optimizer)
    assert set(optimizer.state) == {model.a.weight}


# -- all or nothing ------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "step",
    ["slice_channels", "set_attributes", "_widths", "attach_plans", "verify_runs", "_rebind"],
)
def test_an_error_in_the_middle_changes_nothing(
    step: str, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = made("SplitByAttribute")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    _step(model, optimizer, inputs)
    plan = plan_for(model, inputs)
    before = run(model, inputs)
    momentum = {id(p): s["momentum_buffer"].clone() for p, s in optimizer.state.items()}
    owner = widths if step == "_widths" else surgery
    original = getattr(owner, step)
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        # The second call where there is one: something has been changed already.
        if calls == (2 if step in ("set_attributes", "_widths") else 1):
            if step == "_rebind":
                original(*args, **kwargs)
            raise RuntimeError("out of memory")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, step, failing)
    with unchanged(model), pytest.raises(RuntimeError, match="out of memory"):
        plan.apply(model, inplace=inplace, optimizer=optimizer)
    assert relative_error(run(model, inputs), before) == 0
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in model.parameters()]
    assert all(
        torch.equal(optimizer.state[p]["momentum_buffer"], momentum[id(p)])
        for p in model.parameters()
    )
    monkeypatch.undo()
    pruned = plan.apply(model, inplace=inplace, optimizer=optimizer)
    _step(pruned, optimizer, inputs)


@pytest.mark.parametrize("step", ["set_attributes", "verify_runs", "slice_channels"])
def test_pruning_in_place_fails_before_anything_is_lost(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = made("SplitByAttribute")
    plan = plan_for(model, inputs)
    before = run(model, inputs)

    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(surgery, step, failing)
    with unchanged(model), pytest.raises(RuntimeError, match="out of memory"):
        plan.apply(model, inplace=True)
    assert relative_error(run(model, inputs), before) == 0
    monkeypatch.undo()
    plan.apply(model, inplace=True)


def test_pruning_in_place_holds_one_successor_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = made()
    plan = plan_for(model, inputs)
    reference = run(plan.apply(model), inputs)
    waiting: list[int] = []
    original = surgery.slice_channels

    def counting(tensors: Any, *args: Any) -> Any:
        results = original(tensors, *args)
        if not tensors:  # no gradients
            return results
        # Of the tensors that shrink, those that have not been replaced yet.
        whole = dict(plan.fingerprint["tensors"])
        named = [*model.named_parameters(), *model.named_buffers()]
        waiting.append(sum(list(t.shape) == whole[n] for n, t in named if n in plan.kept))
        assert len(tensors) == 1
        return results

    monkeypatch.setattr(surgery, "slice_channels", counting)
    plan.apply(model, inplace=True)
    # One trial first, then each is put in place before the next is made.
    assert waiting == [len(plan.kept), *range(len(plan.kept), 0, -1)]
    assert relative_error(run(model, inputs), reference) == 0


def test_a_result_that_fails_verification_is_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = made()
    plan = plan_for(model, inputs)

    def refuse(*_: Any) -> None:
        raise VerificationError("differs")

    monkeypatch.setattr(surgery, "verify_outputs", refuse)
    with unchanged(model), pytest.raises(VerificationError):
        plan.apply(model, inplace=True, verify="numeric")
    assert cpx.plan_of(model) is None


def test_applying_twice_is_refused() -> None:
    model, inputs = made()
    plan = plan_for(model, inputs)
    pruned = plan.apply(model)
    with (
        unchanged(pruned),
        pytest.raises(PlanMismatchError, match=r"pruned already.*'a.weight' is \[4, 3, 3, 3\]"),
    ):
        plan.apply(pruned)


def test_pruning_a_pruned_model_again() -> None:
    model, inputs = made("Residual")
    once = cpx.prune(model, inputs, 0.5)
    plan = plan_for(once, inputs)
    twice = plan.apply(once)
    assert plan.params_before == sum(p.numel() for p in once.parameters())
    assert relative_error(run(twice, inputs), run(zeroed(once, plan), inputs)) < 1e-9


def test_unknown_verification_is_refused() -> None:
    model, inputs = made()
    with pytest.raises(InvalidArgumentError, match="verify must be"):
        plan_for(model, inputs).apply(model, verify="fast")


# -- copies --------------------------------------------------------------------------------------


def test_copied_keeps_gradients_and_attributes() -> None:
    model, inputs = made()
    model(inputs).sum().backward()
    model.a.weight.decay = [1]
    twin = copied(model)
    assert torch.equal(twin.a.weight.grad, model.a.weight.grad)
    assert twin.a.weight.grad is not model.a.weight.grad
    assert twin.a.weight.decay == [1]
    assert twin.a.weight.decay is not model.a.weight.decay

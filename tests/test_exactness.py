"""The law of the package: a pruned network equals the original with the removed channels zeroed."""

from __future__ import annotations

import copy
import io
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import (
    NETWORKS,
    called,
    doubled,
    leaves,
    network,
    randomised,
    relative_error,
    run,
    zeroed,
)
from random_nets import SIDE, random_net
from torch import Tensor, nn
from toys import TOYS, Toy

import chanprune_ext as cpx
from chanprune_ext.copying import copied
from chanprune_ext.errors import NothingToPruneError

TOLERANCE = 1e-9

# Torch announces that the older weight norm is deprecated, and that a plain instance norm's
# num_features no longer matters. Neither is about pruning.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.*"),
]


def made(toy: Toy) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return randomised(toy.make()), toy.inputs()


def assert_equals_zeroed(
    model: nn.Module, pruned: nn.Module, plan: cpx.PruningPlan, inputs: Any
) -> None:
    error = relative_error(run(pruned, inputs), run(zeroed(model, plan), inputs))
    assert error < TOLERANCE, f"relative error {error:.2e}"


def assert_trains(model: nn.Module, pruned: nn.Module, inputs: Any) -> None:
    """In training mode both run, give outputs of the same shapes and reach the same parameters."""
    grown = []
    shapes = []
    for net in (model, pruned):
        net = copied(net).train()
        net.zero_grad()
        outputs = leaves(called(net, inputs))
        sum(o.float().pow(2).sum() for o in outputs).backward()
        grown.append({name for name, p in net.named_parameters() if p.grad is not None})
        shapes.append([tuple(o.shape) for o in outputs])
        for name, parameter in net.named_parameters():
            assert parameter.grad is None or parameter.grad.shape == parameter.shape, name
    assert shapes[0] == shapes[1]
    assert grown[0] == grown[1]


# -- toys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOYS)
def test_toy(name: str) -> None:
    toy = TOYS[name]
    model, inputs = made(toy)
    plan = cpx.plan(model, inputs, ratio=0.5)
    pruned = plan.apply(model)
    assert plan.params_after == sum(p.numel() for p in pruned.parameters())
    assert plan.params_after <= (1 - toy.min_removed) * plan.params_before
    shrunk = [g for g in plan.groups if g.width_after < g.width_before]
    if toy.expects == "normalised":
        assert any(g.normalised for g in shrunk)
        outputs, before = run(pruned, inputs), run(model, inputs)
        assert [o.shape for o in outputs] == [o.shape for o in before]
        assert all(torch.isfinite(o).all() for o in outputs)
    else:
        assert not any(g.normalised for g in shrunk)
        assert_equals_zeroed(model, pruned, plan, inputs)
    if toy.expects != "frozen":
        # Nothing had to be found out by running a plan that fails.
        assert {f.why for f in plan.frozen} <= {"the model's output", *toy.also_kept}
    for entry in toy.kept_whole:
        assert 0 not in plan.kept.get(entry, {})
        told = [f for f in plan.frozen if f.entry == entry]
        assert told, f"the plan does not say why {entry} stays whole"
        assert all(toy.reason in f.why for f in told)
    if toy.expects == "frozen":
        reasons = [f for f in plan.frozen if toy.reason in f.why]
        assert reasons
        assert all(f.source.startswith("toys.py:") or f.op == "output" for f in reasons)


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.3},
        {"ratio": 0.5, "scope": "global"},
        {"ratio": 0.5, "round_to": 4},
        {"ratio": 0.8, "criterion": "random"},
    ],
    ids=["third", "global", "round4", "most"],
)
@pytest.mark.parametrize("name", [n for n, t in TOYS.items() if t.expects != "normalised"])
def test_toy_under_options(name: str, options: dict[str, Any]) -> None:
    model, inputs = made(TOYS[name])
    plan = cpx.plan(model, inputs, **options)
    assert_equals_zeroed(model, plan.apply(model), plan, inputs)


@pytest.mark.parametrize("name", TOYS)
def test_toy_trains(name: str) -> None:
    model, inputs = made(TOYS[name])
    assert_trains(model, cpx.prune(model, inputs, 0.5), inputs)


def test_unknown_operation_is_named_with_module_and_line() -> None:
    model, inputs = made(TOYS["UnknownOperation"])
    holder = nn.Sequential()
    holder.add_module("inner", model)
    (entry,) = [f for f in cpx.plan(holder, inputs).frozen if f.entry == "inner.stage.0.0.weight"]
    assert entry.op == "chanprune_toys::mystery"
    assert entry.module == "inner"
    file, line = entry.source.split(":")
    lines = Path(__file__).with_name(file).read_text().splitlines()
    assert "torch.ops.chanprune_toys.mystery" in lines[int(line) - 1]
    assert entry.channels == 16
    assert "mystery" in str(entry)
    assert "inner" in str(entry)


# -- layers that normalise: equal to the same layer over the kept channels -----------------------


class _OverKept(nn.Module):
    """The given layer, seeing only the kept channels; zeros elsewhere."""

    def __init__(self, norm: nn.Module, kept: Tensor, channels: int) -> None:
        super().__init__()
        self.norm, self.kept, self.channels = norm, kept, channels

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape)
        out[:, self.kept] = self.norm(x[:, self.kept])
        return out


def _over_fewer(norm: nn.Module, kept: Tensor) -> nn.Module:
    """A layer of the same kind made for the kept channels only, with their weights."""
    inner = norm.norm if hasattr(norm, "norm") else norm
    n = len(kept)
    if isinstance(inner, nn.GroupNorm):
        small: nn.Module = nn.GroupNorm(inner.num_groups, n, inner.eps)
    elif isinstance(inner, nn.LayerNorm):
        small = nn.LayerNorm(n, inner.eps, elementwise_affine=inner.elementwise_affine)
    else:
        small = nn.RMSNorm(n, inner.eps)
    small.load_state_dict({k: v[kept] for k, v in inner.state_dict().items()})
    if inner is norm:
        return small
    return type(norm)(small)


@pytest.mark.parametrize(
    "name",
    ["GroupNorm4", "GroupNorm1", "LayerNormOverChannels", "LayerNormPlain", "RMSNormOverChannels"],
)
def test_normalisation_runs_over_the_kept_channels(name: str) -> None:
    model, inputs = made(TOYS[name])
    plan = cpx.plan(model, inputs, ratio=0.5)
    kept = plan.kept["a.weight"][0]
    assert len(kept) == 8
    reference = zeroed(model, plan)
    reference.norm = _OverKept(_over_fewer(model.norm, kept), kept, 16)
    assert relative_error(run(plan.apply(model), inputs), run(reference, inputs)) < TOLERANCE


@pytest.mark.parametrize("name", ["SumOfGates", "LinearAttention"])
def test_sums_of_channels_that_are_not_zero_are_told(name: str) -> None:
    """Zeroing such a channel is not removing it, and the plan must not claim so."""
    model, inputs = made(TOYS[name])
    plan = cpx.plan(model, inputs, ratio=0.5)
    error = relative_error(run(plan.apply(model), inputs), run(zeroed(model, plan), inputs))
    assert error > 1e-6, "this toy no longer shows the difference"
    assert any(g.normalised for g in plan.groups if g.width_after < g.width_before)


# -- real networks -------------------------------------------------------------------------------


def check_network(name: str, **options: Any) -> None:
    model, inputs = network(name)
    plan = cpx.plan(model, inputs, **options)
    pruned = plan.apply(model)
    assert plan.params_after < (0.85 if options["ratio"] < 0.5 else 0.7) * plan.params_before
    assert_equals_zeroed(model, pruned, plan, inputs)


FAST_OPTIONS = [
    {"ratio": 0.5, "scope": "local", "round_to": 1},
    {"ratio": 0.3, "scope": "global", "round_to": 8},
]


@pytest.mark.parametrize(
    ("name", "options"), [(n, FAST_OPTIONS[i % 2]) for i, n in enumerate(NETWORKS)]
)
def test_network(name: str, options: dict[str, Any]) -> None:
    check_network(name, **options)


@pytest.mark.slow
@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("ratio", [0.3, 0.5])
@pytest.mark.parametrize("name", NETWORKS)
def test_network_under_all_options(name: str, ratio: float, scope: str, round_to: int) -> None:
    check_network(name, ratio=ratio, scope=scope, round_to=round_to)


@pytest.mark.parametrize("name", [n for n in NETWORKS if not n.startswith("shufflenet")])
def test_every_inner_layer_is_prunable(name: str) -> None:
    """Only what makes the outputs stays whole.

    Not so in ShuffleNetV2: eight shuffles in a row tie the channels that pass through all of them
    to the first one, so the stream of its longest stage stays.
    """
    model, inputs = network(name)
    plan = cpx.plan(model, inputs, ratio=0.5)
    outputs = {"googlenet": {"fc", "aux1.fc2", "aux2.fc2"}}.get(name)
    kept_whole = {
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
        and 0 not in plan.kept.get(f"{path}.weight", {})
    }
    assert len(kept_whole) == (len(outputs) if outputs else 1)
    assert all(f.why == "the model's output" for f in plan.frozen)
    assert outputs is None or kept_whole == outputs


@pytest.mark.parametrize(
    "name",
    [
        "shufflenet_v2_x1_0",
        "googlenet",
        *(pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS if n[0] not in "sg"),
    ],
)
def test_network_trains(name: str) -> None:
    model, inputs = network(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_trains(model, cpx.prune(model, inputs, 0.5), inputs)


@pytest.mark.parametrize("name", ["resnet56", "shufflenet_v2_x1_0", "googlenet"])
def test_pruned_network_can_be_rebuilt_copied_and_pickled(name: str) -> None:
    model, inputs = network(name)
    plan = cpx.plan(model, inputs, ratio=0.5)
    pruned = plan.apply(model)
    expected = run(pruned, inputs)

    fresh = plan.apply(NETWORKS[name]().eval())
    assert relative_error(run(fresh, inputs), expected) > 1e-3
    fresh.load_state_dict(pruned.state_dict(), strict=True)

    file = io.BytesIO()
    torch.save(pruned, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (fresh, copy.deepcopy(pruned), loaded):
        assert all(torch.equal(a, b) for a, b in zip(run(other, inputs), expected, strict=True))


def check_export(model: nn.Module, inputs: Any) -> None:
    arguments, named = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    torch.export.export(model.eval(), arguments, named)
    pruned = cpx.prune(model, inputs, 0.5)
    exported = torch.export.export(pruned, arguments, named).module()
    actual = leaves(exported(*arguments, **named))
    with torch.no_grad():
        expected = leaves(pruned(*arguments, **named))
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("name", ["ChannelShuffle", "SplitByAttribute", "ZeroPadShortcut"])
def test_toy_exports(name: str) -> None:
    check_export(*made(TOYS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_network_exports(name: str) -> None:
    check_export(*network(name))


# -- random networks -----------------------------------------------------------------------------


def check_random(net: nn.Module, **options: Any) -> None:
    net = randomised(net)
    inputs = torch.randn(2, 3, SIDE, SIDE)
    try:
        plan = cpx.plan(net, inputs, **options)
    except NothingToPruneError:
        return
    assert not [f for f in plan.frozen if "the pruned model" in f.why], "a replay was refused"
    pruned = plan.apply(net)
    if any(g.normalised for g in plan.groups if g.width_after < g.width_before):
        assert [o.shape for o in run(pruned, inputs)] == [o.shape for o in run(net, inputs)]
    else:
        assert_equals_zeroed(net, pruned, plan, inputs)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_random_network(data: st.DataObject) -> None:
    def choose(options: Any) -> Any:
        return data.draw(st.sampled_from(list(options)))

    torch.manual_seed(0)
    net = random_net(choose, data.draw(st.integers(1, 10)))
    check_random(
        net,
        ratio=data.draw(st.sampled_from([0.2, 0.5, 0.8])),
        scope=data.draw(st.sampled_from(["local", "global"])),
        round_to=data.draw(st.sampled_from([1, 2, 4])),
        criterion="random",
    )


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_many_random_networks(block: int) -> None:
    for seed in range(1000 * block, 1000 * block + 100):
        source = random.Random(seed)
        torch.manual_seed(seed)
        net = random_net(source.choice, source.choice([3, 6, 10, 14]))
        check_random(
            net,
            ratio=source.choice([0.2, 0.3, 0.5, 0.7, 0.85]),
            scope=source.choice(["local", "global"]),
            round_to=source.choice([1, 2, 4]),
            criterion="random",
            seed=seed,
        )


def test_the_oracle_sees_a_wrong_channel() -> None:
    """The tests above can fail: swapping two kept channels of one layer is noticed."""
    model, inputs = made(TOYS["Residual"])
    plan = cpx.plan(model, inputs, ratio=0.5)
    pruned = plan.apply(model)
    with torch.no_grad():
        pruned.b.weight[[0, 1]] = pruned.b.weight[[1, 0]]
    assert relative_error(run(pruned, inputs), run(zeroed(model, plan), inputs)) > 1e-4


def test_doubled_reaches_nested_tensors() -> None:
    nested = {"a": (torch.ones(1), [torch.ones(1, dtype=torch.int64)])}
    result = doubled(nested)
    assert result["a"][0].dtype == torch.float64
    assert result["a"][1][0].dtype == torch.int64

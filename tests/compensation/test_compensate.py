"""The public function: arguments, safety, report."""

from __future__ import annotations

import copy
import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_networks import (
    KEEP,
    cut,
    error,
    images,
    no_forward_is_left,
    rows,
    same,
    seeded_norm,
    state,
)
from torch import Tensor, nn

import chanprune_ext.compensation.procedure as implementation
from chanprune_ext.compensation import compensate, fit
from chanprune_ext.compensation.batches import read_batches
from chanprune_ext.compensation.lockstep import Lockstep
from chanprune_ext.errors import InvalidArgumentError


def test_least_squares_brings_the_output_back(pair):
    original, pruned, plan = pair
    fresh, before = images(200, seed=1), error(pruned, original, images(200, seed=1))
    report = compensate(pruned, original, images(), plan=plan)
    assert error(pruned, original, fresh) < 0.5 * before
    assert report.kept == "least_squares"
    deviations = report.deviations
    assert deviations["least_squares"].relative_l2 < deviations["plain"].relative_l2
    assert no_forward_is_left()


def test_later_layers_see_the_compensated_earlier_ones(pair):
    """Fitting every layer on the original's own activations, each by itself, leaves more error."""
    original, pruned, plan = pair
    x, fresh = images(), images(200, seed=1)
    alone = copy.deepcopy(pruned)
    for i in range(len(original.blocks)):
        inputs: list[Tensor] = []
        hook = original.blocks[i].conv2.register_forward_hook(
            lambda _, args, __, inputs=inputs: inputs.append(args[0])
        )
        with torch.no_grad():
            original(x)
        hook.remove()
        columns = nn.functional.unfold(inputs[0], 3, padding=1).transpose(1, 2).flatten(0, 1)
        ones = torch.ones(len(columns), 1)
        few = torch.cat([columns.view(-1, 8, 9)[:, KEEP].flatten(1), ones], 1)
        target = columns @ original.blocks[i].conv2.weight.flatten(1).T
        solution = torch.linalg.lstsq(few, target).solution.T
        block = alone.blocks[i]
        with torch.no_grad():
            block.conv2.weight.copy_(solution[:, :-1].reshape_as(block.conv2.weight))
            block.bn2.running_mean -= solution[:, -1]
    compensate(pruned, original, x, plan=plan)
    assert error(pruned, original, fresh) < 0.8 * error(alone, original, fresh)


def test_only_weights_and_running_means_change(pair):
    original, pruned, plan = pair
    before, untouched = state(pruned), state(original)
    grads = [p.requires_grad for p in pruned.parameters()]
    parameters = [id(p) for p in pruned.parameters()]
    pruned.train()
    pruned.blocks[1].eval()
    compensate(pruned, original, images(), plan=plan)
    after = state(pruned)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rsplit(".", 1)[1] for name in changed} == {"weight", "running_mean"}
    assert not any("bn" in name and name.endswith("weight") for name in changed)
    assert same(state(original), untouched)
    assert [p.requires_grad for p in pruned.parameters()] == grads
    assert [id(p) for p in pruned.parameters()] == parameters
    assert pruned.training
    assert pruned.blocks[0].training
    assert not pruned.blocks[1].training


def test_options_choose_the_layers(pair):
    original, pruned, plan = pair

    def fitted(**options) -> set[str]:
        net = copy.deepcopy(pruned)
        report = compensate(net, original, images(), plan=plan, **options)
        return {layer.module for layer in report.layers if layer.skipped is None}

    second = {f"blocks.{i}.conv2" for i in range(3)}
    drifted = {"blocks.1.conv1", "blocks.2.conv1"}
    assert fitted() == second | drifted
    assert fitted(refit_producers=False) == second
    assert fitted(refit_classifier=True) == second | drifted | {"head"}


def test_one_sided_steps_gain_behind_relu(pair):
    original, pruned, plan = pair
    plain = copy.deepcopy(pruned)
    without = compensate(plain, original, images(), plan=plan, one_sided_steps=0)
    with_steps = compensate(pruned, original, images(), plan=plan, one_sided_steps=3)
    assert {layer.steps for layer in without.layers} <= {0, 1}
    assert max(layer.steps for layer in with_steps.layers) > 1
    first = {layer.module: layer for layer in with_steps.layers}["blocks.0.conv2"]
    same_layer = {layer.module: layer for layer in without.layers}["blocks.0.conv2"]
    assert first.error_after < same_layer.error_after


@pytest.mark.parametrize("limit", [600_000, 3_000_000])
def test_bounded_memory_gives_the_same_result(pair, limit):
    original, pruned, plan = (m.double() if isinstance(m, nn.Module) else m for m in pair)
    x = images(30).double()
    tight = copy.deepcopy(pruned)
    # Layers are refitted jointly on as many samples as there is memory for: not here.
    compensate(pruned, original, x, plan=plan, joint_rounds=0)
    compensate(tight, original, x, plan=plan, joint_rounds=0, memory_limit=limit)
    for a, b in zip(pruned.parameters(), tight.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)


def test_memory_plan_uses_both_ways(pair, monkeypatch):
    """The limits above must really lie on both sides of keeping all batches in memory."""
    original, pruned, plan = pair
    seen = []
    planner = implementation.plan_memory
    monkeypatch.setattr(
        implementation, "plan_memory", lambda *a: seen.append(planner(*a)) or seen[-1]
    )
    for limit in (None, 3_000_000, 600_000):
        compensate(copy.deepcopy(pruned), original, images(30), plan=plan, memory_limit=limit)
    assert seen[0].resident_from < seen[2].resident_from
    assert seen[0].batch_size > seen[2].batch_size
    assert seen[0].cache > seen[2].cache


def test_all_ways_of_looking_at_a_target_agree(pair, monkeypatch):
    """Paused forwards, forwards run anew with what was seen kept, and run anew at every look."""
    original, pruned, plan = (m.double() if isinstance(m, nn.Module) else m for m in pair)
    planner, x, forwards, results = implementation.plan_memory, images(30).double(), [], []
    for resident_from, cache in ((0, 0), (10**9, 10**9), (10**9, 0)):
        net = copy.deepcopy(pruned)
        count = []
        net.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        monkeypatch.setattr(
            implementation,
            "plan_memory",
            lambda *a, r=resident_from, c=cache: replace(planner(*a), resident_from=r, cache=c),
        )
        compensate(net, original, x, plan=plan)
        forwards.append(len(count))
        results.append(dict(net.named_parameters()))
    assert forwards[0] < forwards[1] < forwards[2]
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.allclose(other[name], value, rtol=1e-6, atol=1e-8), name


def test_unfolded_inputs_are_kept_for_the_steps_of_a_fit(pair, monkeypatch):
    """Where there is memory: they are made once a fit, and the result is the same."""
    original, pruned, plan = pair
    fresh, spare = fit._Fit.fresh_pieces, Lockstep.spare
    results, counts = [], []
    for room in (spare, lambda *_: 0):
        net, made = copy.deepcopy(pruned), []
        monkeypatch.setattr(Lockstep, "spare", room)
        monkeypatch.setattr(fit._Fit, "fresh_pieces", lambda s, m=made: m.append(s) or fresh(s))
        compensate(net, original, images(60), plan=plan, progress=False)
        results.append(net.state_dict())
        counts.append((len(made), len({id(each) for each in made})))
    assert counts[0][0] == counts[0][1] == counts[1][1] < counts[1][0]
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


def test_memory_limit_that_cannot_be_met(pair):
    original, pruned, plan = pair
    with pytest.raises(InvalidArgumentError, match=r"memory_limit: one sample needs [\d,]+ bytes"):
        compensate(pruned, original, images(), plan=plan, memory_limit=1000)


def test_report_is_complete_and_serialisable(pair):
    original, pruned, plan = pair
    report = compensate(pruned, original, images(), plan=plan)
    again = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert again["images"] + again["held_back_images"] == 60
    assert again["held_back_images"] == 6
    assert set(again["deviations"]) == {"plain", "batch_norm", "least_squares"}
    layers = {layer["module"]: layer for layer in again["layers"]}
    assert set(layers) == {"stem", "head"} | {
        f"blocks.{i}.conv{j}" for i in range(3) for j in (1, 2)
    }
    fitted = layers["blocks.0.conv2"]
    assert fitted["target"] == "blocks.0"
    assert (fitted["rows"], fitted["columns"]) == (6, 36)
    assert 0 < fitted["error_after"] < fitted["error_before"]
    assert 0 < fitted["rank"] <= 36
    assert fitted["condition"] > 1
    assert fitted["ridge"] >= 1e-4
    assert fitted["seconds"] > 0
    assert layers["stem"]["skipped"] == "nothing to repair"
    assert "least_squares" in str(report)


@pytest.mark.parametrize("failure", [RuntimeError("disk on fire"), KeyboardInterrupt()])
def test_failure_in_the_middle_leaves_everything_as_it_was(pair, monkeypatch, failure):
    original, pruned, plan = pair
    pruned.train()
    before, calls = state(pruned), []
    real = implementation.fit_target

    def failing(*args):
        calls.append(args)
        if len(calls) == 5:
            assert not same(state(pruned), before)
            raise failure
        return real(*args)

    monkeypatch.setattr(implementation, "fit_target", failing)
    with pytest.raises(type(failure)):
        compensate(pruned, original, images(), plan=plan)
    assert same(state(pruned), before)
    assert all(module.training for module in pruned.modules())
    assert not any(module.training for module in original.modules())
    assert no_forward_is_left()


def test_forward_that_raises_on_one_batch(pair):
    original, pruned, plan = pair
    before = state(pruned)
    batches = [images(8), images(8), torch.randn(8, 3, 1, 8), torch.randn(8, 4, 8, 8)]
    with pytest.raises(InvalidArgumentError, match=r"inputs of shape \[\[8, 4, 8, 8\]\]"):
        compensate(pruned, original, batches, plan=plan, held_back=0)
    assert same(state(pruned), before)
    assert no_forward_is_left()


def test_worse_result_is_left_out(pair, monkeypatch):
    """Whatever least squares does, the network is not left worse than without it."""
    original, pruned, plan = pair
    for block in pruned.blocks:  # new statistics will do it some good
        block.bn1.running_mean += 5
    real = implementation.fit_target

    def harmful(target, runs, options, ledger):
        reports = real(target, runs, options, ledger)
        ledger.remember(target.layers[0].weight)
        target.layers[0].weight.mul_(30)
        return reports

    normed = copy.deepcopy(pruned)
    compensate(normed, original, images(), method="batch_norm", plan=plan)
    monkeypatch.setattr(implementation, "fit_target", harmful)
    report = compensate(pruned, original, images(), plan=plan)
    assert report.kept == "batch_norm"
    assert same(state(pruned), state(normed))
    report = compensate(pruned, original, images(), plan=plan, held_back=0)
    assert report.kept == "least_squares"


def test_overfit_on_two_images_is_left_out():
    """The removed channel only fires in the dark; two dark images say nothing about bright ones."""
    original = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Tanh())
    with torch.no_grad():
        original[0].weight[:3] = torch.eye(3).view(3, 3, 1, 1)
        original[0].weight[3] = -5.0
        original[0].bias.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    keep = [0, 1, 2]
    pruned, plan = cut(original, rows("0.weight", "0.bias", keep=keep) | {"2.weight": {1: keep}})
    before, bright = state(pruned), 0.5 + torch.rand(50, 3, 6, 6)
    x = torch.rand(3, 3, 6, 6) * 0.01
    x[1] = bright[0]
    free = copy.deepcopy(pruned)
    fitted = compensate(free, original, x[[0, 2]], plan=plan, held_back=0)
    assert fitted.kept == "least_squares"
    assert error(free, original, x[[0, 2]]) < 0.1 * error(pruned, original, x[[0, 2]])
    assert error(free, original, bright) > 0.1
    assert error(pruned, original, bright) < 1e-6
    report = compensate(pruned, original, x, plan=plan, held_back=0.3)
    assert (report.images, report.held_back_images) == (2, 1)
    assert report.kept == "plain"
    assert same(state(pruned), before)


def test_batch_norm_statistics_are_the_average_over_batches():
    original = nn.Sequential(nn.Conv2d(3, 4, 1), seeded_norm(4), nn.ReLU(), nn.Dropout(0.5))
    original.append(nn.Flatten())
    pruned = copy.deepcopy(original).train()
    pruned[1].momentum = 0.3
    counter = pruned[1].num_batches_tracked
    batches = [torch.randn(5, 3, 4, 4) + i for i in range(3)]
    report = compensate(
        pruned, original, batches, method="batch_norm", plan=SimpleNamespace(kept={}), held_back=0
    )
    with torch.no_grad():
        seen = pruned[0](torch.cat(batches)).transpose(0, 1).flatten(1)
    assert torch.allclose(pruned[1].running_mean, seen.mean(1), atol=1e-6)
    assert torch.allclose(pruned[1].running_var, seen.var(1), atol=1e-5)
    assert pruned[1].momentum == 0.3
    assert pruned[1].num_batches_tracked is counter
    assert int(counter) == 0
    assert all(module.training for module in pruned.modules())
    assert report.kept == "batch_norm"


def test_harmful_batch_norm_statistics_are_taken_back(pair):
    original = pair[0]
    pruned = copy.deepcopy(original)
    before = state(pruned)
    report = compensate(
        pruned, original, images(4), method="batch_norm", plan=SimpleNamespace(kept={})
    )
    assert report.kept == "plain"
    assert same(state(pruned), before)


def test_batch_norm_without_any(pair):
    original = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    with pytest.raises(InvalidArgumentError, match="batch norms with running statistics"):
        compensate(
            copy.deepcopy(original),
            original,
            images(),
            method="batch_norm",
            plan=SimpleNamespace(kept={}),
        )


def test_labels_are_ignored_and_all_forms_of_batches_agree(pair):
    original, pruned, plan = pair
    x, labels = images(24), torch.arange(24)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=7)
    iter([(x, labels)])
    results = []
    for batches in (
        x,
        [x[:10], x[10:]],
        loader,
        iter([(x, labels)]),
        [(x, ["a"] * 24)],
        [{"x": x}],
    ):
        net = copy.deepcopy(pruned)
        compensate(net, original, batches, plan=plan)
        results.append(state(net))
    for other in results[1:]:
        assert all(torch.allclose(other[k], results[0][k], atol=1e-6) for k in other)


def test_what_stands_beside_a_dict_is_a_label():
    class OneAndAnOption(nn.Module):
        def forward(self, x, mask=None): ...

    class Two(nn.Module):
        def forward(self, x, mask): ...

    class Dict(nn.Module):
        def forward(self, features, mask): ...

    def read(model, batch):
        return read_batches([batch], model, device=torch.device("cpu"))[0]

    x, label = torch.randn(5, 4), torch.rand(5, 3)
    for model, inputs in ((OneAndAnOption(), {"x": x}), (Two(), {"x": x, "mask": x})):
        assert read(model, (inputs, label)).keys() == inputs.keys()
    assert len(read(Dict(), ({"x": x}, label))) == 2
    # Two tensors: only integers, one a sample, are surely a label.
    assert len(read(OneAndAnOption(), (x, label))) == 2
    assert torch.equal(read(OneAndAnOption(), (x, torch.arange(5))), x)


def test_more_unknowns_than_samples(pair):
    """A linear layer behind a feature map: solved by its samples, and for the better."""
    original = nn.Sequential(
        nn.Conv2d(3, 20, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20 * 100, 8), nn.ReLU()
    )
    original.append(nn.Linear(8, 4))
    keep = list(range(10))
    pruned, plan = cut(
        original, rows("0.weight", "0.bias", keep=keep) | {"3.weight": {1: list(range(1000))}}
    )
    x, fresh = torch.randn(50, 3, 12, 12), torch.randn(100, 3, 12, 12)
    before = error(pruned, original, fresh)
    report = compensate(pruned, original, x, plan=plan)
    layer = next(layer for layer in report.layers if layer.module == "3")
    assert (layer.samples, layer.columns) == (45, 1000)
    assert layer.rank <= 45
    assert error(pruned, original, fresh) < before


def test_two_inputs_are_not_mistaken_for_a_label(pair):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 6)
            self.b = nn.Linear(5, 6)
            self.out = nn.Linear(6, 3)

        def forward(self, x, y):
            return self.out(torch.tanh(self.a(x) + self.b(y)))

    original = Two()
    pruned = copy.deepcopy(original)
    nn.init.normal_(pruned.b.weight)
    x, y = torch.randn(50, 4), torch.randn(50, 5)
    plan = SimpleNamespace(kept={})
    compensate(pruned, original, [(x, y)], plan=plan, ridge=1e-10)
    with torch.no_grad():
        assert torch.allclose(pruned(x, y), original(x, y), atol=1e-3)


def test_shared_and_computed_weights_are_left_alone_and_named(pair):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Conv2d(3, 3, 3, padding=1)
            self.scaled = nn.Conv2d(3, 4, 1)
            self.up = nn.ConvTranspose2d(4, 2, 2)

        def forward(self, x):
            x = torch.relu(self.shared(torch.relu(self.shared(x))))
            x = torch.relu(nn.functional.conv2d(x, self.scaled.weight * 2, self.scaled.bias))
            return self.up(x)

    original = Odd()
    pruned = copy.deepcopy(original)
    nn.init.normal_(pruned.shared.weight)
    before = state(pruned)
    report = compensate(pruned, original, images(), plan=SimpleNamespace(kept={}))
    reasons = [(layer.kind, layer.skipped) for layer in report.layers]
    assert ("conv2d", "its weight is used by several calls") in reasons
    assert ("conv2d", "its weight is computed, not a parameter") in reasons
    assert ("conv_transpose2d", "conv_transpose2d is not fitted") in reasons
    assert report.kept == "plain"
    assert same(state(pruned), before)


def test_input_overwritten_in_place_is_noticed(pair):
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.norm = seeded_norm(3)

        def forward(self, x):
            x = x + 1
            y = self.conv(x)
            x.mul_(0)
            return torch.tanh(self.norm(y)) + x

    original = Overwriting()
    pruned = copy.deepcopy(original)
    nn.init.normal_(pruned.conv.weight)
    before = state(pruned)
    report = compensate(pruned, original, images(), plan=SimpleNamespace(kept={}), held_back=0)
    assert report.layers[0].skipped == "its input is overwritten before its target is complete"
    assert same(state(pruned), before)


def test_model_that_fails_in_a_tapped_thread_only(pair):
    """An error inside the paused forwards reaches the caller with its cause."""
    original, pruned, plan = pair
    main = threading.main_thread()

    class LateError(Exception):
        pass

    def hook(*_):
        if threading.current_thread() is not main:
            raise LateError("late")

    handle = pruned.blocks[2].register_forward_pre_hook(hook)
    before = state(pruned)
    with pytest.raises(InvalidArgumentError, match=r"forward failed on inputs .*: late") as caught:
        compensate(pruned, original, images(), plan=plan)
    assert isinstance(caught.value.__cause__, LateError)
    handle.remove()
    assert same(state(pruned), before)
    assert no_forward_is_left()


def test_calls_that_depend_on_the_data():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            if x.sum() > 0:
                x = x * 2
            return torch.tanh(self.conv(x))

    original = Fickle()
    pruned = copy.deepcopy(original)
    nn.init.normal_(pruned.conv.weight)
    before = state(pruned)
    batches = [torch.ones(4, 3, 5, 5), -torch.ones(2, 3, 6, 6)]
    with pytest.raises(InvalidArgumentError, match="must not depend on the data"):
        compensate(pruned, original, batches, plan=SimpleNamespace(kept={}), held_back=0)
    assert same(state(pruned), before)
    assert no_forward_is_left()


def test_forward_in_inference_mode(pair):
    original, pruned, plan = pair
    expected = copy.deepcopy(pruned)
    compensate(expected, original, images(), plan=plan)
    for net in (original, pruned):
        net.forward = torch.inference_mode()(net.forward)
    compensate(pruned, original, images(), plan=plan)
    for a, b in zip(pruned.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_calibration_inside_autocast(pair):
    original, pruned, plan = pair
    expected = copy.deepcopy(pruned)
    compensate(expected, original, images(), plan=plan)
    with torch.autocast("cpu", torch.bfloat16):
        compensate(pruned, original, images(), plan=plan)
    assert same(state(pruned), state(expected))


def test_default_device_holds_in_the_paused_forwards_too(pair):
    """torch keeps it for each thread of its own, and a forward may rely on it."""
    original, pruned, plan = pair
    seen = set()
    for net in (original, pruned):  # asking for it is a call, too: both must make it
        net.blocks[1].register_forward_pre_hook(lambda *_: seen.add(torch.get_default_device()))
    x = images()
    with torch.device("meta"):
        compensate(pruned, original, x, plan=plan)
    assert seen == {torch.device("meta")}


def test_progress_bar_on_a_terminal(pair, monkeypatch, capsys):
    original, pruned, plan = pair
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    compensate(copy.deepcopy(pruned), original, images(), plan=plan, progress=False)
    assert "compensating" not in capsys.readouterr().err
    compensate(pruned, original, images(), plan=plan, progress=True)
    assert "compensating" in capsys.readouterr().err


def test_half_precision_network(pair):
    original, pruned, plan = pair
    before = error(pruned, original, images(seed=1))
    pruned.bfloat16()
    original.bfloat16()
    x = images().bfloat16()
    report = compensate(pruned, original, x, plan=plan)
    assert report.kept == "least_squares"
    assert error(pruned, original, images(seed=1).bfloat16()) < before
    assert pruned.stem.weight.dtype == torch.bfloat16

"""Half precision, batches of all sizes, offsets, inference mode, outputs that are no logits."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from small_networks import cut, error, rows, seeded_norm, state
from torch import Tensor, nn

import chanprune_ext.compensation.fit as fitting
from chanprune_ext.compensation import compensate
from chanprune_ext.compensation.outputs import DeviationMeter
from chanprune_ext.errors import InvalidArgumentError


def two_layers(width: int, out: int, bias: float = 0.0) -> tuple[nn.Module, nn.Module, object]:
    """Two linear layers with a ReLU between them, and the same with half of the channels."""
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, out))
    nn.init.constant_(original[2].bias, bias)
    keep = list(range(width // 2))
    pruned, plan = cut(original, rows("0.weight", "0.bias", keep=keep) | {"2.weight": {1: keep}})
    return pruned, original, plan


def test_squares_that_float16_does_not_hold():
    meter = DeviationMeter()
    meter.add([torch.full((4, 1), 400.0).half()], [torch.full((4, 1), 300.0).half()])
    assert meter.deviation().relative_l2 == pytest.approx(0.25)
    pruned, original, plan = two_layers(64, 1, bias=400.0)
    with torch.no_grad():
        for net in (pruned, original):
            net[2].weight.mul_(50)
    report = compensate(pruned.half(), original.half(), torch.randn(400, 16).half(), plan=plan)
    assert report.kept == "least_squares"
    assert {layer.module: layer.skipped for layer in report.layers}["2"] is None
    assert report.deviations["least_squares"].relative_l2 > 0
    assert report.deviations["least_squares"].better_than(report.deviations["plain"])


def test_a_first_batch_that_shows_nothing():
    original = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3))
    original.append(nn.Tanh())
    keep = [0, 1, 2, 3]
    pruned, plan = cut(original, rows("0.weight", keep=keep) | {"2.weight": {1: keep}})
    batches = [torch.zeros(4, 3, 8, 8)] + [torch.randn(4, 3, 7 + i % 3, 8) for i in range(9)]
    report = compensate(pruned, original, batches, plan=plan)
    assert {layer.module: layer.skipped for layer in report.layers}["2"] is None


@pytest.mark.parametrize("first", [1, 30])
def test_any_order_of_batches_of_different_sizes(monkeypatch, first):
    """All of them tell how many samples there are: here enough to need none of them kept."""
    monkeypatch.setattr(fitting, "Samples", lambda: pytest.fail("the samples are many"))
    pruned, original, plan = two_layers(64, 3)
    lengths = [first, *[20] * 8]
    compensate(pruned, original, [torch.randn(2, n, 16) for n in lengths], plan=plan, held_back=0)


@pytest.mark.parametrize("count", [12, 400], ids=["fewer samples than columns", "more"])
def test_an_offset_of_the_inputs_does_not_stiffen_the_fit(count):
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(4, 32), nn.Linear(32, 3))
    nn.init.constant_(original[0].bias, 20.0)
    keep = list(range(16))
    pruned, plan = cut(original, rows("0.weight", "0.bias", keep=keep) | {"1.weight": {1: keep}})
    x = torch.randn(count, 4)
    compensate(pruned, original, x, plan=plan, held_back=0)
    with torch.no_grad():
        left = (pruned(x) - original(x)).square().mean() / original(x).var(0).mean()
    assert left < 1e-5


@pytest.mark.parametrize("forward_too", [False, True])
def test_inside_inference_mode(forward_too):
    pruned, original, plan = two_layers(32, 4)
    x, expected = torch.randn(100, 16), copy.deepcopy(pruned)
    compensate(expected, original, x, plan=plan)
    if forward_too:
        for net in (pruned, original):
            net.forward = torch.inference_mode()(net.forward)
    with torch.inference_mode():
        report = compensate(pruned, original, x.clone(), plan=plan)
    assert report.kept == "least_squares"
    for name, value in state(pruned).items():
        assert torch.allclose(value, state(expected)[name], atol=1e-5), name


def test_weights_made_in_inference_mode_are_refused():
    pruned, original, plan = two_layers(32, 4)
    with torch.inference_mode():
        made = copy.deepcopy(pruned)
    with pytest.raises(InvalidArgumentError, match=r"pruned: 0\.weight was made inside torch\.inf"):
        compensate(made, original, torch.randn(50, 16), plan=plan)


def test_a_batch_norm_without_a_counter():
    original = nn.Sequential(nn.Conv2d(3, 4, 1), seeded_norm(4), nn.Flatten())
    original[1].num_batches_tracked = None
    pruned = copy.deepcopy(original)
    x = torch.randn(20, 3, 4, 4)
    plan = SimpleNamespace(kept={})
    compensate(pruned, original, x, method="batch_norm", plan=plan, held_back=0)
    with torch.no_grad():
        seen = pruned[0](x).transpose(0, 1).flatten(1)
    assert torch.allclose(pruned[1].running_mean, seen.mean(1), atol=1e-6)
    assert pruned[1].num_batches_tracked is None


def test_a_memory_limit_that_is_no_integer():
    pruned, original, plan = two_layers(32, 4)
    x = torch.randn(50, 16)
    assert compensate(copy.deepcopy(pruned), original, x, plan=plan, memory_limit=1e8).images == 45
    for limit in (float("nan"), float("inf"), "1 GB"):
        with pytest.raises(InvalidArgumentError, match="memory_limit: expected bytes"):
            compensate(pruned, original, x, plan=plan, memory_limit=limit)


def shifted(pruned: nn.Module, by: float) -> nn.Module:
    """The same class probabilities, and other outputs."""
    with torch.no_grad():
        pruned[2].bias += by
    return pruned


def test_two_columns_need_not_be_logits():
    original = two_layers(32, 2)[1]
    x: Tensor = torch.randn(100, 16)
    plan = SimpleNamespace(kept={})
    options = {"plan": plan, "refit_classifier": True}
    as_logits = shifted(copy.deepcopy(original), 3.0)
    plain = compensate(as_logits, original, x, **options).deviations["plain"]
    assert plain.relative_l2 > 1
    assert plain.kl < 1e-6
    values = shifted(copy.deepcopy(original), 3.0)
    report = compensate(values, original, x, logits=False, **options)
    assert report.kept == "least_squares"
    assert report.deviations["plain"].kl is None
    assert error(values, original, x) < 1e-3

"""Averages over windows as further samples for a linear layer behind a global average."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import cut
from torch import nn

import chanprune_ext as cpx
from chanprune_ext.analysis.call_trace import record_calls
from chanprune_ext.analysis.calls import steady_calls
from chanprune_ext.compensation import procedure, targets
from chanprune_ext.compensation.pooled_windows import pooled_windows
from chanprune_ext.compensation.survey import survey_calls
from chanprune_ext.elimination.readers import find_readers, measure_readers


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 3), st.integers(1, 3))
def test_windows_are_averages_over_half_of_each_axis(extents, images, channels):
    x = torch.randn(images, channels, *extents, dtype=torch.float64)
    ranges = []
    for extent in extents:
        size = max(1, extent // 2)
        step = max(1, (extent - size) // 2)
        ranges.append([slice(a, a + size) for a in range(0, extent - size + 1, step)])
    expected = [
        x[(slice(None), slice(None), *w)].flatten(2).mean(2) for w in itertools.product(*ranges)
    ]
    torch.testing.assert_close(pooled_windows(x), torch.stack(expected, 1))


class Headed(nn.Module):
    """A convolution, and a function that leads from its output to a linear layer's input."""

    def __init__(self, function):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(4, 5)
        self.function = function

    def forward(self, x):
        return self.linear(self.function(self, torch.relu(self.conv(x))))


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda m, y: m.drop(m.pool(y).flatten(1)), "adaptive_avg_pool2d"),
        (lambda m, y: y.mean((2, 3)), "mean"),
        (lambda m, y: y.mean((2, 3), keepdim=True).squeeze(3).squeeze(2), "mean"),
        (lambda m, y: torch.tanh(m.pool(y).flatten(1)), None),
        (lambda m, y: y.amax((2, 3)), None),
        (lambda m, y: y.mean(3)[:, :, 0], None),
        (lambda m, y: nn.functional.avg_pool2d(y, 2).mean((2, 3)), "mean"),
        (lambda m, y: y.mean((1, 2))[:, :4], None),
        (lambda m, y: nn.functional.dropout(m.pool(y).flatten(1), 0.5, True), None),
        (lambda m, y: torch.cat([y, y]).mean((2, 3)).view(4, 4), "mean"),
        (lambda m, y: y[:, :2].mean((2, 3)).repeat(2, 1).view(2, 4), None),
        (lambda m, y: y[:, :2].repeat(2, 1, 1, 1).mean((2, 3)).view(2, 4), None),
    ],
)
def test_where_an_average_over_all_positions_is_found(function, found):
    model, x = Headed(function).eval(), torch.randn(2, 3, 6, 6)
    with steady_calls(model):
        trace, survey = record_calls(model, x), survey_calls(model, x)
    layers = {t.module: t.layers[0] for t in targets.find_targets(trace, survey, {})[0]}
    call = layers["linear"].averages
    assert (None if call is None else trace.calls[call].name) == found


def head(classes: int = 40) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 96, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, classes),
    ).eval()  # fmt: skip


def images(n: int, seed: int) -> torch.Tensor:
    """Smooth images, whose parts differ from each other."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, 3, 3, generator=generator)
    return nn.functional.interpolate(coarse, size=(12, 12), mode="bilinear")


def test_a_wide_layer_is_fitted_better_on_few_images(monkeypatch):
    original = head()
    keep = list(range(0, 96, 2))
    kept = {"0.weight": {0: keep}, "0.bias": {0: keep}, "4.weight": {1: keep}}
    new = images(500, seed=9)

    def error() -> float:
        pruned, plan = cut(original, kept)
        pruned[0].out_channels, pruned[4].in_features = 48, 48
        cpx.compensate(pruned, original, images(60, seed=1), plan=plan, progress=False)
        with torch.no_grad():
            expected = original(new)
            return float((pruned(new) - expected).square().sum() / expected.var(0).sum())

    with_windows = error()
    monkeypatch.setattr(targets, "averaging_call", lambda *_: None)
    assert with_windows < 0.8 * error()


def test_a_refit_to_the_windows_is_exact_where_it_can_be():
    original = head().double()
    with torch.no_grad():  # the second half of the channels repeats the first
        original[0].weight[48:] = 2 * original[0].weight[:48]
        original[0].bias[48:] = 2 * original[0].bias[:48]
    keep = list(range(48))
    pruned, plan = cut(
        original, {"0.weight": {0: keep}, "0.bias": {0: keep}, "4.weight": {1: keep}}
    )
    data = images(150, seed=1).double()
    cpx.compensate(pruned, original, data, plan=plan, ridge=1e-9, progress=False)
    torch.testing.assert_close(pruned(data), original(data), rtol=1e-4, atol=1e-4)


def classifier_moments(model: nn.Module, data: torch.Tensor):
    readers = find_readers(model, data, {"4.weight": True}, 4000)
    measure_readers(model, readers, [data[: len(data) // 2], data[len(data) // 2 :]])
    return readers["4.weight"].moments


def test_enough_images_need_no_windows():
    assert classifier_moments(head(), images(4 * 96, seed=3)).samples == 4 * 96
    original = head()
    keep = list(range(0, 96, 2))
    kept = {"0.weight": {0: keep}, "0.bias": {0: keep}, "4.weight": {1: keep}}
    pruned, plan = cut(original, kept)
    data = images(4 * 48, seed=1)
    report = cpx.compensate(pruned, original, data, plan=plan, held_back=0, progress=False)
    assert report.layers[-1].samples == 4 * 48


def test_elimination_counts_the_windows_too():
    model, data = head(), images(10, seed=3)
    moments = classifier_moments(model, data)
    with torch.no_grad():
        y = torch.relu(model[0](data))
        windows = pooled_windows(y)
        pooled = y.mean((2, 3))
    assert moments.samples == pytest.approx(20)
    expected = (
        pooled.t() @ pooled + torch.einsum("nwc,nwd->cd", windows, windows) / windows.shape[1]
    )
    torch.testing.assert_close(moments.gram[0], expected.double(), rtol=1e-4, atol=1e-4)


def test_samples_that_have_judged_serve_the_output_layer_in_the_end(monkeypatch):
    original = head()
    keep = list(range(0, 96, 2))
    kept = {"0.weight": {0: keep}, "0.bias": {0: keep}, "4.weight": {1: keep}}
    new = images(500, seed=9)

    def run() -> tuple[int, float]:
        pruned, plan = cut(original, kept)
        data = images(60, seed=1)
        report = cpx.compensate(pruned, original, data, plan=plan, held_back=0.5, progress=False)
        with torch.no_grad():
            error = float((pruned(new) - original(new)).square().mean())
        return report.layers[-1].samples, error

    samples, error = run()
    assert samples == 120  # images and, together as much, their windows
    monkeypatch.setattr(
        procedure._Session, "refit_outputs", lambda _, targets, layers, *rest: layers
    )
    samples, without = run()
    assert samples == 60
    assert error < 0.9 * without


def test_an_average_over_the_second_axis_has_no_windows():
    """As many tokens as channels: only the axis tells that tokens are averaged."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.hidden = nn.Linear(5, 16), nn.Linear(16, 8)
            self.classes = nn.Linear(8, 12)

        def forward(self, x):
            return self.classes(self.hidden(self.embed(x).relu()).mean(1))

    torch.manual_seed(0)
    model, x = Tokens().eval(), torch.randn(6, 4, 5)
    pruned = cpx.prune(model, x, 0.5)
    assert pruned.hidden.out_features == x.shape[1]
    before = (pruned(x) - model(x)).norm()
    cpx.compensate(pruned, model, [x, torch.randn(6, 4, 5)])
    assert (pruned(x) - model(x)).norm() < 0.8 * before

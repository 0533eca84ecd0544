"""Ways of pruning side by side: what is measured, and what is written."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console
from torch import nn

import chanprune_ext as cpx
from chanprune_ext.cli.tables import trial_table
from chanprune_ext.data import calibration_batches
from chanprune_ext.data.sets import TensorImages
from chanprune_ext.jobs.trial_report import trial_report
from chanprune_ext.jobs.trials import (
    Draw,
    Further,
    Trial,
    TrialResult,
    run_trials,
    save_trials,
)


def images(n: int, seed: int) -> TensorImages:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (n,), generator=generator)
    return TensorImages(pixels, labels, tuple("abcd"), (0.5,) * 3, (0.25,) * 3, False, 0, 1, False)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def plain(pruned, original, batches) -> None:
    """Leaves everything as it is."""


def test_figures_by_hand(model):
    test = images(50, seed=1)
    x, labels = test.batch(range(50))
    with torch.no_grad():
        before = model(x)
    seen = []

    def options(batches):
        seen.append(torch.cat(batches))
        return {"ratio": 0.5}

    baseline, (result,) = run_trials(
        model,
        test,
        [Trial("half", options, after=plain, published="elsewhere")],
        lambda seed: calibration_batches(images(40, seed=2), 20, seed=seed),
        seeds=(0, 1),
        say=lambda _: None,
    )
    assert baseline == pytest.approx(float((before.argmax(1) == labels).float().mean()))
    pruned = cpx.prune(model, x[:1], 0.5)
    with torch.no_grad():
        after = pruned(x)
    right = [(y.argmax(1) == labels).double() for y in (before, after)]
    for draw in result.draws:
        assert draw.top1 == pytest.approx(float(right[1].mean()))
        assert draw.agreement == pytest.approx(
            float((before.argmax(1) == after.argmax(1)).double().mean())
        )
        logs = [y.double().log_softmax(1) for y in (before, after)]
        expected = float((logs[0].exp() * (logs[0] - logs[1])).sum(1).mean())
        assert draw.kl == pytest.approx(expected, rel=1e-6)
        assert draw.difference_error == pytest.approx(
            float((right[1] - right[0]).std()) / math.sqrt(50)
        )
    assert result.spread == 0
    assert result.params == sum(p.numel() for p in pruned.parameters())
    assert len(seen) == 2
    assert not torch.equal(seen[0], seen[1])  # another draw for every seed


def test_what_is_done_is_kept_when_a_later_trial_fails(model):
    def fails(*_) -> None:
        raise MemoryError

    kept = []
    with pytest.raises(MemoryError):
        run_trials(
            model,
            images(20, seed=1),
            [
                Trial("a", lambda _: {"ratio": 0.25}, after=plain),
                Trial("b", lambda _: {"ratio": 0.5}, after=fails),
            ],
            lambda seed: calibration_batches(images(40, seed=2), 20, seed=seed),
            seeds=(3,),
            say=lambda _: None,
            keep=lambda baseline, results: kept.append([r.name for r in results]),
        )
    assert kept == [["a"]]


def test_everything_is_written(model, tmp_path):
    baseline, results = run_trials(
        model,
        images(20, seed=1),
        [Trial("a", lambda _: {"ratio": 0.25}), Trial("b", lambda _: {"ratio": 0.5}, after=plain)],
        lambda seed: calibration_batches(images(40, seed=2), 20, seed=seed),
        seeds=(3,),
        say=lambda _: None,
    )
    save_trials(tmp_path / "t.json", "title", "command", baseline, 20, results)
    found = json.loads((tmp_path / "t.json").read_text())
    assert found["test_images"] == 20
    assert [t["name"] for t in found["trials"]] == ["a", "b"]
    assert found["trials"][1]["draws"][0]["seed"] == 3
    assert found["trials"][0]["macs_share"] > found["trials"][1]["macs_share"]


def test_further_steps_go_on_from_the_network_before(model):
    def doubled(pruned, original, batches) -> None:
        with torch.no_grad():
            pruned[-1].weight.mul_(2)
            pruned[-1].bias.mul_(2)

    def forgotten(pruned, original, batches) -> None:
        with torch.no_grad():
            pruned[-1].weight.zero_()

    said = []
    further = (Further("doubled", doubled, "elsewhere"), Further("forgotten", forgotten))
    _, results = run_trials(
        model,
        images(30, seed=1),
        [Trial("half", lambda _: {"ratio": 0.5}, after=plain, further=further)],
        lambda seed: calibration_batches(images(40, seed=2), 20, seed=seed),
        seeds=(0, 1),
        say=said.append,
    )
    assert [r.name for r in results] == ["half", "half, doubled", "half, forgotten"]
    assert [r.published for r in results] == ["", "elsewhere", ""]
    assert [[draw.seed for draw in r.draws] for r in results] == [[0, 1]] * 3
    start, twice, none = (r.draws[0] for r in results)
    assert start.top1 == twice.top1  # the larger logit stays the larger one
    assert start.kl != twice.kl
    assert none.kl != twice.kl
    assert start.seconds <= twice.seconds <= none.seconds
    assert len(said) == 12


def test_blends_lie_between_two_images_and_come_last():
    data = images(12, seed=0)
    whole = torch.cat(calibration_batches(data, 12, batch_size=5, seed=1, mixed=True))
    plain_images = torch.cat(calibration_batches(data, 12, batch_size=5, seed=1))
    assert whole.shape[0] == 24
    assert torch.equal(whole[:12], plain_images)
    for own, blend in zip(plain_images, whole[12:], strict=True):
        if torch.allclose(own, blend, atol=1e-5):
            continue  # blended with itself
        found = 0
        for other in plain_images:
            d = own - other
            share = float(((blend - other) * d).sum() / d.square().sum()) if d.any() else 0.0
            if (blend - share * own - (1 - share) * other).abs().max() < 1e-5:
                found += 0.25 - 1e-5 <= share <= 0.75 + 1e-5
        assert found == 1


def test_figures_are_whole_on_a_narrow_terminal():
    draws = tuple(Draw(seed, 0.6612, 0.7508, 0.65, 0.016, 600.0) for seed in range(2))
    long = "hidden -30 %, distilled, no labels"
    result = TrialResult(long, "somebody else: drop 0.5", 1, 1, 0.85, 0.74, draws)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(trial_table(0.7785, 650, [result], "A network"))
    text = console.export_text()
    for figure in ("77.8 ± 1.6 %", "66.1 ± 0.0 %", "11.73", "75.1 %", "x0.74", "x0.85"):
        assert figure in text
    words = text.replace("\n", " ").split()
    assert all(word in words for word in f"{long} {result.published}".split())


@pytest.mark.parametrize(("seeds", "said"), [(1, "one draw"), (3, "mean of 3 draws")])
def test_errors_on_the_page_are_those_of_the_test_images(seeds: int, said: str) -> None:
    draws = tuple(Draw(seed, 0.66, 0.75, 0.65, 0.016, 600.0) for seed in range(seeds))
    result = TrialResult("half", "", 1, 1, 0.5, 0.5, draws)
    report = trial_report("A network", "command", 0.78, 650, [result])
    original, half = report.stages
    assert original.standard_error == pytest.approx(0.016248, abs=1e-6)
    assert half.standard_error == pytest.approx(0.018580, abs=1e-6)  # not 0, as the draws agree
    assert half.note.startswith(said)

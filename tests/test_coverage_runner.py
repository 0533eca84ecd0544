"""The coverage runner: its oracle notices what is wrong, its sandbox survives what breaks."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from psutil import Process
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext.analysis import analyse

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.coverage.__main__ import main
from benchmarks.coverage.case import Case, built
from benchmarks.coverage.checks import TOLERANCE
from benchmarks.coverage.float64 import in_float64
from benchmarks.coverage.oracle import reference_outputs, relative_error
from benchmarks.coverage.ours import check
from benchmarks.coverage.removed import removed_labels, removes_normalised
from benchmarks.coverage.render import rendered
from benchmarks.coverage.sandbox import Limits, run_all

RATIO = 0.5


class Normed(nn.Module):
    """A layer norm over the channels that go."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 16)
        self.norm = nn.LayerNorm(16)
        self.b = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.norm(self.a(x))))


class Attending(nn.Module):
    """Grouped norm, attention with torch's own scale, and a mean over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.GroupNorm(4, 32)
        self.q, self.k, self.v = (nn.Linear(32, 16) for _ in range(3))
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x)).flatten(2).transpose(1, 2)
        x = x * torch.sigmoid(x.mean(2, keepdim=True) + x.max(2, keepdim=True).values)
        query, key = (nn.functional.layer_norm(p(x), p.weight.shape[:1]) for p in (self.q, self.k))
        mixed = nn.functional.scaled_dot_product_attention(query, key, self.v(x))
        return self.out(mixed.mean(1))


NORMED = Case("normed", Normed, lambda: torch.randn(2, 6), family="own")
ATTENDING = Case("attending", Attending, lambda: torch.randn(2, 3, 4, 4), family="own")


def reported(case: Case) -> dict[str, Any]:
    report: dict[str, Any] = {}
    check(case, report.update, ratio=RATIO, export=False)
    return report


def pruned_normed() -> tuple[nn.Module, nn.Module, cpx.PruningPlan, Any, Any, Tensor]:
    model = built(NORMED)
    inputs = NORMED.inputs()
    analysis = analyse(model, inputs)
    plan = cpx.plan(model, inputs, RATIO)
    removed = removed_labels(analysis, plan.kept)
    assert removed is not None
    assert removes_normalised(analysis, removed)
    return model, plan.apply(model), plan, analysis, removed, inputs


def test_oracle_restricts_the_norm_to_kept_channels() -> None:
    model, pruned, plan, analysis, removed, inputs = pruned_normed()
    kept = plan.kept["a.weight"][0]
    # By hand: the same network over the kept channels.
    x = inputs.double()
    by_hand = nn.functional.linear(x, model.a.weight.double()[kept], model.a.bias.double()[kept])
    weight, bias = model.norm.weight.double()[kept], model.norm.bias.double()[kept]
    by_hand = nn.functional.layer_norm(by_hand, [len(kept)], weight, bias)
    head = model.b.weight.double()[:, kept]
    by_hand = nn.functional.linear(torch.tanh(by_hand), head, model.b.bias.double())
    expected = reference_outputs(model, inputs, plan.pruned, analysis, removed)
    assert relative_error(expected, [by_hand.detach()]) < TOLERANCE
    assert relative_error(in_float64(pruned, inputs), expected) < TOLERANCE
    # Zeroing alone is not the same thing here, so the restriction is what made them agree.
    strict = reference_outputs(model, inputs, plan.pruned)
    assert relative_error(strict, expected) > 1e-3


def test_oracle_notices_a_wrong_pruning() -> None:
    model, pruned, plan, analysis, removed, inputs = pruned_normed()
    with torch.no_grad():  # two channels change places in one of the layers
        pruned.b.weight[:, :2] = pruned.b.weight[:, [1, 0]]
    expected = reference_outputs(model, inputs, plan.pruned, analysis, removed)
    assert relative_error(in_float64(pruned, inputs), expected) > 1e-6


def test_kept_indices_that_belong_to_no_plan_have_no_labels() -> None:
    _, _, plan, analysis, _, _ = pruned_normed()
    kept = {**plan.kept, "b.weight": {1: (plan.kept["b.weight"][1] + 1) % 16}}
    assert removed_labels(analysis, kept) is None


@pytest.mark.parametrize("case", [NORMED, ATTENDING], ids=lambda case: case.name)
def test_check_finds_a_sound_pruning_exact(case: Case) -> None:
    report = reported(case)
    assert report["verdict"] == "exact", report
    assert report["exactness"] == "restricted"
    assert report["error"] < TOLERANCE
    assert report["trained"]
    assert report["copies"]
    assert report["params"][1] <= 0.75 * report["params"][0]


def test_check_tells_when_the_plan_was_applied_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = cpx.PruningPlan.apply

    def wrongly(self: cpx.PruningPlan, model: nn.Module, **options: Any) -> nn.Module:
        pruned = apply(self, model, **options)
        with torch.no_grad():
            pruned.b.weight[:, :2] = pruned.b.weight[:, [1, 0]]
        return pruned

    monkeypatch.setattr(cpx.PruningPlan, "apply", wrongly)
    assert reported(NORMED)["verdict"].startswith("failed: exactness")


def test_no_parameter_starts_out_neutral() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU())
    net.register_parameter("gain", nn.Parameter(torch.zeros(())))
    net.register_parameter("table", nn.Parameter(torch.zeros(1, 4, 5)))
    model = built(Case("neutral", lambda: net, lambda: None))
    for tensor in (*model.parameters(), model[1].running_mean, model[1].running_var):
        assert len(tensor.unique()) == tensor.numel()
        assert not ((tensor == 0) | (tensor == 1)).any()


def test_check_records_a_refusal_and_a_crash() -> None:
    only_output = Case("output", lambda: nn.Linear(3, 4), lambda: torch.randn(2, 3))
    assert reported(only_output)["verdict"].startswith("refused: NothingToPruneError")

    def broken() -> nn.Module:
        raise KeyError("no such model")

    verdict = reported(Case("broken", broken, lambda: torch.randn(2, 3)))["verdict"]
    assert verdict.startswith("failed: build: KeyError")


def test_sandbox_survives_hangs_crashes_and_hunger() -> None:
    def hang(send: Any) -> None:
        send({"step": "waiting"})
        time.sleep(60)

    def crash(send: Any) -> None:
        send({"step": "crashing", "so far": 1})
        os.kill(os.getpid(), signal.SIGKILL)

    def hunger(send: Any) -> None:
        send({"step": "eating"})
        # Until it is ended. Some systems count what a fork shares with its parent, some do not.
        eaten = []
        while len(eaten) < 8 * (limit + 1):
            eaten.append(b"x" * 2**27)
            time.sleep(0.05)
        time.sleep(60)

    def late(send: Any) -> None:
        send({"step": "exactness"})
        send({"verdict": "exact"})
        send({"step": "export"})
        time.sleep(60)

    limits = Limits(seconds=1)
    jobs = [("hang", hang, limits), ("crash", crash, limits), ("late", late, limits)]
    # A forked child begins with what this process has.
    limit = round(Process().memory_info().rss / 2**30 + 0.6, 1)
    jobs.append(("hunger", hunger, Limits(seconds=60, gigabytes=limit)))
    found = dict(run_all(jobs, parallel=4))
    assert found["hang"]["verdict"] == "failed: waiting: took too long"
    assert found["crash"]["verdict"] == "failed: crashing: ended with code -9"
    assert found["crash"]["so far"] == 1
    assert found["hunger"]["verdict"] == f"failed: eating: needs more than {limit:g} GB"
    assert found["late"] == {"verdict": "exact", "export": "took too long"}


def test_command_line_writes_results_that_render(tmp_path: Path) -> None:
    file = tmp_path / "coverage-toys.json"
    command = ["--suite", "toys", "--only", "Residual", "GroupNorm4", "--json", str(file)]
    assert main([*command, "--no-export"]) == 0
    results = json.loads(file.read_text())
    assert [r["verdict"] for r in results["models"].values()] == ["exact", "exact"]
    assert results["models"]["GroupNorm4"]["exactness"] == "restricted"
    page = rendered({"toys": results})
    assert "| toys | 2 | 2 | 2 (100%) | 2 | 0 | 0 | 0 |" in page
    assert str(tmp_path) not in file.read_text()
    assert main(["--suite", "toys", "--only", "nothing-of-this-name"]) == 2

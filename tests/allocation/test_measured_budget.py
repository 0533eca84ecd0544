"""Budgets on latency and file size: what is asked for is what the result measures."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torchvision
from models import randomised
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext.allocation import measured_budget
from chanprune_ext.allocation.saved_size import saved_bytes
from chanprune_ext.analysis import analyse
from chanprune_ext.errors import CheckpointError, InvalidArgumentError, OutputError
from chanprune_ext.latency import Latency
from chanprune_ext.latency.layer_times import LatencyTable, TimedCall, default_table
from chanprune_ext.latency.prediction import LatencyModel
from chanprune_ext.models import CifarResNet

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CPU = torch.device("cpu")


def network() -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet(8, width=16).eval()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.inner = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 24))
        self.head = nn.Linear(24, 40, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("small", torch.zeros(3, dtype=torch.float16))
        self.register_buffer("flags", torch.zeros(5, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(x)))


def macs_of(model: nn.Module, x: Tensor) -> int:
    analysis = analyse(model, x)
    return analysis.sizes(analysis.removed_labels({})).macs()


def exact_clock(
    monkeypatch: pytest.MonkeyPatch, offset: float = 0.0, noise: float = 0.0
) -> list[float]:
    """Replaces both clocks: a network takes its MACs plus ``offset`` of the first one's MACs."""
    measured: list[float] = []
    draw = torch.Generator().manual_seed(7)

    def layer_time(call: TimedCall) -> float:
        shapes = [t.shape for t in call.tensors()]
        return 1e-6 * shapes[0].numel() * shapes[1].numel() / shapes[1][1]

    def measure(models: Mapping[str, nn.Module], x: Any, **options: Any) -> dict[str, Latency]:
        macs = {name: float(macs_of(model, x)) for name, model in models.items()}
        first = next(iter(macs.values()))
        spread = 1 + noise * torch.randn(len(macs), 31, generator=draw).clamp(-2, 2)
        measured.extend(value / first for value in macs.values())
        return {
            name: Latency(
                tuple((offset * first + value) * s for s in row.tolist()), 1, "float32", "cpu", 1
            )
            for (name, value), row in zip(macs.items(), spread, strict=True)
        }

    monkeypatch.setattr(TimedCall, "run_time", layer_time)
    monkeypatch.setattr(measured_budget, "measure_latency", measure)
    return measured


@pytest.mark.parametrize(("offset", "noise"), [(0.0, 0.0), (0.3, 0.0), (0.1, 0.02)])
def test_a_latency_budget_is_met_by_measurement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, offset: float, noise: float
) -> None:
    """With ``offset`` the prediction is wrong: part of the time does not shrink at all."""
    exact_clock(monkeypatch, offset, noise)
    model, x = network(), torch.randn(1, 3, 32, 32)
    budget = cpx.Budget(latency=0.6, latency_table=tmp_path / "table.json")
    made = cpx.plan(model, x, budget=budget)

    true_ratio = (offset + made.macs_after / made.macs_before) / (1 + offset)
    assert 0.57 - 3 * noise / 5 <= true_ratio <= 0.6 + 3 * noise / 5
    told = made.options["reached"]["latency"]
    assert told["ratio"] == pytest.approx(true_ratio, abs=noise + 1e-4)
    assert f"x{told['ratio']:.3f}" in str(made)
    again = cpx.PruningPlan.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again.options["reached"] == made.options["reached"]


def test_the_tighter_budget_binds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    exact_clock(monkeypatch)
    model, x = network(), torch.randn(1, 3, 32, 32)
    budget = cpx.Budget(macs=0.3, latency=0.6, latency_table=tmp_path / "table.json")
    with pytest.warns(UserWarning, match=r"takes 0\.\d+ ± .*faster than asked for"):
        made = cpx.plan(model, x, budget=budget)
    assert made.macs_after <= 0.3 * made.macs_before
    budget = cpx.Budget(macs=0.9, latency=0.4, latency_table=tmp_path / "table.json")
    made = cpx.plan(model, x, budget=budget)
    assert 0.38 <= made.macs_after / made.macs_before <= 0.4


def test_a_plan_far_too_fast_is_better_than_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The corrected limit leaves everything in place: the plan that was measured stays."""
    exact_clock(monkeypatch)
    whole = Latency((1.0,), 1, "float32", "cpu", 1)
    fast = measured_budget.Comparison(0.2, 0.0, whole, whole)
    monkeypatch.setattr(measured_budget, "compare_latency", lambda *_, **__: fast)
    budget = cpx.Budget(latency=0.6, latency_table=tmp_path / "table.json")
    with pytest.warns(UserWarning, match="faster than asked for"):
        made = cpx.plan(network(), torch.randn(1, 3, 32, 32), budget=budget)
    assert made.options["reached"]["latency"]["ratio"] == 0.2


def test_a_latency_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    exact_clock(monkeypatch, offset=2.0)
    budget = cpx.Budget(latency=0.2, latency_table=tmp_path / "table.json")
    with pytest.raises(InvalidArgumentError, match=r"budget cannot be met.*of its latency"):
        cpx.plan(network(), torch.randn(1, 3, 32, 32), budget=budget)


def test_meta_models_have_no_latency() -> None:
    with torch.device("meta"):
        model, x = CifarResNet(8), torch.zeros(1, 3, 32, 32)
    with pytest.raises(InvalidArgumentError, match="nothing can be timed"):
        cpx.plan(model, x, criterion="random", budget=cpx.Budget(latency=0.5))


class Clock:
    """Stands still but for what the layers take."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Busy(nn.Linear):
    """Takes a time in proportion to its weights."""

    clock: Clock

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.weight.numel() * 2e-5
        return super().forward(x)


def test_the_time_of_the_whole_network_follows_the_budget(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The layers alone take no time here: the measurement of the whole has to find it."""
    monkeypatch.setattr(Busy, "clock", Clock(), raising=False)
    monkeypatch.setattr("chanprune_ext.latency.measurement.time", Busy.clock)
    monkeypatch.setattr(TimedCall, "run_time", lambda _: 1e-9)
    model = nn.Sequential(Busy(16, 64), nn.ReLU(), Busy(64, 16))
    table = tmp_path / "table.json"
    budget = cpx.Budget(latency=0.6, latency_table=table)
    made = cpx.plan(model, torch.randn(2, 16), budget=budget)
    assert 0.57 * 64 <= made.groups[0].width_after <= 0.6 * 64
    assert made.options["reached"]["latency"]["standard_error"] == 0
    assert len(json.loads(table.read_text())["milliseconds"]) >= 3


def test_predicted_time_falls_with_every_width(monkeypatch: pytest.MonkeyPatch) -> None:
    exact_clock(monkeypatch)
    model, x = network(), torch.randn(2, 3, 32, 32)
    analysis = analyse(model, x)
    predicted = LatencyModel(analysis, model, x, LatencyTable(None, CPU), whole_ms=1e6)
    times = []
    for kept in (1.0, 0.8, 0.5, 0.3):
        gone = {g.index: torch.arange(g.units).numpy() >= g.units * kept for g in analysis.groups}
        times.append(predicted.milliseconds(analysis.sizes(analysis.removed_labels(gone))))
    assert times[0] == pytest.approx(predicted.unpruned_ms)
    assert times == sorted(times, reverse=True)
    assert times[-1] < 0.5 * times[0]


class Convolutions(nn.Module):
    """Grouped, depthwise and transposed: their `groups` has to follow the widths."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3)
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32)
        self.grouped = nn.Conv2d(32, 64, 1, groups=4)
        self.up = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.last = nn.Conv2d(32, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.up(self.grouped(self.depthwise(self.first(x)).relu()).relu()).relu())


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (torch.contiguous_format, (1, 3, 16, 16)),
        (torch.channels_last, (1, 3, 16, 16)),
        (torch.contiguous_format, (3, 16, 16)),
    ],
)
def test_every_convolution_is_timed_at_other_widths(
    layout: torch.memory_format, shape: tuple[int, ...]
) -> None:
    model = Convolutions().eval().to(memory_format=layout)
    x = torch.randn(shape)
    x = x if x.dim() == 3 else x.to(memory_format=layout)
    table = LatencyTable(None, CPU)
    analysis = analyse(model, x)
    predicted = LatencyModel(analysis, model, x, table, whole_ms=5.0)
    before = table.measured
    assert before == 5
    made = cpx.plan(model, x, 0.5)
    gone = {g.index: torch.arange(g.units).numpy() >= g.units // 2 for g in analysis.groups}
    assert predicted.milliseconds(analysis.sizes(analysis.removed_labels(gone))) > 0
    assert table.measured > before
    assert made.apply(model)(x).shape == model(x).shape


def test_attention_and_linear_layers_are_timed(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(2, 7, 32)
    table = LatencyTable(None, CPU)
    LatencyModel(analyse(layer, x), layer, x, table, whole_ms=5.0)
    assert table.measured >= 3


def test_tables_are_kept_and_shared(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "table.json"
    calls = [
        TimedCall.recorded(
            "linear", torch.nn.functional.linear, (torch.randn(4, n), torch.randn(2, n)), {}
        )
        for n in (3, 5)
    ]
    one, two = LatencyTable(path, CPU), LatencyTable(path, CPU)
    first = one.milliseconds(calls[0])
    assert one.milliseconds(calls[0]) == first
    assert one.measured == 1
    second = two.milliseconds(calls[1])
    one.save()
    two.save()
    both = LatencyTable(path, CPU)
    assert len(both) == 2
    assert (both.milliseconds(calls[0]), both.milliseconds(calls[1])) == (first, second)
    assert both.measured == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        both.milliseconds(calls[0])
    finally:
        torch.set_num_threads(threads)
    assert both.measured == 1


def test_tables_of_elsewhere_and_damaged_ones(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table = LatencyTable(path, CPU)
    table.milliseconds(TimedCall.recorded("mm", torch.mm, (torch.eye(2), torch.eye(2)), {}))
    table.save()
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "device": "abacus"}))
    with pytest.raises(CheckpointError, match=r"its device is 'abacus'.*times do not carry over"):
        LatencyTable(path, CPU)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="can't be read as a latency table"):
        LatencyTable(path, CPU)
    (tmp_path / "file").touch()
    table = LatencyTable(tmp_path / "file" / "table.json", CPU)
    table.milliseconds(TimedCall.recorded("mm", torch.mm, (torch.eye(2), torch.eye(2)), {}))
    with pytest.raises(OutputError, match=r"file: can't be made a folder"):
        table.save()


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CHANPRUNE_CACHE", str(tmp_path))
    assert default_table(CPU).parent == tmp_path / "latency"
    assert torch.__version__ in default_table(CPU).name
    monkeypatch.delenv("CHANPRUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_table(CPU).parent == tmp_path / "chanprune_ext" / "latency"


# -- file size -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [network, Tied, lambda: network().to(torch.bfloat16)])
def test_bytes_of_a_file_are_known_before_it_is_written(make: Any, tmp_path: Path) -> None:
    model = make().eval()
    cpx.save(model, tmp_path / "a")
    assert saved_bytes(model) == (tmp_path / "a").stat().st_size
    dtype = next(model.parameters()).dtype
    x = (
        torch.zeros(1, 4, dtype=torch.int64)
        if isinstance(model, Tied)
        else torch.zeros(1, 3, 8, 8, dtype=dtype)
    )
    made = cpx.plan(model, x, 0.5)
    pruned = made.apply(model)
    cpx.save(pruned, tmp_path / "b")
    assert saved_bytes(model, made) == (tmp_path / "b").stat().st_size
    assert saved_bytes(pruned) == (tmp_path / "b").stat().st_size


def test_a_file_size_budget_is_met_to_the_byte(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = CifarResNet(14, width=32).eval(), torch.zeros(1, 3, 32, 32)
    made = cpx.plan(model, x, budget=cpx.Budget(file_size=0.5))
    cpx.save(model, tmp_path / "a")
    cpx.save(made.apply(model), tmp_path / "b")
    before, after = ((tmp_path / name).stat().st_size for name in "ab")
    told = made.options["reached"]["file_size"]
    assert (told["original_bytes"], told["bytes"]) == (before, after)
    assert 0.47 * before < after <= 0.5 * before
    assert f"{before:,} -> {after:,} bytes" in str(made)


def test_a_file_size_that_a_plan_misses_by_less_than_it_has_to_spare() -> None:
    """The text of the plan is in the file: what was just too large must not come back."""
    torch.manual_seed(4)
    model = randomised(torchvision.models.resnet18(num_classes=10), seed=4)
    budget = cpx.Budget(file_size=0.5)
    made = cpx.plan(model, torch.zeros(2, 3, 32, 32), budget=budget, scope="global")
    assert 0.499 < made.options["reached"]["file_size"]["ratio"] <= 0.5


def test_file_size_and_latency_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    exact_clock(monkeypatch)
    torch.manual_seed(0)
    model, x = CifarResNet(14, width=32).eval(), torch.zeros(1, 3, 32, 32)
    budget = cpx.Budget(file_size=0.9, latency=0.5, latency_table=tmp_path / "table.json")
    made = cpx.plan(model, x, budget=budget)
    told = made.options["reached"]
    assert told["file_size"]["ratio"] <= 0.9
    assert 0.475 <= told["latency"]["ratio"] <= 0.5
    cpx.save(made.apply(model), tmp_path / "b")
    assert (tmp_path / "b").stat().st_size == told["file_size"]["bytes"]


def test_a_file_that_cannot_be_so_small() -> None:
    with pytest.raises(InvalidArgumentError, match="of its file size"):
        cpx.plan(network(), torch.zeros(1, 3, 32, 32), budget=cpx.Budget(file_size=0.01))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latency": 0}, r"Budget\.latency must be in \(0, 1\]"),
        ({"file_size": 1.5}, r"Budget\.file_size must be in \(0, 1\]"),
        ({"latency": 0.5, "tolerance": 0}, r"Budget\.tolerance must be in \(0, 1\)"),
        ({}, "Budget needs one of macs, params, latency, file_size"),
    ],
)
def test_bad_budgets(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        cpx.Budget(**options)

"""Latency measurement: order statistics, pairing of rounds, and leaving everything as it was."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.latency import Latency, measure_latency


def latency_of(*samples_ms: float) -> Latency:
    return Latency(samples_ms, batch_size=1, dtype="float32", device="cpu", threads=1)


class RecordingModel(nn.Module):
    """Writes its name into a shared list on every call."""

    def __init__(self, name: str, journal: list[str]) -> None:
        super().__init__()
        self.name = name
        self.journal = journal
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.journal.append(self.name)
        return x


def test_order_statistics_ignore_an_interrupted_round() -> None:
    measured = latency_of(1.0, 2.0, 3.0, 4.0, 1000.0)

    assert measured.median_ms == 3.0
    assert measured.quartiles_ms == (2.0, 4.0)
    assert latency_of(5.0).quartiles_ms == (5.0, 5.0)


def test_speedup_is_the_median_of_paired_ratios() -> None:
    # In the second round the machine was three times slower for both: the ratio does not notice.
    original = latency_of(2.0, 6.0, 2.0)
    pruned = latency_of(1.0, 3.0, 1.0)

    assert pruned.speedup_over(original) == 2.0
    assert original.speedup_over(pruned) == 0.5


def test_speedup_refuses_figures_of_another_measurement() -> None:
    with pytest.raises(InvalidArgumentError, match="same measurement"):
        latency_of(1.0, 1.0).speedup_over(latency_of(1.0))


def test_rounds_interleave_and_rotate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chanprune_ext.latency.measurement._SHORTEST_SAMPLE_MS", 0.0)
    journal: list[str] = []
    models = {name: RecordingModel(name, journal) for name in "ab"}

    measured = measure_latency(models, torch.zeros(4, 3), rounds=4, warmup=0)

    # What comes before are the set-up calls: one checks the model, three size the samples.
    assert journal[-8:] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert list(measured) == ["a", "b"]
    assert all(len(latency.samples_ms) == 4 for latency in measured.values())


def test_a_larger_model_measures_slower() -> None:
    small = nn.Linear(64, 64)
    large = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(4)])
    x = torch.randn(32, 64)
    measured = measure_latency(
        {"small": small, "large": nn.Sequential(nn.Linear(64, 1024), large)}, x, rounds=7, warmup=1
    )

    assert measured["small"].speedup_over(measured["large"]) > 2.0


def test_conditions_are_stated() -> None:
    x = torch.zeros(3, 5, dtype=torch.float64)
    measured = measure_latency({"m": nn.Linear(5, 2).double()}, x, rounds=2, warmup=0, threads=1)

    assert measured["m"].conditions() == (
        "batch 3, float64, cpu, 1 thread, median of 2 interleaved rounds"
    )


def test_flags_threads_and_collector_come_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.train()
    model[1].eval()
    threads = torch.get_num_threads()
    statistics = model[1].running_mean.clone()

    measure_latency({"m": model}, torch.randn(8, 4), rounds=1, warmup=0, threads=threads + 1)

    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert torch.get_num_threads() == threads
    assert gc.isenabled()
    assert torch.equal(model[1].running_mean, statistics)


def test_tuple_and_keyword_inputs() -> None:
    model = nn.Bilinear(3, 4, 2)
    x, y = torch.randn(6, 3), torch.randn(6, 4)

    assert measure_latency({"m": model}, (x, y), rounds=1)["m"].batch_size == 6
    keywords = {"input1": x, "input2": y}
    assert measure_latency({"m": model}, keywords, rounds=1)["m"].batch_size == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, r"rounds: expected an integer >= 1, got 0"),
        ({"warmup": -1}, r"warmup: expected an integer >= 0, got -1"),
        ({"threads": 0}, r"threads: expected an integer >= 1, got 0"),
        ({"models": {}}, r"models: expected at least one"),
        ({"example_inputs": [1]}, r"example_inputs: expected a tensor.*got list"),
        ({"example_inputs": (1,)}, r"example_inputs: expected at least one tensor"),
        ({"example_inputs": torch.zeros(2, 9)}, r"models\['m'\]: the model cannot run"),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "models": {"m": nn.Linear(3, 3)},
        "example_inputs": torch.zeros(1, 3),
        **options,
    }
    with pytest.raises(InvalidArgumentError, match=message):
        measure_latency(**arguments)  # type: ignore[arg-type]

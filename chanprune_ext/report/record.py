"""The record of one pruning run: plain numbers and strings, kept as JSON beside the results."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from chanprune_ext.devices import cpu_name
from chanprune_ext.errors import CheckpointError, InvalidArgumentError
from chanprune_ext.ops import build_info

__all__ = [
    "LayerWidth",
    "Reference",
    "RunReport",
    "Stage",
    "StageLatency",
    "TrainingEpoch",
    "environment",
    "load_report",
]

_FORMAT = "chanprune-report"
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class StageLatency:
    """Measured latency of one stage.

    Attributes:
        median_ms: Median milliseconds per call.
        low_ms: First quartile.
        high_ms: Third quartile.
        speedup: How many times faster than the first stage, from paired rounds.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    speedup: float = 1.0


@dataclass(frozen=True)
class Stage:
    """One state of the model on its way: original, pruned, compensated, recovered.

    Attributes:
        name: What the tables and charts call it.
        accuracy: Top-1 accuracy as a fraction in [0, 1].
        standard_error: Standard error of the accuracy, a fraction.
        samples: Number of test examples behind the accuracy.
        params: Number of parameters.
        macs: Multiply-accumulates of one forward pass on one example.
        latency: Measured latency, or None where it was not measured.
        file_bytes: Size of the saved model, or None where it was not saved.
        note: One line on how this stage was made.
    """

    name: str
    accuracy: float
    standard_error: float
    samples: int
    params: int
    macs: int
    latency: StageLatency | None = None
    file_bytes: int | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if not 0.0 <= self.accuracy <= 1.0:
            raise InvalidArgumentError(
                f"accuracy of stage {self.name!r}: expected a fraction in [0, 1], "
                f"got {self.accuracy!r}"
            )


@dataclass(frozen=True)
class LayerWidth:
    """Output channels of one layer before and after pruning."""

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class TrainingEpoch:
    """One epoch of recovery; the loss is a mean over the epoch, the accuracy a fraction."""

    epoch: int
    loss: float
    val_accuracy: float | None
    learning_rate: float


@dataclass(frozen=True)
class Reference:
    """A result from elsewhere that the run is shown beside.

    Attributes:
        name: Who and how, in a few words.
        change: Of top-1 accuracy against its own unpruned network, a fraction.
        macs_share: Multiply-accumulates left, of the unpruned network's; None where not published.
        latency_share: Time left, likewise.
        source: Where the figure is from, with what it began.
    """

    name: str
    change: float
    macs_share: float | None = None
    latency_share: float | None = None
    source: str = ""


@dataclass(frozen=True)
class RunReport:
    """Everything one run has to show; the first stage is the model that came in.

    Attributes:
        title: Heading of the page.
        command: The command line that made it.
        created: Date and time of the run, ISO 8601.
        summary: One or two sentences under the heading.
        versions: Software and machine, as name to value.
        conditions: Under what conditions latency was measured.
        stages: In the order they were made, at least one.
        widths: Layers in execution order.
        history: Recovery epochs, empty where nothing was trained.
        notes: What the reader must know to trust the numbers.
        sensitivity: Curves of each group, as :meth:`Sensitivity.to_dict` gives them.
        references: Published results for the same network and data.
    """

    title: str
    command: str
    created: str
    stages: tuple[Stage, ...]
    summary: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    conditions: str = ""
    widths: tuple[LayerWidth, ...] = ()
    history: tuple[TrainingEpoch, ...] = ()
    notes: tuple[str, ...] = ()
    sensitivity: Mapping[str, Any] | None = None
    references: tuple[Reference, ...] = ()

    def __post_init__(self) -> None:
        if not self.stages:
            raise InvalidArgumentError("stages: expected at least one stage, got none")

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON-able data, marked with its format and version."""
        return {"format": _FORMAT, "version": _FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunReport:
        """Rebuilds a report from :meth:`to_dict`.

        Raises:
            CheckpointError: The data are not a report, or of a version this package does not know.
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            raise CheckpointError(
                f"report: expected data of format {_FORMAT!r}, got something else"
            )
        if data.get("version") != _FORMAT_VERSION:
            raise CheckpointError(
                f"report: expected version {_FORMAT_VERSION}, got {data.get('version')!r}; "
                "render it with the chanprune_ext that wrote it"
            )
        values = {name: value for name, value in data.items() if name not in ("format", "version")}
        try:
            values["stages"] = tuple(_stage_from(stage) for stage in values["stages"])
            values["widths"] = tuple(LayerWidth(**width) for width in values["widths"])
            values["history"] = tuple(TrainingEpoch(**epoch) for epoch in values["history"])
            values["notes"] = tuple(values["notes"])
            # reports of earlier releases have none
            found = values.get("references", ())
            values["references"] = tuple(Reference(**reference) for reference in found)
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"report: a field is missing or unknown ({error})") from error


def environment() -> dict[str, str]:
    """Names the software and the machine a run happened on."""
    build = build_info()
    native = f"CPU, {build['simd_level']}" if build["cpu"] else "none, pure torch instead"
    if build["cuda"]:
        native += f"; CUDA {build['cuda_toolkit']}"
    facts = {
        "chanprune_ext": build["version"],
        "native operators": native,
        "torch": build["torch"],
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": f"{cpu_name()}, {os.cpu_count()} logical cores",
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def load_report(path: str | os.PathLike[str]) -> RunReport:
    """Reads a report back from its JSON file.

    Raises:
        CheckpointError: The file is missing, no JSON, or no report.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"report {os.fspath(path)!r} cannot be read: {error}") from error
    return RunReport.from_dict(data)


def _stage_from(data: Mapping[str, Any]) -> Stage:
    values = dict(data)
    latency = values.pop("latency", None)
    return Stage(**values, latency=StageLatency(**latency) if latency else None)

"""All that a recovery run needs to go on elsewhere: taken out of the run, and put back into it."""

from __future__ import annotations

import zlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoint import without_duplicates
from ..plan import plans_of
from .evaluation import Evaluation
from .feature_matching import composed_kept
from .result import EpochRecord
from .same_run import check_same, regrouped_position
from .sharding import divided_like, gathered_on_first, own_part
from .shares import images_a_batch
from .taps import plain_module
from .weights import named_tensors, own_slice

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .checkpoints import Checkpoint
    from .run import Run

__all__ = ["captured", "put_back"]

_WITHOUT_EFFECT = ("workers", "compile", "format", "shard")  # on what is computed


def captured(run: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a run under names of their own, and all the rest as plain values.

    Random states are those of all processes, all else is the same in each of them.
    """
    weights = named_tensors(run.student)
    if not run.recipe.shard:
        weights, _ = without_duplicates(weights)
    parts: dict[str, Mapping[str, Tensor]] = {"student": weights}
    if run.average is not None:
        parts["average"] = run.average.state
    if run.best is not None:
        parts["best"] = run.best[2]
    if run.recipe.shard:
        divided = dict(run.student.named_parameters())
        for part, own_slices in parts.items():
            parts[part] = gathered_on_first(own_slices, divided, run.processes)
    own = {**run.pass_.moments, "now": run.pass_.random_now()}
    for index, moments in enumerate(run.processes.gathered(own)):
        parts |= {f"{_random(index)}{moment}": state for moment, state in moments.items()}
    plain: dict[str, dict[str, Any]] = {}
    for index, values in run.optimizer.state_dict()["state"].items():
        tensors = {k: v for k, v in values.items() if isinstance(v, Tensor)}
        parts[f"optimizer.{index}"] = tensors
        if run.recipe.shard:
            like = {k: v for k, v in tensors.items() if hasattr(v, "full_tensor")}
            slices = {k: own_slice(v) for k, v in tensors.items()}
            parts[f"optimizer.{index}"] = gathered_on_first(slices, like, run.processes)
        plain[str(index)] = {k: v for k, v in values.items() if k not in tensors}
    state = {
        "run": identity(run),
        "position": asdict(run.at),
        "before": _optional(run.before),
        "history": [asdict(record) for record in run.history],
        "optimizer": plain,
        "average_updates": None if run.average is None else run.average.updates,
        "best": None if run.best is None else run.best[:2],
        "scaler": None if run.accelerator.scaler is None else run.accelerator.scaler.state_dict(),
    }
    named = {f"{part}/{name}": t for part, some in parts.items() for name, t in some.items()}
    return named, state


def put_back(run: Run, checkpoint: Checkpoint) -> None:
    """Brings a new run to where the one of the checkpoint was.

    Raises:
        CheckpointError: it is of another run; the message names the first difference.
    """
    state, ours = checkpoint.state, identity(run)
    regrouped = ours["processes"] != state["run"]["processes"]
    check_same(checkpoint, ours, regrouped)
    position = regrouped_position(checkpoint, ours, run) if regrouped else state["position"]
    parts: dict[str, dict[str, Tensor]] = {}
    for path, tensor in checkpoint.tensors.items():
        part, _, name = path.partition("/")
        parts.setdefault(part, {})[name] = tensor
    if run.recipe.shard:
        _divide(run, parts)
    _fill(named_tensors(run.student), parts["student"])
    entries: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in state["optimizer"].items()}
    for index, values in entries.items():
        values.update(parts.get(f"optimizer.{index}", {}))
    whole = run.optimizer.state_dict()
    run.optimizer.load_state_dict({**whole, "state": entries})
    if state["average_updates"] is None:
        run.average = None
    elif run.average is not None:
        run.average.updates = state["average_updates"]
        _fill(run.average.state, parts["average"])
    if state["best"] is not None:
        weights = {k: v.to(run.device) for k, v in parts.get("best", {}).items()}
        run.best = (*state["best"], weights)
    if run.accelerator.scaler is not None and state["scaler"] is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.before = _evaluation(state["before"])
    run.history = [
        EpochRecord(**{**record, "val": _evaluation(record["val"])}) for record in state["history"]
    ]
    for name, value in position.items():
        setattr(run.at, name, value)
    mine = _random(run.processes.index)
    known = any(part.startswith(mine) for part in parts)
    prefix = mine if known else _random(0)
    moments = {
        part.removeprefix(prefix): {name: value.clone() for name, value in values.items()}
        for part, values in parts.items()
        if part.startswith(prefix)
    }
    if not known:  # a process more than there were: what it draws shall be its own
        moments["now"] = {**moments["now"], "torch": torch.get_rng_state()}
    run.pass_.put_back(moments)


def _divide(run: Run, parts: dict[str, dict[str, Tensor]]) -> None:
    """Takes what is this process's out of whole tensors, in place."""
    named: dict[str, Any] = dict(run.student.named_parameters())
    for part in ("student", "average", "best"):
        for name, whole in parts.get(part, {}).items():
            own = own_part(whole, named[name]) if name in named else whole
            parts[part][name] = own.to(run.device, copy=True)
    trained = [p for group in run.optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(trained):
        values = parts.get(f"optimizer.{index}", {})
        for name, whole in values.items():
            if whole.shape == parameter.shape:  # others are counters
                own = own_part(whole, parameter).to(run.device, copy=True)
                values[name] = divided_like(parameter, own)
            else:
                values[name] = whole.clone()


def _random(index: int) -> str:
    """What the names of a process's random states begin with."""
    return f"random{index or ''}."


def identity(run: Run) -> dict[str, dict[str, Any]]:
    """What two runs must agree on for one to go on with a checkpoint of the other."""
    student = plain_module(run.student)
    recipe = {k: v for k, v in run.recipe.to_dict().items() if k not in _WITHOUT_EFFECT}
    kept = composed_kept(plans_of(student))
    return {
        "student": {
            name: f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
            for name, tensor in [*run.student.named_parameters(), *run.student.named_buffers()]
        },
        "trained": {name: p.requires_grad for name, p in run.student.named_parameters()},
        "plan": {
            f"{entry}, dim {dim}": f"kept {len(index)}, checksum {_checksum(index)}"
            for entry, dims in kept.items()
            for dim, index in dims.items()
        },
        "teacher": {"class": _class_of(run.whole[1])},
        "task": run.task,
        "recipe": recipe,
        "train": {
            "batches an epoch": len(run.loader),
            "images": _length(getattr(run.source, "dataset", None)),
            "images a batch": images_a_batch(run.source),
        },
        "val": {"length": _length(run.val)},
        "processes": {"number": run.accelerator.num_processes},
    }


def _fill(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copies into the tensors of these names; those that share memory are named once."""
    with torch.no_grad():
        for name, value in values.items():
            targets[name].copy_(value)


def _optional(found: Evaluation | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


def _evaluation(values: dict[str, Any] | None) -> Evaluation | None:
    return None if values is None else Evaluation(**values)


def _checksum(index: Tensor) -> int:
    return zlib.crc32(str(index.tolist()).encode())


def _class_of(model: nn.Module | None) -> str | None:
    return None if model is None else type(plain_module(model)).__qualname__


def _length(data: Any) -> int | None:
    return len(data) if hasattr(data, "__len__") else None

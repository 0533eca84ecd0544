"""What a pruned model must still do, whoever pruned it; every result is reported at once."""

from __future__ import annotations

import copy
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.case import Case, built, called
from chanprune_ext.analysis.calls import tensors_in

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "EFFECTIVE",
    "TOLERANCE",
    "CheckError",
    "Report",
    "Steps",
    "Subject",
    "cpu_seconds",
    "evaluated",
    "subject",
    "survives",
    "told",
]

TOLERANCE = 1e-9
EFFECTIVE = 0.75
"""A pruned model must have at most this fraction of the parameters."""

Report = dict[str, Any]


class CheckError(Exception):
    """A check did not hold; the message says what was seen."""


def told(error: Exception, length: int = 600) -> str:
    """Kind and message of an error, without the folders of this machine."""
    return re.sub(r"(/[\w.\-]+)+/", "", f"{type(error).__name__}: {error}")[:length]


class Steps:
    """Tells the parent process where the run is, so that a hang or a crash has a name."""

    def __init__(self, send: Callable[[Report], None]) -> None:
        self.send = send
        self.current = "build"

    def __call__(self, name: str) -> None:
        self.current = name
        self.send({"step": name})


@dataclass(eq=False)
class Subject:
    """A model before it is pruned, and how it behaves.

    Attributes:
        case: Where it comes from.
        model: In eval mode.
        inputs: What it is pruned with.
        other: Another batch, for comparing.
        trainable: A batch for training mode.
        output: What it returns for ``other``.
        train_form: Form of its output in training mode; None if it does not run there.
        reached: Parameters that backward reaches.
    """

    case: Case
    model: nn.Module
    inputs: Any
    other: Any
    trainable: Any
    output: Any
    train_form: Any
    reached: set[str]


def cpu_seconds(function: Callable[[], Any]) -> tuple[Any, float]:
    """What ``function`` returns, and the CPU seconds it took."""
    start = time.process_time()
    result = function()
    return result, round(time.process_time() - start, 5)


def _batch(case: Case, seed: int) -> Any:
    torch.manual_seed(seed)
    return case.inputs()


def _form(output: Any, *, dynamic: bool) -> Any:
    """What two outputs must agree in: the shapes in order, or only the ranks."""
    return [t.dim() if dynamic else tuple(t.shape) for t in tensors_in(output)]


def evaluated(model: nn.Module, inputs: Any) -> Any:
    """The output in eval mode, without gradients."""
    torch.manual_seed(0)
    with torch.no_grad():
        return called(model.eval(), copy.deepcopy(inputs))


def _states(model: nn.Module) -> list[tuple[str, Tensor]]:
    """What a forward in training mode may write to: statistics, averages of weights."""
    still = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    return [*model.named_buffers(), *still]


def _trained(model: nn.Module, inputs: Any, *, dynamic: bool) -> tuple[Any, set[str]]:
    """Form of the output in training mode, and the parameters that backward reaches.

    Everything that a training step changes on the way is put back.
    """
    states = {n: b.detach().clone() for n, b in _states(model)}
    flags = {m: m.training for m in model.modules()}
    try:
        model.train()
        torch.manual_seed(0)
        output = called(model, copy.deepcopy(inputs))
        floats = [t for t in tensors_in(output) if t.is_floating_point() and t.requires_grad]
        total = sum(t.square().mean() for t in floats if t.numel())
        if isinstance(total, Tensor):
            torch.autograd.backward(total)
        reached = {name for name, p in model.named_parameters() if p.grad is not None}
        return _form(output, dynamic=dynamic), reached
    finally:
        model.zero_grad(set_to_none=True)
        for module, flag in flags.items():
            module.training = flag
        with torch.no_grad():
            for name, state in _states(model):
                if name in states and states[name].shape == state.shape:
                    state.copy_(states[name])


def subject(case: Case, step: Steps) -> Subject:
    """Build a model and see how it behaves."""
    step("build")
    model = built(case)
    inputs, other, trainable = _batch(case, 1), _batch(case, 2), _batch(case, 3)
    step("original forward")
    evaluated(model, inputs)
    output, seconds = cpu_seconds(lambda: evaluated(model, other))
    step.send({"forward_s": seconds})
    step("original training")
    try:
        train_form, reached = _trained(model, trainable, dynamic=case.dynamic)
        # A forward may leave graph tensors on the model, which torch then refuses to copy.
        evaluated(model, inputs)
    except Exception as error:  # noqa: BLE001 - some models do not train on two small examples
        train_form, reached = None, set()
        step.send({"original_training": told(error, 200)})
    return Subject(case, model, inputs, other, trainable, output, train_form, reached)


def survives(subject: Subject, pruned: nn.Module, step: Steps) -> Any:
    """Run a pruned model in both modes and return its output on ``subject.other``.

    Raises:
        CheckError: Outputs have other shapes, or backward misses a parameter.
    """
    dynamic = subject.case.dynamic
    step("forward")
    after = evaluated(pruned, subject.other)
    found, expected = (_form(out, dynamic=dynamic) for out in (after, subject.output))
    if type(after) is not type(subject.output) or found != expected:
        raise CheckError(f"shapes {found}, before {expected}"[:300])
    if subject.train_form is None:
        return after
    step("training")
    found, reached = _trained(pruned, subject.trainable, dynamic=dynamic)
    evaluated(pruned, subject.inputs)
    if found != subject.train_form:
        raise CheckError(f"training mode: shapes {found}, before {subject.train_form}"[:300])
    lost = sorted((subject.reached & dict(pruned.named_parameters()).keys()) - reached)
    if lost:
        raise CheckError(f"backward no longer reaches {lost[:3]} ({len(lost)} in all)")
    step.send({"trained": True})
    return after

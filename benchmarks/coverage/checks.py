"""One model through this library, step by step; every step's result is reported as it is known."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import chanprune_ext as cpx
from benchmarks.coverage.case import Case, built, called
from benchmarks.coverage.oracle import (
    OracleError,
    in_float64,
    reference_outputs,
    relative_error,
    removed_labels,
    removes_normalised,
)
from chanprune_ext.analysis import analyse
from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.copying import copied
from chanprune_ext.errors import ChanpruneError

if TYPE_CHECKING:
    from collections.abc import Callable

    from chanprune_ext import PruningPlan
    from chanprune_ext.analysis import Analysis

__all__ = ["EFFECTIVE", "TOLERANCE", "CheckError", "Report", "check", "cpu_seconds", "trained"]

TOLERANCE = 1e-9
EFFECTIVE = 0.75
"""A pruned model must have at most this fraction of the parameters."""

Report = dict[str, Any]


class CheckError(Exception):
    """A check did not hold; the message says what was seen."""


def cpu_seconds(function: Callable[[], Any]) -> tuple[Any, float]:
    """What ``function`` returns, and the CPU seconds it took."""
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def batch(case: Case, seed: int, *, train: bool = False) -> Any:
    """Inputs drawn with ``seed``."""
    torch.manual_seed(seed)
    return case.train_inputs() if train and case.train_inputs else case.inputs()


def form(output: Any, *, dynamic: bool) -> Any:
    """What two outputs must agree in: the shapes in order, or only their number."""
    tensors = tensors_in(output)
    return [t.dim() if dynamic else tuple(t.shape) for t in tensors]


def trained(model: nn.Module, inputs: Any, *, dynamic: bool) -> tuple[Any, set[str]]:
    """Output form in training mode, and the parameters that backward reaches.

    Buffers, training flags and gradients are put back.
    """
    buffers = {name: b.clone() for name, b in model.named_buffers()}
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
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and parameter.grad.shape != parameter.shape:
                raise CheckError(f"the gradient of {name} has another shape")
        return form(output, dynamic=dynamic), reached
    finally:
        model.zero_grad(set_to_none=True)
        for module, flag in flags.items():
            module.training = flag
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers and buffers[name].shape == buffer.shape:
                    buffer.copy_(buffers[name])


def _evaluated(model: nn.Module, inputs: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        return called(model.eval(), copy.deepcopy(inputs))


def _describe(report: Report, plan: PruningPlan, analysis: Analysis) -> None:
    roles = analysis.trace.roles
    made = sum(analysis.trace.shapes[e][d] for (e, d), role in roles.items() if role == "out")
    held = Counter[str]()
    at_output = 0
    for item in plan.frozen:
        if item.why == "the model's output":
            at_output += item.channels
        else:
            where = f" in {item.module}" if item.module else ""
            held[f"{item.why}{where} ({item.op}, {item.source})"] += item.channels
    report["params"] = [plan.params_before, plan.params_after]
    report["macs"] = [plan.macs_before, plan.macs_after]
    report["covered"] = round(1 - sum(held.values()) / max(made - at_output, 1), 4)
    report["frozen"] = [f"{n} x {why}"[:300] for why, n in held.most_common(8)]
    report["at_output"] = at_output
    report["unknown_ops"] = sorted({e.op for e in analysis.trace.unknown})
    report["effective"] = plan.params_after <= EFFECTIVE * plan.params_before
    report["substrate"] = analysis.trace.substrate


def check(case: Case, send: Callable[[Report], None], *, ratio: float, export: bool) -> None:
    """Prune one model and look at the result from all sides.

    Args:
        case: The model.
        send: Called with what is new after each step; ``{"step": name}`` before it.
        ratio: Fraction of the channels to remove.
        export: Whether to try ``torch.export`` too.
    """
    steps = _Steps(send)
    try:
        _check(case, steps, ratio=ratio, export=export)
    except ChanpruneError as error:
        kind = "refused" if steps.current in ("plan", "analyse") else f"failed: {steps.current}"
        send({"verdict": f"{kind}: {type(error).__name__}: {error}"[:600]})
    except Exception as error:  # noqa: BLE001 - whatever a model raises is a result
        send({"verdict": f"failed: {steps.current}: {type(error).__name__}: {error}"[:600]})


class _Steps:
    """Tells the parent where the run is, so that a hang or a crash has a name."""

    def __init__(self, send: Callable[[Report], None]) -> None:
        self.send = send
        self.current = "build"

    def __call__(self, name: str) -> None:
        self.current = name
        self.send({"step": name})


def _check(case: Case, step: _Steps, *, ratio: float, export: bool) -> None:
    send = step.send
    step("build")
    model = built(case)
    inputs, other, trainable = batch(case, 1), batch(case, 2), batch(case, 3, train=True)
    step("original forward")
    _evaluated(model, inputs)
    before, seconds = cpu_seconds(lambda: _evaluated(model, other))
    expected = form(before, dynamic=case.dynamic)
    send({"forward_s": seconds})
    step("original training")
    try:
        train_form, reached = trained(model, trainable, dynamic=case.dynamic)
        # A forward may leave graph tensors on the model, which torch then refuses to copy.
        _evaluated(model, inputs)
    except Exception as error:  # noqa: BLE001 - some models do not train on two small examples
        train_form, reached = None, set()
        send({"original_training": f"{type(error).__name__}: {error}"[:200]})

    step("analyse")
    analysis, seconds = cpu_seconds(lambda: analyse(model, inputs))
    send({"analyse_s": seconds})
    step("plan")
    plan, seconds = cpu_seconds(lambda: cpx.plan(model, inputs, ratio))
    send({"plan_s": seconds})
    described: Report = {}
    _describe(described, plan, analysis)
    send(described)
    step("apply")
    pruned, seconds = cpu_seconds(lambda: plan.apply(model, verify="replay"))
    send({"apply_s": seconds})
    if sum(p.numel() for p in pruned.parameters()) != plan.params_after:
        raise CheckError("the plan announces another number of parameters")

    step("forward")
    after = _evaluated(pruned, other)
    if type(after) is not type(before) or form(after, dynamic=case.dynamic) != expected:
        raise CheckError(f"shapes {form(after, dynamic=case.dynamic)}, before {expected}"[:300])
    step("training")
    if train_form is not None:
        found, reached_after = trained(pruned, trainable, dynamic=case.dynamic)
        _evaluated(pruned, inputs)
        if found != train_form:
            raise CheckError(f"training mode: shapes {found}, before {train_form}"[:300])
        lost = sorted((reached & dict(pruned.named_parameters()).keys()) - reached_after)
        if lost:
            raise CheckError(f"backward no longer reaches {lost[:3]} ({len(lost)} in all)")
        send({"trained": True})

    if not case.huge:
        step("copies")
        _copies(case, model, plan, pruned, other, after)
        send({"copies": True})
    exact = _exactness(step, model, pruned, other, plan, analysis, case)
    send(exact)
    send({"verdict": exact["conclusion"] if described["effective"] else "runs: not effective"})
    if export and not case.huge:
        _export(case, step, inputs, plan)


def _deep_copies(model: nn.Module) -> bool:
    try:
        copy.deepcopy(model)
    except RuntimeError:
        return False
    return True


def _copies(
    case: Case, model: nn.Module, plan: PruningPlan, pruned: nn.Module, inputs: Any, output: Any
) -> None:
    """A deep copy, a state-dict round trip and a file must all give the same outputs."""
    expected = tensors_in(output)

    def compare(model: nn.Module, what: str) -> None:
        found = tensors_in(_evaluated(model, inputs))
        error = relative_error(found, expected)
        if error > 0:
            raise CheckError(f"{what} gives other outputs (relative error {error:.1e})")

    try:
        twin = copy.deepcopy(pruned)
    except RuntimeError:
        if _deep_copies(model):
            raise
        twin = copied(pruned)  # torch does not copy the original either
    compare(twin, "a deep copy")
    twin.load_state_dict(pruned.state_dict())
    compare(twin, "a state-dict round trip")
    del twin
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        cpx.save(pruned, path)
        fresh = built(case)
        with torch.no_grad():
            for tensor in fresh.state_dict().values():
                if isinstance(tensor, Tensor):
                    tensor.zero_()
        compare(cpx.load(path, fresh).eval(), "save and load")
    if sum(p.numel() for p in pruned.parameters()) != plan.params_after:
        raise CheckError("copying changed the model")


def _exactness(
    step: _Steps,
    model: nn.Module,
    pruned: nn.Module,
    inputs: Any,
    plan: PruningPlan,
    analysis: Analysis,
    case: Case,
) -> Report:
    """Compare with the oracle in float64; the models are used up."""
    step("exactness")
    result: Report = {}
    removed = removed_labels(analysis, plan.kept)
    if removed is None:
        raise CheckError("the plan keeps channels that no choice of units explains")
    actual = in_float64(pruned, inputs)
    normalised = removes_normalised(analysis, removed)
    kinds: list[tuple[str, dict[str, Any]]] = [("strict", {})]
    if normalised:
        kinds = [("restricted", {"analysis": analysis, "removed": removed})]
    kinds.append(("rescaled", {"analysis": analysis, "removed": removed, "rescale": True}))
    for kind, options in kinds:
        if kind == "rescaled" and not any(
            c.name == "scaled_dot_product_attention" for c in analysis.trace.calls
        ):
            break
        try:
            expected = reference_outputs(model, inputs, plan.pruned, **options)
            error = relative_error(actual, expected)
        except OracleError as problem:
            return {"exactness": kind, "conclusion": f"runs: no reference: {problem}"}
        result = {"exactness": kind, "error": error if math.isfinite(error) else "inf"}
        if error < TOLERANCE:
            return {**result, "conclusion": "exact"}
    if case.dynamic:
        return {**result, "conclusion": "runs"}
    return {**result, "conclusion": f"failed: exactness: relative error {error:.1e} ({kind})"}


def _export(case: Case, step: _Steps, inputs: Any, plan: PruningPlan) -> None:
    """Whether ``torch.export`` takes the pruned model, or refuses the original as well."""
    step("export")
    model = built(case)

    def attempt(module: nn.Module) -> str:
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        try:
            torch.export.export(module, args if isinstance(args, tuple) else (args,), kwargs)
        except Exception as error:  # noqa: BLE001 - whatever it raises is the result
            return f"{type(error).__name__}: {error}"[:200]
        return "ok"

    found = attempt(plan.apply(model, verify=None))
    if found != "ok" and attempt(model) != "ok":
        found = "not the original either"
    step.send({"export": found})

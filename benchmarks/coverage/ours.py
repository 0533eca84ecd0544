"""One model through this library, looked at from all sides."""

from __future__ import annotations

import copy
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import chanprune_ext as cpx
from benchmarks.coverage.case import built
from benchmarks.coverage.checks import (
    EFFECTIVE,
    TOLERANCE,
    CheckError,
    Report,
    Steps,
    Subject,
    cpu_seconds,
    evaluated,
    subject,
    survives,
    told,
)
from benchmarks.coverage.float64 import in_float64
from benchmarks.coverage.oracle import OracleError, reference_outputs, relative_error
from benchmarks.coverage.removed import removed_labels, removes_normalised
from chanprune_ext.analysis import analyse
from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.copying import copied
from chanprune_ext.errors import ChanpruneError

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.coverage.case import Case
    from chanprune_ext import PruningPlan
    from chanprune_ext.analysis import Analysis

__all__ = ["check"]

_AT_OUTPUT = "the model's output"


def check(case: Case, send: Callable[[Report], None], *, ratio: float, export: bool) -> None:
    """Prune one model and report what comes of it.

    Args:
        case: The model.
        send: Called with what is new after each step; ``{"step": name}`` before it.
        ratio: Fraction of the channels to remove.
        export: Whether to try ``torch.export`` too.
    """
    step = Steps(send)
    try:
        _check(case, step, ratio=ratio, export=export)
    except ChanpruneError as error:
        kind = "refused" if step.current in ("plan", "analyse") else f"failed: {step.current}"
        send({"verdict": f"{kind}: {told(error)}"})
    except Exception as error:  # noqa: BLE001 - whatever a model raises is a result
        send({"verdict": f"failed: {step.current}: {told(error)}"})


def _check(case: Case, step: Steps, *, ratio: float, export: bool) -> None:
    send = step.send
    given = subject(case, step)
    step("analyse")
    analysis, seconds = cpu_seconds(lambda: analyse(given.model, given.inputs))
    send({"analyse_s": seconds})
    step("plan")
    plan, seconds = cpu_seconds(lambda: cpx.plan(given.model, given.inputs, ratio))
    described = {**_described(plan, analysis), "plan_s": seconds}
    send(described)
    step("apply")
    pruned, seconds = cpu_seconds(lambda: plan.apply(given.model, verify="replay"))
    send({"apply_s": seconds})
    if sum(p.numel() for p in pruned.parameters()) != plan.params_after:
        raise CheckError("the plan announces another number of parameters")
    output = survives(given, pruned, step)
    if not case.huge:
        step("copies")
        _copies(given, pruned, output)
        send({"copies": True})
    step("exactness")
    exact, conclusion = _exactness(given, pruned, plan, analysis)
    send(exact)
    if conclusion == "exact" and not described["effective"]:
        conclusion = "runs: exact, but not effective"
    send({"verdict": conclusion})
    if export and not case.huge:
        step("export")
        send({"export": _exported(given, plan)})


def _described(plan: PruningPlan, analysis: Analysis) -> Report:
    """What a plan does, in numbers."""
    shapes = analysis.trace.shapes
    made = sum(shapes[e][d] for (e, d), role in analysis.trace.roles.items() if role == "out")
    held = Counter[str]()
    at_output = 0
    for item in plan.frozen:
        if item.why == _AT_OUTPUT:
            at_output += item.channels
        else:
            where = f" in {item.module}" if item.module else ""
            held[f"{item.why}{where} ({item.op}, {item.source})"] += item.channels
    return {
        "params": [plan.params_before, plan.params_after],
        "macs": [plan.macs_before, plan.macs_after],
        "effective": plan.params_after <= EFFECTIVE * plan.params_before,
        "covered": round(1 - sum(held.values()) / max(made - at_output, 1), 4),
        "at_output": at_output,
        "frozen": [f"{n} x {why}"[:300] for why, n in held.most_common(8)],
        "unknown_ops": sorted({event.op for event in analysis.trace.unknown}),
        "substrate": analysis.trace.substrate,
    }


def _deep_copies(model: nn.Module) -> bool:
    try:
        copy.deepcopy(model)
    except RuntimeError:
        return False
    return True


def _copies(given: Subject, pruned: nn.Module, output: Any) -> None:
    """A deep copy, a state-dict round trip and a file must all give the same outputs."""
    expected = tensors_in(output)

    def compare(model: nn.Module, what: str) -> None:
        error = relative_error(tensors_in(evaluated(model, given.other)), expected)
        if error > 0:
            raise CheckError(f"{what} gives other outputs (relative error {error:.1e})")

    try:
        twin = copy.deepcopy(pruned)
    except RuntimeError:
        if _deep_copies(given.model):
            raise
        twin = copied(pruned)  # torch does not copy the original either
    compare(twin, "a deep copy")
    twin.load_state_dict(pruned.state_dict())
    compare(twin, "a state-dict round trip")
    del twin
    fresh = built(given.case)
    with torch.no_grad():
        for tensor in fresh.state_dict().values():
            if isinstance(tensor, Tensor):
                tensor.zero_()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        cpx.save(pruned, path)
        compare(cpx.load(path, fresh).eval(), "a saved and loaded model")


def _exactness(
    given: Subject, pruned: nn.Module, plan: PruningPlan, analysis: Analysis
) -> tuple[Report, str]:
    """Compare with the oracle in float64; the models are used up. Figures and a verdict."""
    removed = removed_labels(analysis, plan.kept)
    if removed is None:
        raise CheckError("the plan keeps channels that no choice of units explains")
    kind, options = "strict", dict[str, Any]()
    if removes_normalised(analysis, removed):
        kind, options = "restricted", {"analysis": analysis, "removed": removed}
    # In float32 a scale folded into weights is rounded; in float64 that hides nothing. The model is
    # a fresh one, since a forward may have left results in float32 behind.
    double = (given.model if given.case.huge else built(given.case)).double()
    pruned_double = plan.apply(double, verify=None)
    for (name, p), q in zip(pruned_double.named_parameters(), pruned.parameters(), strict=True):
        if not torch.allclose(p, q.double(), rtol=1e-5, atol=1e-6):
            raise CheckError(f"applied in float64 the plan leaves other values in {name}")
    actual = in_float64(pruned_double, given.other)
    whole = in_float64(double, given.other)
    try:
        expected = reference_outputs(double, given.other, plan.pruned, **options)
        error = relative_error(actual, expected)
        # A network that ignores its channels would agree with anything.
        blind = relative_error(whole, expected) < TOLERANCE
    except OracleError as problem:
        return {"exactness": kind}, f"runs: no reference: {problem}"
    report = {"exactness": kind, "error": error if math.isfinite(error) else "inf"}
    if error >= TOLERANCE:
        return report, f"failed: exactness: relative error {error:.1e} ({kind})"
    return report, "runs: the output ignores what was removed" if blind else "exact"


def _exported(given: Subject, plan: PruningPlan) -> str:
    """Whether ``torch.export`` takes the pruned model, or refuses the original as well."""
    model = built(given.case)
    inputs = given.inputs

    def attempt(module: nn.Module) -> str:
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        try:
            torch.export.export(module, args if isinstance(args, tuple) else (args,), kwargs)
        except Exception as error:  # noqa: BLE001 - whatever it raises is the result
            return told(error, 200)
        return "ok"

    found = attempt(plan.apply(model, verify=None))
    return "not the original either" if found != "ok" and attempt(model) != "ok" else found

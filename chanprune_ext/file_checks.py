"""Checks of a saved model: of the file alone, and of the model rebuilt from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from chanprune_ext.analysis.calls import run_model, steady_calls, tensors_in
from chanprune_ext.analysis.stand_ins import tensors_of
from chanprune_ext.checkpoint import read_description
from chanprune_ext.errors import ChanpruneError
from chanprune_ext.module_modes import without_cache
from chanprune_ext.plan import PruningPlan, plans_of, plans_within
from chanprune_ext.soundness import is_sound
from chanprune_ext.widths import shape_after

if TYPE_CHECKING:
    import os

    from torch import nn

__all__ = ["Check", "check_file", "check_model"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        passed: Whether it is as it should be; None where there is nothing to hold against it.
        detail: What was found.
    """

    name: str
    passed: bool | None
    detail: str


def check_file(path: str | os.PathLike[str]) -> list[Check]:
    """Looks at a file without the model: whole, a plan that holds together, finite weights.

    Tensors are read one at a time. A file that can't be read at all fails the first check, and the
    others are left out.
    """
    path = Path(path)
    try:
        metadata = read_description(path)
        plans = [PruningPlan.from_dict(p) for p in json.loads(metadata.get("plans", "[]"))]
        parts = list(json.loads(metadata.get("plans_within", "{}")))
        aliases = dict(json.loads(metadata.get("aliases", "{}")))
    except (ChanpruneError, ValueError, TypeError) as error:
        return [Check("file", False, str(error))]
    checks = [Check("file", True, f"{path.stat().st_size:,} bytes, of {metadata.get('class')}")]
    shapes, bad = _read_tensors(path)
    shapes.update({alias: shapes[name] for alias, name in aliases.items() if name in shapes})
    if plans:
        last = plans[-1]
        detail = (
            f"{len(plans)} pruning{'s' if len(plans) > 1 else ''}: "
            f"params {plans[0].params_before:,} -> {last.params_after:,}, "
            f"MACs {plans[0].macs_before:,} -> {last.macs_after:,}"
        )
        wrong = None if parts else _first_gap(plans) or _first_misshapen(last, shapes)
        checks.append(Check("plan", wrong is None, wrong or detail))
    elif not parts:
        checks.append(Check("plan", None, "none: the model was not pruned"))
    if parts:
        # Which of their plans came before the model's own only the model itself tells.
        checks.append(Check("parts", None, f"pruned on their own: {', '.join(parts)}"))
    checks.append(
        Check(
            "weights",
            not bad,
            f"not finite: {', '.join(bad[:3])}" if bad else f"{len(shapes)} tensors, all finite",
        )
    )
    return checks


def check_model(plain: nn.Module, pruned: nn.Module, inputs: Any, *, original: bool) -> list[Check]:
    """Runs a rebuilt model, and holds it against the original.

    Args:
        plain: The model it was rebuilt from.
        pruned: What :func:`chanprune_ext.load` made of it.
        inputs: Example inputs with values.
        original: ``plain`` has the weights that were pruned.
    """
    checks = [Check("rebuilt", True, f"as a {type(pruned).__name__} of the plan's widths")]
    try:
        with steady_calls(pruned), without_cache(pruned):
            found = tensors_in(run_model(pruned, inputs))
    except Exception as error:  # noqa: BLE001 - a user's forward may raise anything
        return [*checks, Check("forward", False, f"{type(error).__name__}: {error}")]
    finite = all(bool(torch.isfinite(t).all()) for t in found if t.is_floating_point())
    told = ", ".join("x".join(map(str, t.shape)) for t in found[:3])
    checks.append(
        Check("forward", finite, f"returns {told}" + ("" if finite else ", not all finite"))
    )
    plans = plans_of(pruned)
    if original and plans and plans_within(pruned).keys() == {""}:
        checks.append(_against_original(plans, plain, pruned, inputs, found))
    return checks


def _against_original(
    plans: tuple[PruningPlan, ...], plain: nn.Module, pruned: nn.Module, inputs: Any, found: Any
) -> Check:
    """Exactness where the weights are the original's; how far the outputs moved where not."""
    cut = plain
    for plan in plans:
        cut = plan.apply(cut, verify=None)
    ours, theirs = tensors_of(pruned), tensors_of(cut)
    changed = [n for n in ours if n in theirs and not torch.equal(ours[n], theirs[n])]
    if not changed and len(plans) == 1:
        try:
            plans[0].apply(plain, verify="numeric", example_inputs=inputs)
        except ChanpruneError as error:
            return Check("exact", False, str(error))
        return Check(
            "exact", True, "equals the original with the removed channels zeroed, in float64"
        )
    with steady_calls(plain), without_cache(plain):
        expected = tensors_in(run_model(plain, inputs))
    moved = max(
        (
            float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
            for a, b in zip(found, expected, strict=True)
            if a.is_floating_point() and a.shape == b.shape
        ),
        default=0.0,
    )
    why = f"{len(changed)} of {len(ours)} tensors were changed after the cut"
    return Check("original", None, f"{why}; outputs differ by {moved:.1%} on random inputs")


def _read_tensors(path: Path) -> tuple[dict[str, list[int]], list[str]]:
    """Shapes by name, and the names of tensors with broken values; any of them may be a mask."""
    shapes: dict[str, list[int]] = {}
    bad: list[str] = []
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            tensor = file.get_tensor(name)
            shapes[name] = list(tensor.shape)
            if not is_sound(name, tensor, parameter=False):
                bad.append(name)
    return shapes, bad


def _shapes_after(plan: PruningPlan) -> dict[str, list[int]]:
    shapes = {name: list(shape) for name, shape in plan.fingerprint["tensors"].items()}
    for name, dims in plan.kept.items():
        shapes[name] = shape_after(shapes[name], dims)
    return shapes


def _first_gap(plans: list[PruningPlan]) -> str | None:
    """Where a later plan does not begin with what an earlier one leaves."""
    for number, (before, after) in enumerate(pairwise(plans), start=2):
        left, expected = _shapes_after(before), after.fingerprint["tensors"]
        for name, shape in expected.items():
            if list(shape) != left.get(name):
                return (
                    f"plan {number} begins with {name!r} of shape {list(shape)}, the plan before "
                    f"it leaves {left.get(name)}"
                )
    return None


def _first_misshapen(plan: PruningPlan, found: dict[str, list[int]]) -> str | None:
    """A tensor that is not what the plan leaves of it; buffers need not be in a file."""
    expected = _shapes_after(plan)
    for name, shape in found.items():
        if name in expected and expected[name] != shape:
            return f"{name!r} has shape {shape}, the plan leaves {expected[name]}"
    missing = [name for name in plan.kept if name not in found and name.endswith("weight")]
    return f"{missing[0]!r} is in the plan and not in the file" if missing else None

"""Proof on the user's own model: the pruned network equals the original with zeroed channels."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from chanprune_ext.analysis.calls import run_model, steady_calls, tensors_in
from chanprune_ext.analysis.trace import call_substituted, substitute, tensors_of
from chanprune_ext.errors import InvalidArgumentError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chanprune_ext.plan import PruningPlan

__all__ = ["input_shapes", "max_relative_error", "verify_pruned", "zeroed_copy"]

TOLERANCE = 1e-9


def input_shapes(value: Any) -> Any:
    """Shapes and dtypes of nested inputs, as plain JSON-able values."""
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, dict):
        return {"dict": {k: input_shapes(v) for k, v in value.items()}}
    if isinstance(value, (tuple, list)):
        return {"tuple": [input_shapes(v) for v in value]}
    return {"value": value if isinstance(value, (int, float, str, bool)) else None}


def _meta_inputs(spec: Any) -> Any:
    if "shape" in spec:
        return torch.empty(spec["shape"], dtype=getattr(torch, spec["dtype"]), device="meta")
    if "dict" in spec:
        return {k: _meta_inputs(v) for k, v in spec["dict"].items()}
    if "tuple" in spec:
        return tuple(_meta_inputs(v) for v in spec["tuple"])
    return spec["value"]


def zeroed_copy(model: nn.Module, pruned: Mapping[str, Mapping[int, Tensor]]) -> nn.Module:
    """A float64 copy of ``model`` with the removed slices of its parameters set to zero.

    Buffers keep their values: a variance of zero would add a division the network never made.
    """
    reference = copy.deepcopy(model).double()
    parameters = dict(reference.named_parameters())
    with torch.no_grad():
        for entry, dims in pruned.items():
            if entry in parameters:
                for dim, index in dims.items():
                    parameters[entry].index_fill_(dim, index.to(parameters[entry].device), 0)
    return reference


def max_relative_error(actual: Any, expected: Any) -> float:
    """Largest absolute difference over the largest absolute value, over all output tensors."""
    worst = 0.0
    for a, b in zip(tensors_in(actual), tensors_in(expected), strict=True):
        if a.shape != b.shape:
            return float("inf")
        if b.numel() and b.is_floating_point():
            scale = max(float(b.abs().max()), 1e-30)
            worst = max(worst, float((a - b).abs().max()) / scale)
    return worst


def verify_pruned(
    plan: PruningPlan,
    model: nn.Module,
    pruned: nn.Module,
    *,
    numeric: bool,
    inputs: Any = None,
) -> None:
    """Check a pruned model before anyone sees it.

    Raises:
        VerificationError: It does not run, or differs from the zeroed original.
        InvalidArgumentError: Numeric verification without inputs, or of a plan that removes
            channels a layer normalises over.
    """
    if plan.options.get("substrate") == "meta":
        with steady_calls(pruned), torch.device("meta"):
            tensors = {n: t.detach().to("meta") for n, t in tensors_of(pruned).items()}
            try:
                call_substituted(pruned, tensors, _meta_inputs(plan.inputs))
            except Exception as error:
                raise VerificationError(f"the pruned model does not run: {error}") from error
    if not numeric:
        return
    inputs = plan.example_inputs if inputs is None else inputs
    if inputs is None:
        raise InvalidArgumentError(
            "verify='numeric' needs example_inputs: a plan read from a file has only their shapes"
        )
    flagged = [g.name for g in plan.groups if g.normalised and g.width_after < g.width_before]
    if flagged:
        raise InvalidArgumentError(
            f"verify='numeric' compares with zeroed channels, but a layer normalises over the "
            f"channels of {', '.join(flagged[:3])}; keep those groups (ignore=...) or use "
            f"verify='replay'"
        )
    inputs = substitute(inputs, lambda t: t.double() if t.is_floating_point() else t)
    reference = zeroed_copy(model, plan.pruned)
    candidate = copy.deepcopy(pruned).double()
    with steady_calls(reference):
        expected = run_model(reference, inputs)
    with steady_calls(candidate):
        actual = run_model(candidate, inputs)
    error = max_relative_error(actual, expected)
    if not error <= TOLERANCE:
        raise VerificationError(
            f"the pruned model differs from the original with zeroed channels: relative error "
            f"{error:.2e} in float64, allowed {TOLERANCE:.0e}. Please report the model."
        )

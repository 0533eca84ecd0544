"""Proof on the user's own model: the pruned network equals the original with zeroed channels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from chanprune_ext.analysis.calls import steady_calls, tensors_in
from chanprune_ext.analysis.meta_calls import MetaCalls
from chanprune_ext.analysis.stand_ins import (
    call_substituted,
    held_tensors_of,
    substitute,
    tensors_of,
    tensors_with,
)
from chanprune_ext.copying import copied, copies_plainly, keeps_to_itself
from chanprune_ext.errors import InvalidArgumentError, VerificationError
from chanprune_ext.module_tree import modules_of
from chanprune_ext.plan_inputs import inputs_from
from chanprune_ext.seeds import drawing_from
from chanprune_ext.widths import WIDTH_NAMES, shape_after

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping

    from chanprune_ext.plan import PruningPlan

__all__ = [
    "input_shapes",
    "is_as_replayed",
    "max_relative_error",
    "verify_outputs",
    "verify_runs",
    "zero_slices",
    "zeroed_copy",
    "zeroed_outputs",
]

TOLERANCE = 1e-9


def input_shapes(value: Any) -> Any:
    """Shapes and dtypes of nested inputs, as plain JSON-able values."""
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, dict):
        return {"dict": {k: input_shapes(v) for k, v in value.items()}}
    if isinstance(value, (tuple, list)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [input_shapes(v) for v in value]}
    return {"value": value if isinstance(value, (int, float, str, bool)) else None}


def zeroed_copy(model: nn.Module, pruned: Mapping[str, Mapping[int, Tensor]]) -> nn.Module:
    """A float64 copy of ``model`` with the removed slices of its parameters set to zero."""
    reference = _double_copy(model)
    zero_slices(reference, pruned)
    return reference


def _double_copy(model: nn.Module) -> nn.Module:
    copy = copied(model)
    # What Module.double() does, which leaves complex tensors out.
    copy._apply(_in_double)  # type: ignore[no-untyped-call]  # noqa: SLF001
    return copy


def _in_double(tensor: Tensor) -> Tensor:
    """A tensor in float64 or complex128; what holds neither kind of number as it is."""
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def zero_slices(model: nn.Module, pruned: Mapping[str, Mapping[int, Tensor]]) -> None:
    """Set slices of ``model``'s parameters to zero, in place.

    Buffers keep their values: a variance of zero would add a division the network never made. For
    the same reason weight norm's directions keep theirs where its magnitudes are zeroed.

    Args:
        model: The model.
        pruned: Parameter name -> {dim: indices, int64}; names of buffers are passed over.
    """
    parameters = dict(model.named_parameters())
    directions = _weight_norm_directions(model)
    with torch.no_grad():
        for entry, dims in pruned.items():
            if entry in parameters:
                for dim, index in dims.items():
                    if (entry, dim) not in directions:
                        parameters[entry].index_fill_(dim, index.to(parameters[entry].device), 0)


def _weight_norm_directions(model: nn.Module) -> set[tuple[str, int]]:
    """Parameters that weight norm divides by their own norm at each index of the given dim."""
    found: set[tuple[str, int]] = set()
    for path, module in model.named_modules():
        if isinstance(module, ParametrizationList) and isinstance(module[0], _WeightNorm):
            found.add((f"{path}.original1", module[0].dim))
        for hook in module._forward_pre_hooks.values():  # noqa: SLF001 - torch has no public list
            if isinstance(hook, WeightNorm):
                found.add((f"{path}.{hook.name}_v".lstrip("."), hook.dim))
    return found


def max_relative_error(actual: Any, expected: Any) -> float:
    """Largest absolute difference over the largest absolute value, over all output tensors.

    Infinite where shapes differ or a value is not finite.
    """
    worst = 0.0
    for a, b in zip(tensors_in(actual), tensors_in(expected), strict=True):
        if a.shape != b.shape:
            return float("inf")
        if b.numel() and (b.is_floating_point() or b.is_complex()):
            error = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-30)
            worst = max(worst, error) if math.isfinite(error) else float("inf")
    return worst


def verify_runs(
    plan: PruningPlan, pruned: nn.Module, kept: Mapping[str, Mapping[int, Tensor]] | None = None
) -> None:
    """Run a pruned model on meta tensors, where the model can run on such.

    A model that was converted to another dtype since it was planned refuses inputs like those of
    the plan; it runs with inputs of the one dtype that its parameters share.

    Args:
        plan: The plan it was pruned by.
        pruned: The model; with ``kept`` it still has all its channels.
        kept: Entry -> {dim: kept indices}: widths to run it with.

    Raises:
        VerificationError: Its forward raises.
    """
    if plan.options.get("substrate") != "meta":
        return
    inputs = inputs_from(plan.inputs, "meta")
    try:
        _run_on_meta(pruned, inputs, kept or {})
    except VerificationError as error:
        planned, own = _floating_dtypes(tensors_in(inputs)), _floating_dtypes(pruned.parameters())
        if not planned or not own or planned == own:
            raise
        if len(own) > 1:
            raise VerificationError(
                f"{error}; its parameters are {_listed(own)}, the inputs it was planned with are "
                f"{_listed(planned)}: if it was converted in between, apply the plan first and "
                f"convert the result"
            ) from error
        (dtype,) = own
        converted = substitute(inputs, lambda t: t.to(dtype) if t.is_floating_point() else t)
        _run_on_meta(pruned, converted, kept or {})


def _run_on_meta(pruned: nn.Module, inputs: Any, kept: Mapping[str, Mapping[int, Tensor]]) -> None:
    meta = torch.device("meta")
    with steady_calls(pruned), MetaCalls(meta):
        tensors = {n: t.detach().to("meta") for n, t in held_tensors_of(pruned).items()}
        for name, dims in kept.items():
            shape = shape_after(tensors[name].shape, dims)
            tensors[name] = torch.empty(shape, dtype=tensors[name].dtype, device=meta)
        try:
            call_substituted(pruned, tensors, inputs)
        except Exception as error:
            raise VerificationError(f"the pruned model does not run: {error}") from error


def _floating_dtypes(tensors: Iterable[Tensor]) -> set[torch.dtype]:
    return {t.dtype for t in tensors if t.is_floating_point()}


def _listed(dtypes: Iterable[torch.dtype]) -> str:
    return " and ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))


def is_as_replayed(plan: PruningPlan, model: nn.Module, pruned: nn.Module) -> bool:
    """Whether running ``pruned`` would repeat what the replay of its plan has run.

    The replay ran the forward of ``model`` on stand-ins of the kept shapes, with the attributes of
    the plan and the widths of torch's layers set, and compared every call, number and shape with
    the trace. What a forward does follows from the code of the modules, their attributes and their
    tensors. If the result has the same modules, of classes that are copied by copying what they
    hold, with the same attributes, and tensors of just these shapes, and if neither they nor their
    code hold on to modules of the original (in a closure, say), nothing is left that a second run
    could do otherwise.

    Args:
        plan: A plan that was made for ``model``.
        model: The model before it was pruned.
        pruned: The result; may be ``model`` itself.
    """
    expected = dict(plan.fingerprint["tensors"])
    for entry, dims in plan.kept.items():
        expected[entry] = shape_after(expected[entry], dims)
    tensors = tensors_with(pruned, plan.kept)
    if {name: list(t.shape) for name, t in tensors.items()} != expected:
        return False
    if pruned is model:
        return True
    originals = tensors_with(model, plan.kept)
    if any(t.dtype != originals[name].dtype for name, t in tensors.items()):
        return False
    before, after = modules_of(model), modules_of(pruned)
    changed = {(attribute.module, attribute.name) for attribute in plan.attributes}
    return len(before) == len(after) and all(
        path == new_path and _same_module(path, old, new, changed)
        for (path, old), (new_path, new) in zip(before, after, strict=True)
    )


_SIMPLE = frozenset({bool, int, float, str, type(None)})


def _same_module(
    path: str, old: nn.Module, new: nn.Module, changed: Container[tuple[str, str]]
) -> bool:
    """Whether a module is a plain copy, apart from widths and attributes that a plan changes."""
    if type(old) is not type(new) or not copies_plainly(old) or not keeps_to_itself(old):
        return False
    if len(new.__dict__) < len(old.__dict__):
        return False
    values = new.__dict__
    for name, value in old.__dict__.items():
        if type(value) not in _SIMPLE or (name in values and values[name] == value):
            continue
        if name not in WIDTH_NAMES and (path, name) not in changed:
            return False
    return True


def zeroed_outputs(plan: PruningPlan, model: nn.Module, inputs: Any = None) -> Any:
    """What ``model`` returns in float64 with the channels of ``plan`` zeroed.

    Raises:
        InvalidArgumentError: There are no inputs, or there is nothing to compare with: the plan
            removes channels that a layer normalises over, or zeros make NaN.
    """
    flagged = [g.name for g in plan.groups if g.normalised and g.width_after < g.width_before]
    if flagged:
        raise InvalidArgumentError(
            f"verify='numeric' compares with zeroed channels, but a layer normalises over the "
            f"channels of {', '.join(flagged[:3])}; keep those groups (ignore=...) or use "
            f"verify='replay'"
        )
    output = _run_in_float64(plan, zeroed_copy(model, plan.pruned), _inputs_of(plan, inputs))
    if any(t.isnan().any() for t in tensors_in(output)):
        raise InvalidArgumentError(
            "verify='numeric' compares with zeroed channels, but with these zeroed the model "
            "returns NaN, as where weights are divided by their norm; use verify='replay'"
        )
    return output


def verify_outputs(plan: PruningPlan, pruned: nn.Module, expected: Any, inputs: Any = None) -> None:
    """Compare a pruned model with what :func:`zeroed_outputs` gave.

    Raises:
        VerificationError: They differ by more than round-off.
    """
    actual = _run_in_float64(plan, _double_copy(pruned), _inputs_of(plan, inputs))
    error = max_relative_error(actual, expected)
    allowed = _allowed_error(plan, pruned)
    if error > allowed:
        raise VerificationError(
            f"the pruned model differs from the original with zeroed channels: relative error "
            f"{error:.2e} in float64, allowed {allowed:.0e}. Please report the model."
        )


def _allowed_error(plan: PruningPlan, pruned: nn.Module) -> float:
    """Round-off of float64, or of the dtype of the weights where a plan has multiplied some."""
    tensors = tensors_of(pruned)
    rounded = [torch.finfo(tensors[r.entry].dtype).eps for r in plan.rescalings]
    return max([TOLERANCE, *(64 * eps for eps in rounded)])


def _inputs_of(plan: PruningPlan, inputs: Any) -> Any:
    inputs = plan.example_inputs if inputs is None else inputs
    if inputs is None:
        raise InvalidArgumentError(
            "verify='numeric' needs example_inputs: a plan read from a file has only their shapes"
        )
    if any(t.is_meta for t in tensors_in(inputs)):
        raise InvalidArgumentError(
            "verify='numeric' needs example_inputs with values, got tensors on the meta device"
        )
    return substitute(inputs, lambda t: _in_double(t).clone())


def _run_in_float64(plan: PruningPlan, model: nn.Module, inputs: Any) -> Any:
    gpus = {t.device.index for t in tensors_of(model).values() if t.is_cuda}
    # What a forward draws at random is the same for both models.
    with steady_calls(model), drawing_from(0, gpus=gpus):
        try:
            output = call_substituted(model, {}, inputs)
        except Exception as error:
            raise VerificationError(
                f"the model does not run in float64, as verify='numeric' has it: {error}; use "
                f"verify='replay' for a forward that needs another dtype"
            ) from error
    return output if plan.outputs is None else plan.outputs(output)

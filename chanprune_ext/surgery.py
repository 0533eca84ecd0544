"""Apply a plan: slice every tensor once, change the attributes, all or nothing.

What surgery leaves alone: dtype, device, memory format, requires_grad, attributes of parameters,
hooks, training flags, tied weights. Gradients and optimizer state are sliced like their parameters.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from chanprune_ext.analysis.replay import set_attributes
from chanprune_ext.analysis.settings import own_settings
from chanprune_ext.analysis.stand_ins import tensors_with
from chanprune_ext.copying import carry_over, copied
from chanprune_ext.devices import by_device
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.ops import slice_channels
from chanprune_ext.plan import attach_plans, plans_of
from chanprune_ext.verification import (
    is_as_replayed,
    verify_outputs,
    verify_runs,
    zeroed_outputs,
)
from chanprune_ext.widths import restore_widths, set_widths

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.optim import Optimizer

    from chanprune_ext.analysis.scales import Rescaling
    from chanprune_ext.plan import PruningPlan

__all__ = ["apply_plan"]

Kept = "Mapping[int, Tensor]"


def apply_plan(
    plan: PruningPlan,
    model: nn.Module,
    *,
    inplace: bool = False,
    optimizer: Optimizer | None = None,
    verify: str | None = "replay",
    example_inputs: Any = None,
    replayed: bool = False,
) -> nn.Module:
    """Prune a model by a plan.

    Args:
        plan: The plan; it must have been made for a model of this structure.
        model: The model. It is left untouched unless ``inplace``.
        inplace: Change ``model`` itself, parameter objects included, for models too big to copy:
            without an optimizer and ``verify="numeric"`` it takes no more memory than the largest
            tensor.
        optimizer: An optimizer over ``model``'s parameters. Its parameters are replaced by those of
            the pruned model and its state (momentum, moments) is sliced with them.
        verify: ``"replay"`` runs the result on meta tensors, ``"numeric"`` also compares it in
            float64 with the original whose removed channels are zeroed, None does neither.
        example_inputs: Inputs for ``"numeric"`` where the plan was loaded from a file.
        replayed: The plan has just been made for this very object. It need not be checked against
            it, and where the result is, tensor by tensor and attribute by attribute, what the
            plan's own replay ran, it is not run a second time
            (:func:`chanprune_ext.verification.is_as_replayed`).

    Returns:
        The pruned model; ``model`` itself if ``inplace``.

    Raises:
        PlanMismatchError: The plan belongs to another model.
        VerificationError: The result does not behave as predicted; nothing was changed.
        InvalidArgumentError: ``model`` or ``optimizer`` is none, or the optimizer holds state that
            cannot be sliced.
    """
    if verify not in ("replay", "numeric", None):
        raise InvalidArgumentError(f"verify must be 'replay', 'numeric' or None, got {verify!r}")
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise InvalidArgumentError(
            f"optimizer must be the torch.optim.Optimizer that trains the model, got {optimizer!r}"
        )
    if not replayed:
        plan.check(model)
    if inplace and optimizer is None and verify != "numeric":
        # What runs there before the first cut are the very stand-ins of the replay.
        return _apply_streaming(plan, model, None if replayed else verify)
    tensors = tensors_with(model, plan.kept)
    changing = _changing(plan, tensors)
    sliced = _sliced_tensors(plan, tensors, changing)
    gradients = _sliced_gradients(plan, tensors, changing)
    state = _sliced_state(plan, tensors, optimizer)
    expected = zeroed_outputs(plan, model, example_inputs) if verify == "numeric" else None
    with contextlib.ExitStack() as undo:
        if inplace:
            pruned = model
            _swap(tensors, sliced, gradients, undo)
        else:
            pruned = copied(model, _replacements(tensors, sliced, gradients))
        _set_attributes(plan, pruned, undo)
        undo.callback(restore_widths, set_widths(pruned))
        _remember(plan, pruned, undo)
        if verify is not None and not (replayed and is_as_replayed(plan, model, pruned)):
            verify_runs(plan, pruned)
        if expected is not None:
            verify_outputs(plan, pruned, expected, example_inputs)
        if optimizer is not None:
            _rebind(optimizer, state, tensors, tensors_with(pruned, plan.kept), undo)
        undo.pop_all()
    return pruned


def _apply_streaming(plan: PruningPlan, model: nn.Module, verify: str | None) -> nn.Module:
    """Prune in place with no more memory than the largest tensor takes.

    Everything that can fail comes first: the pruned model runs on stand-ins, and the largest
    successor is made and dropped. From then on each tensor is freed as its successor is put in.
    """
    tensors = tensors_with(model, plan.kept)
    changing = _changing(plan, tensors)
    with contextlib.ExitStack() as undo:
        _set_attributes(plan, model, undo)
        if verify is not None:
            verify_runs(plan, model, plan.kept)
        if changing:
            _sliced_tensors(plan, tensors, [max(changing, key=lambda n: tensors[n].nbytes)])
        undo.pop_all()
    for name in changing:
        gradients = _sliced_gradients(plan, tensors, [name])
        _put_data(tensors[name], _sliced_tensors(plan, tensors, [name])[name], gradients.get(name))
    with contextlib.ExitStack() as undo:
        undo.callback(restore_widths, set_widths(model))
        _remember(plan, model, undo)
        undo.pop_all()
    return model


def _changing(plan: PruningPlan, tensors: Mapping[str, Tensor]) -> list[str]:
    names = dict.fromkeys((*plan.kept, *(r.entry for r in plan.rescalings)))
    return [name for name in names if name in tensors]


def _sliced_tensors(
    plan: PruningPlan, tensors: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, Tensor]:
    """The successors of some entries."""
    results = sliced_like([tensors[n] for n in names], [plan.kept.get(n, {}) for n in names])
    sliced = dict(zip(names, results, strict=True))
    for rescaling in plan.rescalings:
        if rescaling.entry in sliced:
            whole = tensors[rescaling.entry].shape[rescaling.dim]
            sliced[rescaling.entry] = _rescaled(plan, rescaling, whole, sliced[rescaling.entry])
    return sliced


def _rescaled(plan: PruningPlan, rescaling: Rescaling, whole: int, tensor: Tensor) -> Tensor:
    """A successor with some indices of a dim, of size ``whole`` before, multiplied."""
    factors = torch.ones(whole, dtype=torch.float64, device="cpu")
    factors[rescaling.indices] = rescaling.factor
    kept = plan.kept.get(rescaling.entry, {}).get(rescaling.dim)
    if kept is not None:
        factors = factors[kept]
    shape = [1] * tensor.dim()
    shape[rescaling.dim] = -1
    # In float64, and rounded once.
    return (tensor.double() * factors.to(tensor.device).view(shape)).to(tensor.dtype)


def _sliced_gradients(
    plan: PruningPlan, tensors: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, Tensor]:
    found = {
        name: gradient
        for name in names
        if name in tensors
        and tensors[name].is_leaf
        and (gradient := tensors[name].grad) is not None
    }
    results = sliced_like(list(found.values()), [plan.kept.get(n, {}) for n in found])
    return dict(zip(found, results, strict=True))


def sliced_like(tensors: Sequence[Tensor], kept: Sequence[Mapping[int, Tensor]]) -> list[Tensor]:
    """Every tensor restricted to its kept indices, in one call of the native op for each device."""
    results = [tensor.detach() for tensor in tensors]
    with torch.no_grad():
        for here in by_device(tensors):
            rows, cols = ([kept[i].get(dim) for i in here] for dim in (0, 1))
            made = slice_channels([results[i] for i in here], rows, cols)
            for i, result in zip(here, made, strict=True):
                results[i] = result.detach()
        for i, (result, dims) in enumerate(zip(results, kept, strict=True)):
            for dim, index in dims.items():
                if dim > 1:
                    result = result.index_select(dim, index.to(result.device))
            results[i] = result
    return results


def _replacements(
    tensors: Mapping[str, Tensor], sliced: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> dict[int, Tensor]:
    """``id`` of every tensor that changes -> its smaller successor, a parameter like it or not."""
    found: dict[int, Tensor] = {}
    for name, new in sliced.items():
        old = tensors[name]
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            new.__class__ = type(old)
            new.grad = gradients.get(name)
        carry_over(old, new, {})
        found[id(old)] = new
    return found


def _swap(
    tensors: Mapping[str, Tensor],
    sliced: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    undo: contextlib.ExitStack,
) -> None:
    """Give the model's own tensors their new data: parameters stay the objects they are."""
    for name, new in sliced.items():
        tensor = tensors[name]
        undo.callback(_put_data, tensor, tensor.data, tensor.grad if tensor.is_leaf else None)
        _put_data(tensor, new, gradients.get(name))


def _put_data(tensor: Tensor, data: Tensor, gradient: Tensor | None) -> None:
    if tensor.is_leaf:
        tensor.grad = None  # a gradient of another shape would be refused
    tensor.data = data
    if gradient is not None:
        tensor.grad = gradient


def _set_attributes(plan: PruningPlan, model: nn.Module, undo: contextlib.ExitStack) -> None:
    """The ints that the plan changes, and caches of tensors of the old widths."""
    for path, name in plan.caches:
        owner = model.get_submodule(path)
        cache = getattr(owner, name, None)
        if isinstance(cache, (dict, list, set)):
            undo.callback(setattr, owner, name, cache)
            setattr(owner, name, type(cache)())
    own_settings(model, plan.attributes, undo)
    for attribute, value in plan.attributes.items():
        for held, name, old in set_attributes(model, {attribute: value}):
            undo.callback(held.__setitem__, name, old)


def _remember(plan: PruningPlan, model: nn.Module, undo: contextlib.ExitStack) -> None:
    plans = plans_of(model)
    undo.callback(attach_plans, model, plans)
    attach_plans(model, (*plans, plan))


def _sliced_state(
    plan: PruningPlan, tensors: Mapping[str, Tensor], optimizer: Optimizer | None
) -> dict[str, dict[str, Any]]:
    """Optimizer state of every changed parameter, sliced like the parameter."""
    state: dict[str, dict[str, Any]] = {}
    if optimizer is None:
        return state
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not owned & {id(t) for t in tensors.values()}:
        raise InvalidArgumentError(
            "optimizer holds no parameter of this model; pass the optimizer that trains it"
        )
    for name, kept in plan.kept.items():
        tensor = tensors.get(name)
        values = optimizer.state.get(tensor) if tensor is not None else None
        if tensor is None or not values:
            continue
        state[name] = {
            key: _sliced_value(name, key, value, tensor, kept) for key, value in values.items()
        }
    return state


def _sliced_value(
    name: str, key: str, value: Any, tensor: Tensor, kept: Mapping[int, Tensor]
) -> Any:
    if not isinstance(value, Tensor) or value.numel() == 1:
        return value
    shape = tuple(tensor.shape)
    if value.dim() == len(shape) and all(
        v in (1, n) for v, n in zip(value.shape, shape, strict=True)
    ):
        own = {d: i for d, i in kept.items() if value.shape[d] == shape[d]}
        return sliced_like([value], [own])[0] if own else value
    # Factored moments are as above with a dim of size 1, or drop one of the last two dims.
    for missing in (len(shape) - 1, len(shape) - 2):
        if missing >= 0 and value.shape == shape[:missing] + shape[missing + 1 :]:
            moved = {d - (d > missing): i for d, i in kept.items() if d != missing}
            return sliced_like([value], [moved])[0] if moved else value
    raise InvalidArgumentError(
        f"optimizer state '{key}' of '{name}' has shape {tuple(value.shape)}, which does not "
        f"follow from the parameter's {shape}; make a new optimizer for the pruned model instead"
    )


def _rebind(
    optimizer: Optimizer,
    state: Mapping[str, dict[str, Any]],
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    undo: contextlib.ExitStack,
) -> None:
    """Let the optimizer hold the new parameters, with the state that belongs to them."""
    replacement = {id(old[name]): new[name] for name in old if name in new}
    for group in optimizer.param_groups:
        undo.callback(group.update, params=group["params"])
        group["params"] = [replacement.get(id(p), p) for p in group["params"]]
    before = dict(optimizer.state)
    undo.callback(optimizer.state.update, before)
    undo.callback(optimizer.state.clear)
    for name, tensor in old.items():
        values = optimizer.state.pop(tensor, None)
        if values is not None:
            optimizer.state[new[name]] = state.get(name, values)

"""Apply a plan: slice every tensor once, change the attributes, all or nothing.

What surgery leaves alone: dtype, device, memory format, requires_grad, attributes of parameters,
hooks, training flags, tied weights. Gradients and optimizer state are sliced like their parameters.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from chanprune_ext.analysis.calls import steady_calls
from chanprune_ext.analysis.replay import set_attributes
from chanprune_ext.analysis.stand_ins import tensors_of
from chanprune_ext.copying import carry_over, copied
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.ops import slice_channels
from chanprune_ext.plan import attach_plan, plan_of
from chanprune_ext.verification import verify_outputs, verify_runs, zeroed_outputs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.optim import Optimizer

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
) -> nn.Module:
    """Prune a model by a plan.

    Args:
        plan: The plan; it must have been made for a model of this structure.
        model: The model. It is left untouched unless ``inplace``.
        inplace: Change ``model`` itself, parameter objects included, for models too big to copy.
        optimizer: An optimizer over ``model``'s parameters. Its parameters are replaced by those of
            the pruned model and its state (momentum, moments) is sliced with them.
        verify: ``"replay"`` runs the result on meta tensors, ``"numeric"`` also compares it in
            float64 with the original whose removed channels are zeroed, None does neither.
        example_inputs: Inputs for ``"numeric"`` where the plan was loaded from a file.

    Returns:
        The pruned model; ``model`` itself if ``inplace``.

    Raises:
        PlanMismatchError: The plan belongs to another model.
        VerificationError: The result does not behave as predicted; nothing was changed.
        InvalidArgumentError: The optimizer holds state that cannot be sliced.
    """
    if verify not in ("replay", "numeric", None):
        raise InvalidArgumentError(f"verify must be 'replay', 'numeric' or None, got {verify!r}")
    plan.check(model)
    tensors = tensors_of(model)
    sliced = _sliced_tensors(plan, tensors)
    _rescale(plan, tensors, sliced)
    gradients = _sliced_gradients(plan, tensors)
    state = _sliced_state(plan, tensors, optimizer)
    expected = zeroed_outputs(plan, model, example_inputs) if verify == "numeric" else None
    with contextlib.ExitStack() as undo:
        if inplace:
            pruned = model
            _swap(tensors, sliced, gradients, undo)
        else:
            pruned = copied(model, _replacements(tensors, sliced, gradients))
        with steady_calls(pruned):  # in training mode, spectral norm would move on when looked at
            _set_attributes(plan, pruned, undo)
        if verify is not None:
            verify_runs(plan, pruned)
        if expected is not None:
            verify_outputs(plan, pruned, expected, example_inputs)
        if optimizer is not None:
            _rebind(optimizer, state, tensors, tensors_of(pruned), undo)
        undo.pop_all()
    return pruned


def _sliced_tensors(plan: PruningPlan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = [name for name in plan.kept if name in tensors]
    results = sliced_like([tensors[n] for n in names], [plan.kept[n] for n in names])
    return dict(zip(names, results, strict=True))


def _rescale(plan: PruningPlan, tensors: Mapping[str, Tensor], sliced: dict[str, Tensor]) -> None:
    """Multiply what the plan rescales, in copies of the model's tensors."""
    for rescaling in plan.rescalings:
        whole = tensors[rescaling.entry]
        if rescaling.entry not in sliced:
            sliced[rescaling.entry] = whole.detach().clone()
        factors = torch.ones(whole.shape[rescaling.dim], dtype=torch.float64)
        factors[rescaling.indices] = rescaling.factor
        kept = plan.kept.get(rescaling.entry, {}).get(rescaling.dim)
        if kept is not None:
            factors = factors[kept]
        tensor = sliced[rescaling.entry]
        shape = [1] * tensor.dim()
        shape[rescaling.dim] = -1
        # In float64, and rounded once.
        product = tensor.double() * factors.to(tensor.device).view(shape)
        sliced[rescaling.entry] = product.to(tensor.dtype)


def _sliced_gradients(plan: PruningPlan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {
        name: gradient
        for name in plan.kept
        if name in tensors
        and tensors[name].is_leaf
        and (gradient := tensors[name].grad) is not None
    }
    results = sliced_like(list(found.values()), [plan.kept[n] for n in found])
    return dict(zip(found, results, strict=True))


def sliced_like(tensors: Sequence[Tensor], kept: Sequence[Mapping[int, Tensor]]) -> list[Tensor]:
    """Every tensor restricted to its kept indices, in one call of the native op."""
    rows = [k.get(0) for k in kept]
    cols = [k.get(1) for k in kept]
    with torch.no_grad():
        results = [t.detach() for t in slice_channels([t.detach() for t in tensors], rows, cols)]
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
    """The plan's attribute values, the widths torch's own layers tell, and the plan itself."""
    for attribute, value in plan.attributes.items():
        for module, name, old in set_attributes(model, {attribute: value}):
            undo.callback(setattr, module, name, old)
    for module in model.modules():
        for name, width in _widths(module).items():
            old = getattr(module, name, None)
            if old != width:
                undo.callback(setattr, module, name, old)
                setattr(module, name, width)
    undo.callback(attach_plan, model, plan_of(model))
    attach_plan(model, plan)


def _widths(module: nn.Module) -> dict[str, Any]:
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvNd):
        first, second = weight.shape[:2] if weight is not None else (0, 0)
        if module.transposed:
            return {"in_channels": first, "out_channels": second * module.groups}
        return {"out_channels": first, "in_channels": second * module.groups}
    if isinstance(module, nn.Linear) and weight is not None:
        return {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        vector = weight if weight is not None else module.running_mean
        return {} if vector is None else {"num_features": vector.shape[0]}
    if isinstance(module, nn.GroupNorm) and weight is not None:
        return {"num_channels": weight.shape[0]}
    if isinstance(module, nn.LayerNorm) and weight is not None:
        return {"normalized_shape": tuple(weight.shape)}
    if isinstance(module, nn.PReLU) and weight is not None:
        return {"num_parameters": weight.shape[0]}
    if isinstance(module, nn.Embedding) and weight is not None:
        return {"embedding_dim": weight.shape[1]}
    return {}


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

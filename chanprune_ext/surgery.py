"""Apply a plan: slice every tensor once, change the attributes, all or nothing.

What surgery leaves alone: dtype, device, memory format, requires_grad, attributes of parameters,
hooks, training flags, tied weights. Gradients and optimizer state are sliced like their parameters.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from chanprune_ext.analysis.replay import set_attributes
from chanprune_ext.analysis.trace import tensors_of
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.ops import slice_channels
from chanprune_ext.plan import attach_plan
from chanprune_ext.verification import verify_pruned

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
    names = [name for name in plan.kept if name in tensors]
    sliced = dict(
        zip(
            names,
            sliced_like([tensors[n] for n in names], [plan.kept[n] for n in names]),
            strict=True,
        )
    )
    gradients = {
        n: tensors[n].grad for n in names if tensors[n].is_leaf and tensors[n].grad is not None
    }
    new_gradients = dict(
        zip(
            gradients,
            sliced_like(
                [g for g in gradients.values() if g is not None], [plan.kept[n] for n in gradients]
            ),
            strict=True,
        )
    )
    state = _sliced_state(plan, tensors, optimizer)

    pruned = _copy(model, tensors, sliced, new_gradients, share=inplace)
    set_attributes(pruned, plan.attributes)
    refresh_widths(pruned)
    attach_plan(pruned, plan)
    if verify is not None:
        verify_pruned(plan, model, pruned, numeric=verify == "numeric", inputs=example_inputs)
    if not inplace:
        if optimizer is not None:
            _rebind(optimizer, state, tensors, tensors_of(pruned))
        return pruned
    _commit(plan, model, tensors, sliced, new_gradients)
    if optimizer is not None:
        _rebind(optimizer, state, tensors, tensors)
    return model


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


def _copy(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    sliced: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    *,
    share: bool,
) -> nn.Module:
    """A copy in which sliced tensors take the place of the whole ones.

    With ``share`` the unchanged tensors are the model's own: the copy then only serves to verify,
    and a model too big to copy is never copied.
    """
    memo: dict[int, Any] = {id(t): t for t in tensors.values()} if share else {}
    for name, new in sliced.items():
        old = tensors[name]
        if isinstance(old, nn.Parameter):
            replacement = copy.copy(old) if type(old) is not nn.Parameter else None
            parameter = nn.Parameter(new, requires_grad=old.requires_grad)
            if replacement is not None:
                parameter.__class__ = type(old)
            parameter.__dict__.update(copy.deepcopy(old.__dict__, memo))
            parameter.grad = gradients.get(name)
            memo[id(old)] = parameter
        else:
            memo[id(old)] = new
    return copy.deepcopy(model, memo)


def _commit(
    plan: PruningPlan,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    sliced: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
) -> None:
    """Swap the data of the model's own tensors; on any error put everything back."""
    undo: list[tuple[Tensor, Tensor, Tensor | None]] = []
    attributes: list[tuple[Any, str, Any]] = []
    try:
        for name, new in sliced.items():
            tensor = tensors[name]
            undo.append((tensor, tensor.data, tensor.grad if tensor.is_leaf else None))
            if tensor.is_leaf:
                tensor.grad = None
            tensor.data = new
            if name in gradients:
                tensor.grad = gradients[name]
        attributes = set_attributes(model, plan.attributes)
        attributes += refresh_widths(model)
        attach_plan(model, plan)
    except BaseException:
        for module, attribute, value in reversed(attributes):
            setattr(module, attribute, value)
        for tensor, data, gradient in reversed(undo):
            if tensor.is_leaf:
                tensor.grad = None
            tensor.data = data
            if gradient is not None:
                tensor.grad = gradient
        raise


def refresh_widths(model: nn.Module) -> list[tuple[Any, str, Any]]:
    """Make the descriptive attributes of torch's own layers agree with their tensors."""
    done: list[tuple[Any, str, Any]] = []
    for module in model.modules():
        for name, value in _widths(module).items():
            old = getattr(module, name, None)
            if old != value:
                done.append((module, name, old))
                setattr(module, name, value)
    return done


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
    if value.shape == shape:
        return sliced_like([value], [kept])[0]
    # Factored moments drop one of the last two dims.
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
) -> None:
    replacement = {id(old[name]): new[name] for name in old if name in new}
    for group in optimizer.param_groups:
        group["params"] = [replacement.get(id(p), p) for p in group["params"]]
    for name, tensor in old.items():
        values = optimizer.state.pop(tensor, None)
        if values is not None:
            optimizer.state[new[name]] = state.get(name, values)

"""A pruned transformers model as a plain folder that ``from_pretrained`` reads.

A configuration states widths as a few numbers for all layers. Where a plan has left all layers
alike, there is a configuration that builds the narrow model, and this module finds it: not by
knowing architectures, but by trying numbers until every tensor has the right shape. Where there is
none (layers of different widths, scales that belong to the old width), :func:`chanprune_ext.save`
keeps the model together with its plan instead.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from chanprune_ext.analysis.calls import run_model, steady_calls, tensors_in
from chanprune_ext.errors import ExportError, InvalidArgumentError, OutputError
from chanprune_ext.module_modes import without_cache
from chanprune_ext.module_tree import plain_module
from chanprune_ext.plan import plans_within

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from torch import nn

    from chanprune_ext.plan import PruningPlan

__all__ = ["narrow_config", "save_pretrained"]

_TOLERANCE = 1e-5


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str], example_inputs: Any) -> None:
    """Writes a pruned transformers model so that ``from_pretrained(folder)`` reads it.

    The folder is written only after a model built from the narrow configuration alone has computed
    what ``model`` computes.

    Args:
        model: A pruned ``transformers.PreTrainedModel``, also one inside DataParallel or
            torch.compile.
        folder: Where ``config.json`` and ``model.safetensors`` go.
        example_inputs: Inputs with values, to compare the two on.

    Raises:
        InvalidArgumentError: It is no transformers model, or was not pruned.
        ExportError: No configuration builds it; the message says what is left.
        OutputError: The folder can't be written.
    """
    wide: Any = plain_module(model)
    differences = []
    for config in _narrow_configs(wide):
        rebuilt = type(wide)(config).to(wide.device, wide.dtype)
        rebuilt.load_state_dict(wide.state_dict())
        differences.append(_difference(wide, rebuilt, example_inputs))
        if differences[-1] <= _TOLERANCE:
            break
    else:
        raise ExportError(
            f"a model built from a narrow configuration computes something else (relative "
            f"difference {min(differences):.1e}): a scale in it follows a width that was pruned; "
            f"keep head_dim (kinds=('heads', 'mlp', 'residual')), or use chanprune_ext.save"
        )
    try:
        rebuilt.save_pretrained(folder)
    except OSError as error:
        raise OutputError(
            f"{folder}: can't be written ({error}); check that it is a folder or can be made one, "
            "may be written to and has room"
        ) from error


def narrow_config(model: nn.Module) -> Any:
    """The configuration that builds a pruned transformers model, every tensor of its shape.

    Raises:
        InvalidArgumentError: It is no transformers model, or was not pruned.
        ExportError: There is none.
    """
    return next(_narrow_configs(plain_module(model)))


def _narrow_configs(model: nn.Module) -> Iterator[Any]:
    """All that are found: several numbers may give the same shapes, heads and their width say."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        raise InvalidArgumentError(
            f"model must be a transformers model with a config, got {type(model).__name__}"
        )
    plans = tuple(plan for found in plans_within(model).values() for plan in found)
    if not plans:
        raise InvalidArgumentError("model was not pruned: use its own save_pretrained")
    first = _solved(model, config, plans, frozenset())
    yield first
    before, after = config.to_dict(), first.to_dict()
    for name in [name for name, value in after.items() if before.get(name) != value]:
        try:
            yield _solved(model, config, plans, frozenset({name}))
        except ExportError:
            continue


def _solved(
    model: nn.Module, config: Any, plans: tuple[PruningPlan, ...], fixed: frozenset[str]
) -> Any:
    """A configuration of the right shapes that leaves some numbers as they are."""
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    best = copy.deepcopy(config)
    missing = _mismatches(model, best, wanted)
    if missing is None:
        raise ExportError(f"{type(config).__name__} does not build a {type(model).__name__}")
    # Each round takes the one number that sets most tensors right; a few numbers make a model.
    while missing:
        found, trial = missing, best
        for candidate in _trials(best, plans, fixed):
            wrong = _mismatches(model, candidate, wanted)
            if wrong is not None and len(wrong) < len(found):
                found, trial = wrong, candidate
        if found is missing:
            raise ExportError(
                f"no configuration of {type(config).__name__} builds this model: {len(missing)} "
                f"tensors such as {missing[0]!r}, {list(wanted[missing[0]])}, differ, as its "
                f"layers have different widths or it has no number for them; use "
                f"chanprune_ext.save, whose file rebuilds it from the plain model"
            )
        missing, best = found, trial
    return best


def _trials(config: Any, plans: tuple[PruningPlan, ...], fixed: frozenset[str]) -> Iterator[Any]:
    """The configuration with one number scaled as some dimension was by the plans."""
    ratios = {
        (len(kept), plan.fingerprint["tensors"][entry][dim])
        for plan in plans
        for entry, dims in plan.kept.items()
        for dim, kept in dims.items()
    }
    for name, value in config.to_dict().items():
        if type(value) is not int or value < 2 or name in fixed:
            continue
        for new in sorted({value * a // b for a, b in ratios if value * a % b == 0} - {0, value}):
            trial = copy.deepcopy(config)
            try:
                setattr(trial, name, new)
            except (AttributeError, TypeError, ValueError):
                continue
            yield trial


def _mismatches(
    model: nn.Module, config: Any, wanted: dict[str, tuple[int, ...]]
) -> list[str] | None:
    """Tensors that a model of this configuration has in another shape; None if it has others."""
    build: Any = type(model)
    try:
        with torch.device("meta"):
            found = {name: tuple(t.shape) for name, t in build(config).state_dict().items()}
    except Exception:  # noqa: BLE001 - configurations that fit nothing raise anything
        return None
    if found.keys() != wanted.keys():
        return None
    return [name for name, shape in wanted.items() if found[name] != shape]


def _difference(one: nn.Module, two: nn.Module, inputs: Any) -> float:
    outputs = []
    for model in (one, two):
        with steady_calls(model), without_cache(model):
            outputs.append(tensors_in(run_model(model, inputs)))
    worst = 0.0
    for a, b in zip(*outputs, strict=True):
        scale = a.abs().max().clamp(min=1e-30)
        worst = max(worst, float((a - b).abs().max() / scale))
    return worst

"""Arguments of a compensation, checked before anything is touched."""

from __future__ import annotations

from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import InvalidArgumentError, PlanMismatchError
from ..plan import plan_of, plans_within
from ..soundness import is_sound
from ..widths import shape_after

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..analysis.call_trace import CallTrace
    from ..analysis.scales import Rescaling
    from .survey import Survey

__all__ = [
    "METHODS",
    "HasKept",
    "check_memory_limit",
    "check_networks",
    "check_options",
    "check_same_calls",
    "inputs_of",
    "kept_of",
    "rescalings_of",
]

METHODS = ("least_squares", "batch_norm")


class HasKept(Protocol):
    """A plan, or what is needed of one; its ``rescalings`` count too, if it has any."""

    @property
    def kept(self) -> Mapping[str, Mapping[int, Tensor]]:
        """State-dict entry -> axis -> kept indices."""


def check_options(
    method: str,
    ridge: float,
    one_sided_steps: int,
    joint_rounds: int,
    held_back: float,
    memory_limit: int | None,
) -> None:
    """Refuses options out of range.

    Raises:
        InvalidArgumentError: names the option.
    """
    if method not in METHODS:
        raise InvalidArgumentError(f"method: expected one of {METHODS}, got {method!r}")
    if not 0 <= ridge < float("inf"):
        raise InvalidArgumentError(f"ridge: expected a finite number >= 0, got {ridge}")
    for name, value in (("one_sided_steps", one_sided_steps), ("joint_rounds", joint_rounds)):
        if not isinstance(value, int) or value < 0:
            raise InvalidArgumentError(f"{name}: expected an integer >= 0, got {value!r}")
    if not 0 <= held_back < 1:
        raise InvalidArgumentError(f"held_back: expected a share in [0, 1), got {held_back}")
    check_memory_limit(memory_limit)


def check_memory_limit(limit: Any) -> None:
    """Refuses what is no number of bytes; ``3e6`` is one.

    Raises:
        InvalidArgumentError: it is none.
    """
    if limit is not None and not (isinstance(limit, Real) and 0 < float(limit) < float("inf")):
        raise InvalidArgumentError(
            f"memory_limit: expected bytes > 0, or None for half of what is free, got {limit!r}"
        )


def _plans_of(pruned: nn.Module, plan: HasKept | None) -> list[tuple[str, HasKept]]:
    """``plan``, or what ``pruned`` or its parts carry, with what comes before their entries."""
    if plan is None:
        plan = plan_of(pruned)
    if plan is not None:
        return [("", plan)]
    return [(f"{path}.", plans[-1]) for path, plans in plans_within(pruned).items()]


def kept_of(pruned: nn.Module, plan: HasKept | None) -> Mapping[str, Mapping[int, Tensor]]:
    """The kept indices of ``plan``, or of the plan that ``pruned`` or its parts carry.

    Raises:
        InvalidArgumentError: there is no plan.
    """
    found = _plans_of(pruned, plan)
    if not found:
        raise InvalidArgumentError(
            "pruned: it carries no plan, so its channels can't be matched with the original's; "
            "pass the plan it was made by as plan="
        )
    return {f"{prefix}{entry}": dims for prefix, each in found for entry, dims in each.kept.items()}


def inputs_of(pruned: nn.Module, plan: HasKept | None) -> Any:
    """How the inputs of ``plan``, or of the plan that ``pruned`` carries, are nested, if told."""
    return getattr(plan_of(pruned) if plan is None else plan, "inputs", None)


def rescalings_of(pruned: nn.Module, plan: HasKept | None) -> tuple[Rescaling, ...]:
    """What ``plan``, or the plan that ``pruned`` or its parts carry, has multiplied."""
    return tuple(
        replace(rescaling, entry=f"{prefix}{rescaling.entry}")
        for prefix, each in _plans_of(pruned, plan)
        for rescaling in getattr(each, "rescalings", ())
    )


def check_networks(
    pruned: nn.Module, original: nn.Module, kept: Mapping[str, Mapping[int, Tensor]]
) -> torch.device:
    """Refuses networks that are no pair, hold NaN or share memory.

    Returns:
        The device of both.

    Raises:
        InvalidArgumentError: values are missing, not finite or can't be changed, memory is shared,
            or the networks are on different devices.
        PlanMismatchError: shapes are not those the plan leads to.
    """
    states = {"pruned": _tensors(pruned), "original": _tensors(original)}
    for entry, tensor in states["pruned"].items():
        if tensor.is_inference():
            raise InvalidArgumentError(
                f"pruned: {entry} was made inside torch.inference_mode, so its values can't be "
                "changed outside of it; load or prune the network under torch.no_grad instead"
            )
    for (name, state), model in zip(states.items(), (pruned, original), strict=True):
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for entry, tensor in state.items():
            if tensor.is_meta:
                raise InvalidArgumentError(f"{name}: {entry} is on the meta device, without values")
            if not is_sound(entry, tensor, parameter=entry in parameters):
                raise InvalidArgumentError(f"{name}: {entry} contains NaN or infinity")
    first = _first_names(original)
    for entry, tensor in states["original"].items():
        shape = shape_after(tensor.shape, kept.get(first[entry], {}))
        found = states["pruned"].get(entry)
        if found is None or list(found.shape) != shape:
            raise PlanMismatchError(
                f"pruned: by the plan {entry} has the shape {shape}, here it is "
                f"{'missing' if found is None else list(found.shape)}; original, pruned and plan "
                "must belong together"
            )
    memory = {t.untyped_storage().data_ptr() for t in states["original"].values() if t.numel()}
    for entry, tensor in states["pruned"].items():
        if tensor.numel() and tensor.untyped_storage().data_ptr() in memory:
            raise InvalidArgumentError(
                f"pruned: {entry} shares memory with the original, which must stay as it is; "
                "apply the plan without inplace=True, or to a copy"
            )
    devices = {str(tensor.device) for state in states.values() for tensor in state.values()}
    if len(devices) != 1:
        raise InvalidArgumentError(
            f"original: both networks must be on one device, got {sorted(devices)}"
        )
    return torch.device(devices.pop())


def _first_names(model: nn.Module) -> dict[str, str]:
    """State-dict entry -> the name a plan lists it under: the first one, where it has several."""
    state = model.state_dict(keep_vars=True)
    names: dict[int, str] = {}
    return {entry: names.setdefault(id(tensor), entry) for entry, tensor in state.items()}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        entry: tensor.detach()
        for entry, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    }


def check_same_calls(trace: CallTrace, surveys: tuple[Survey, Survey]) -> None:
    """Refuses networks that do not make the same sequence of calls.

    Raises:
        PlanMismatchError: names the first difference.
    """
    for i in range(max(len(survey.calls) for survey in surveys)):
        names = [s.calls[i].name if i < len(s.calls) else "nothing" for s in surveys]
        if names[0] != names[1]:
            call = trace.calls[min(i, len(trace.calls) - 1)]
            raise PlanMismatchError(
                f"pruned: it must make the same calls as the original, but call {i} (near "
                f"{call.module or 'the root module'}, {call.source}) is {names[0]} in the "
                f"original and {names[1]} in the pruned network"
            )

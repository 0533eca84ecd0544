"""The table of rules, and what happens to an operation that has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from chanprune_ext.analysis.calls import tensors_in

if TYPE_CHECKING:
    from chanprune_ext.analysis.trace import Tracer

__all__ = ["apply_rule", "is_known", "register_rule", "rule"]

Rule = Callable[["Tracer", Any, tuple[Any, ...], dict[str, Any], Any], None]

_RULES: dict[str, Rule] = {}
# Operations that make tensors of their own: their rule runs although no input carries labels.
_CREATORS: set[str] = set()


def rule(*names: str, creates: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operations, by schema name without overload (``"aten::add"``)."""

    def register(function: Rule) -> Rule:
        for name in names:
            _RULES[name] = function
            if creates:
                _CREATORS.add(name)
        return function

    return register


def register_rule(name: str) -> Callable[[Rule], Rule]:
    """Teach the analysis an operation of your own.

    The decorated function is called after every run of the operation with ``(tracer, func, args,
    kwargs, output)``. It reads the slots of the inputs with ``tracer.dims(tensor)``, restricts them
    with ``tracer.unify(a, b)`` (removed together) and ``tracer.freeze(slots, why)``, and gives each
    output its slots with ``tracer.set(tensor, dims)``. An output without slots is kept whole.

    Args:
        name: Schema name without overload, such as ``"my_ops::gated_conv"``.
    """
    if "::" not in name:
        raise ValueError(f"name must look like 'namespace::operation', got {name!r}")
    return rule(name)


def is_known(func: Any) -> bool:
    """Whether the operation has a rule of its own or is element-wise."""
    return func._schema.name in _RULES or torch.Tag.pointwise in func.tags


def apply_rule(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Give the outputs of one operation their slots; freeze what no rule understands."""
    name = func._schema.name
    tracer.op_name = name
    inputs = tensors_in((args, kwargs))
    if name not in _CREATORS and not any(tracer.labelled(t) for t in inputs):
        return
    function = _RULES.get(name)
    if function is None and torch.Tag.pointwise in func.tags:
        function = _RULES["pointwise"]
    if function is None:
        _give_up(tracer, name, inputs, "no rule for", output)
        return
    try:
        function(tracer, func, args, kwargs, output)
    except (AssertionError, IndexError, ValueError, TypeError, KeyError, RuntimeError) as error:
        _give_up(tracer, name, inputs, f"the rule failed ({error}) for", output)


def _give_up(tracer: Tracer, name: str, inputs: list[Tensor], why: str, output: Any) -> None:
    detail = f"{why} {name}"
    tracer.unknown.append(tracer.events[tracer.reason(detail)])
    for tensor in inputs:
        tracer.freeze_tensor(tensor, detail)
    for tensor in tensors_in(output):
        # An output that is an input changed in place must not keep slots the rule half set.
        tracer.freeze_tensor(tensor, detail)

"""The table of rules, and what happens to an operation that has none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from chanprune_ext.analysis.calls import schema_name, tensors_in
from chanprune_ext.analysis.rules.zeros import follow_zeros, remembered_zeros, restore_zeros

if TYPE_CHECKING:
    from chanprune_ext.analysis.tracer import Tracer

__all__ = ["apply_rule", "give_up", "register_rule", "rule"]

Rule = Callable[["Tracer", Any, tuple[Any, ...], dict[str, Any], Any], None]

_RULES: dict[str, Rule] = {}
# Operations that take a shape from their input, and nothing of what it holds.
_READS_SHAPE = frozenset(
    (
        *(f"aten::{kind}_like" for kind in ("zeros", "ones", "full", "empty", "rand", "randn")),
        *(f"aten::new_{kind}" for kind in ("zeros", "ones", "full", "empty", "empty_strided")),
        "aten::randint_like",
    )
)
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


@functools.lru_cache(maxsize=4096)
def _is_pointwise(func: Any) -> bool:
    """Whether torch tags the operation, or the one it is the in-place form of, as element-wise."""
    if torch.Tag.pointwise in func.tags:
        return True
    namespace, _, name = schema_name(func).partition("::")
    if not name.endswith("_"):
        return False
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    return packet is not None and any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )


def apply_rule(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Give the outputs of one operation their slots; freeze what no rule understands."""
    name = schema_name(func)
    if name.startswith("prim::"):
        return  # a fake tensor is asked for its device or layout
    tracer.op_name = name
    inputs = tensors_in((args, kwargs) if kwargs else args)
    if name not in _READS_SHAPE:
        tracer.use(inputs)
    if name not in _CREATORS and not any(tracer.labelled(t) for t in inputs):
        return
    function = _RULES.get(name)
    if function is None and _is_pointwise(func):
        function = _RULES["pointwise"]
    if function is None:
        give_up(tracer, f"no rule for {name}", inputs, output)
        return
    try:
        remembered = remembered_zeros(tracer, func, inputs)
        function(tracer, func, args, kwargs, output)
        restore_zeros(tracer, remembered)
        follow_zeros(tracer, func, inputs, args, kwargs, output)
    except (AssertionError, IndexError, ValueError, TypeError, KeyError, RuntimeError) as error:
        give_up(tracer, f"the rule failed ({error}) for {name}", inputs, output)


def give_up(tracer: Tracer, detail: str, inputs: list[Tensor], output: Any) -> None:
    """Freeze every channel of an operation that is not understood, and remember it."""
    tracer.unknown.append(tracer.events[tracer.reason(detail)])
    for tensor in inputs:
        tracer.freeze_tensor(tensor, detail)
    for tensor in tensors_in(output):
        # An output that is an input changed in place must not keep slots the rule half set.
        tracer.freeze_tensor(tensor, detail)

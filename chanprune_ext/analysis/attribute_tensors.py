"""Tensors that modules hold as plain attributes: ``self.positions = torch.zeros(100, dim)``.

They move to no device and no file, as buffers do, but forwards read them all the same.
"""

from __future__ import annotations

import dis
import functools
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from chanprune_ext.module_tree import modules_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["attribute_tensors_of"]


def attribute_tensors_of(model: nn.Module, registered: Iterable[Tensor]) -> dict[str, Tensor]:
    """Floating-point tensors that only a constructor has put on a module, by name, each once.

    What another method assigns may be a cache, which it will make anew: of that nothing can be cut.

    Args:
        model: The model.
        registered: Its parameters and buffers: neither they nor views of them are such tensors.
    """
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for prefix, module in modules_of(model):
        for name, value in module.__dict__.items():
            if type(value) is not Tensor or value.requires_grad or not value.dim():
                continue
            if not value.is_floating_point() or value.layout is not torch.strided:
                continue
            if not taken:
                taken = {place for tensor in registered for place in _places(tensor)}
            places = _places(value)
            if not taken.isdisjoint(places) or name in _assigned_later(type(module)):  # type: ignore[arg-type]
                continue
            taken.update(places)
            found[f"{prefix}.{name}" if prefix else name] = value
    return found


def _places(tensor: Tensor) -> list[int]:
    """What tells a tensor and its views from all others."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        return [id(tensor)]
    return [id(tensor), tensor.untyped_storage().data_ptr() or id(tensor)]


@functools.lru_cache(maxsize=1024)
def _assigned_later(kind: type) -> frozenset[str]:
    """Attributes that methods other than ``__init__`` assign."""
    names: set[str] = set()
    for owner in kind.__mro__:
        if owner.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for name, member in vars(owner).items():
            if name != "__init__":
                names.update(_assigned_by(_code_of(member)))
    return frozenset(names)


def _code_of(member: Any) -> CodeType | None:
    for attribute in ("__func__", "fget", "__wrapped__"):
        member = getattr(member, attribute, member)
    return getattr(member, "__code__", None)


def _assigned_by(code: CodeType | None) -> Iterator[str]:
    if code is None:
        return
    for step in dis.get_instructions(code):
        if step.opname == "STORE_ATTR":
            yield str(step.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _assigned_by(constant)

"""Copies of models that lose nothing: what ``copy.deepcopy`` drops is carried over."""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import types
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.module_tree import OWN_ATTRIBUTES, modules_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["copied", "copies_plainly", "keeps_to_itself"]


def copied(model: nn.Module, replacements: Mapping[int, Tensor] | None = None) -> nn.Module:
    """A deep copy of ``model``, with gradients and attributes of its parameters.

    Tensors that a forward or a hook computes (older weight norm) and stores as plain attributes,
    alone or in a list, have a history that cannot be copied; the copy gets their values.

    Args:
        model: The model; left untouched.
        replacements: ``id`` of a tensor of ``model`` -> the tensor that takes its place wherever it
            occurs.

    Raises:
        InvalidArgumentError: Something the model holds cannot be copied.
    """
    memo: dict[int, Any] = dict(replacements or {})
    modules = [module for _, module in modules_of(model)]
    for module in modules:
        for value in module.__dict__.values():
            if type(value) in _ATOMS or (type(value) in _HOLDERS and not value):
                continue
            for function in _scripted_in(value):
                memo[id(function)] = function
            for tensor in tensors_in(value):
                if not tensor.is_leaf:
                    memo.setdefault(id(tensor), tensor.detach().clone())
    given = frozenset(memo)
    try:
        _copy_plain(modules_of(model), memo)
        result: nn.Module = copy.deepcopy(model, memo)
    except Exception as error:
        where = f" in {error.place}" if isinstance(error, _NotCopiedError) else ""
        cause = error.__cause__ if isinstance(error, _NotCopiedError) else error
        raise InvalidArgumentError(
            f"the model cannot be copied ({type(cause).__name__}{where}: {cause}); prune it with "
            f"inplace=True, or remove what cannot be copied from it first"
        ) from error
    parameters = [p for module in modules for p in module._parameters.values()]  # noqa: SLF001
    for parameter in dict.fromkeys(parameters):
        if parameter is not None and id(parameter) not in given:
            carry_over(parameter, memo[id(parameter)], memo)
            if parameter.grad is not None:
                memo[id(parameter)].grad = parameter.grad.clone()
    return result


class _NotCopiedError(Exception):
    """What an attribute holds cannot be copied; ``place`` says which, the cause why."""

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.place = place


def _scripted_in(value: Any) -> list[Any]:
    """Scripted functions that an attribute holds: nothing but code, as any other function."""
    items = value.values() if isinstance(value, dict) else value
    items = items if type(value) in (list, tuple, dict) else (value,)
    return [item for item in items if isinstance(item, torch.jit.ScriptFunction)]


_HOLDERS = frozenset({dict, OrderedDict, set})
# What copy.deepcopy gives back as it is.
_ATOMS = frozenset(
    {
        *(int, float, bool, str, complex, bytes, type(None), type),
        *(types.FunctionType, types.BuiltinFunctionType),
    }
)


def copies_plainly(module: nn.Module) -> bool:
    """Whether a copy of a module is a new one with a copy of its ``__dict__``."""
    kind: Any = type(module)  # hashable, whatever the type checker makes of Module.__hash__
    return _copies_plainly(kind) and "__deepcopy__" not in module.__dict__


def keeps_to_itself(module: nn.Module) -> bool:
    """Whether nothing a copied module runs can be part of the model it was copied from.

    A function keeps what it has caught (``self.act = lambda x: self.conv(x)``), also in a copy.
    """
    kind: Any = type(module)
    return _code_keeps_to_itself(kind) and all(
        (name in OWN_ATTRIBUTES and not value) or _holds_nothing_else(value)
        for name, value in module.__dict__.items()
        if type(value) not in _SIMPLE
    )


_SIMPLE = frozenset({int, float, bool, str, type(None)})


def _holds_nothing_else(value: Any) -> bool:
    kind = type(value)
    if kind is types.FunctionType:
        return value.__closure__ is None
    if kind in _ATOMS or isinstance(value, (Tensor, nn.Module, torch.dtype, torch.device, type)):
        return True
    if kind in (tuple, list, set):
        return all(map(_holds_nothing_else, value))
    if kind in (dict, OrderedDict):
        return all(map(_holds_nothing_else, value.values()))
    if kind is functools.partial:
        return all(map(_holds_nothing_else, (value.func, *value.args, *value.keywords.values())))
    return False


@functools.lru_cache(maxsize=4096)
def _code_keeps_to_itself(kind: Any) -> bool:
    """Whether no method of a class reads a module of others: a global, or a caught one."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] == "torch":
            continue
        for member in vars(base).values():
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if not isinstance(function, types.FunctionType):
                continue
            with contextlib.suppress(ValueError):  # a cell that is empty yet
                caught = [cell.cell_contents for cell in function.__closure__ or ()]
                read = [function.__globals__.get(n) for n in function.__code__.co_names]
                if any(isinstance(v, (nn.Module, Tensor)) for v in (*caught, *read)):
                    return False
    return True


@functools.lru_cache(maxsize=4096)
def _copies_plainly(kind: Any) -> bool:
    return (
        not any(hasattr(kind, name) for name in ("__deepcopy__", "__getnewargs__"))
        and not hasattr(kind, "__getnewargs_ex__")
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and kind.__getstate__ is nn.Module.__getstate__
        and _only_completes(kind.__setstate__)
        and kind.__new__ is object.__new__
        and kind not in copyreg.dispatch_table
        and not copyreg._slotnames(kind)  # type: ignore[attr-defined]  # noqa: SLF001
    )


def _only_completes(setstate: Any) -> bool:
    """Whether this adds what older files lack, as torch's layers do; the recurrent ones do more."""
    where = str(getattr(setstate, "__module__", ""))
    # The first torch.compile of a process puts its own, which only tags the module, in front.
    if where == "torch._dynamo.mutation_guard":
        return True
    return where.startswith("torch.nn.modules.") and not where.endswith(".rnn")


def _copy_plain(modules: Sequence[tuple[str, nn.Module]], memo: dict[int, Any]) -> None:
    """Copy the modules that have no ways of their own, into ``memo``.

    That is what ``copy.deepcopy`` does with them, which takes thousands of calls for the empty
    dicts of hooks that every module has.
    """
    plain = [(path, m) for path, m in modules if copies_plainly(m)]
    for _, module in plain:
        memo[id(module)] = object.__new__(type(module))
    # Those inside first: one with ways of its own in between, such as a torch.fx.GraphModule, looks
    # at the copies of what it holds.
    for path, module in reversed(plain):
        target = memo[id(module)].__dict__
        for name, value in module.__getstate__().items():  # type: ignore[no-untyped-call]
            kind = type(value)
            if kind in _ATOMS or (kind is tuple and all(type(v) in _ATOMS for v in value)):
                target[name] = value
            elif name in OWN_ATTRIBUTES and kind in _HOLDERS and not value:
                target[name] = kind()
            else:
                try:
                    target[name] = _copied_value(value, memo)
                except Exception as error:
                    where = f"of '{path}'" if path else "of the model itself"
                    raise _NotCopiedError(f"attribute '{name}' {where}") from error


def _copied_value(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _ATOMS:
        return value
    known = memo.get(id(value))
    if known is not None:
        return known
    if kind is dict or kind is OrderedDict:
        result = memo[id(value)] = kind()
        for key, item in value.items():
            new_key = key if type(key) in _ATOMS else copy.deepcopy(key, memo)
            result[new_key] = _copied_value(item, memo)
        return result
    if kind is Tensor and _is_counter(value):
        result = memo[id(value)] = value.clone()
        return result
    return copy.deepcopy(value, memo)


def _is_counter(tensor: Tensor) -> bool:
    """Whether this is nothing but one number, such as the count of batches of a batch norm."""
    return (
        tensor.dim() == 0
        and not tensor.requires_grad
        and not tensor.__dict__
        and not tensor.is_meta
        and tensor.untyped_storage().nbytes() == tensor.element_size()
    )


def carry_over(old: Tensor, new: Tensor, memo: dict[int, Any]) -> None:
    """Give ``new`` the attributes that were set on ``old``."""
    if old.__dict__:
        new.__dict__.update(copy.deepcopy(old.__dict__, memo))

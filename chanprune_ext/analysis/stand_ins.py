"""Running a model on other tensors than its own: on the meta device, fake, copied or narrowed."""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from chanprune_ext.analysis.attribute_tensors import attribute_tensors_of
from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.analysis.memories import memories_apart, refill, same_values, values_of
from chanprune_ext.module_tree import modules_of, remembered

__all__ = [
    "call_substituted",
    "fake_tensors_silent",
    "held_tensors_of",
    "substitute",
    "substrate_device",
    "substrate_mode",
    "tensors_of",
    "tensors_with",
]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once, under its first name; not to be changed."""
    known = remembered(model)
    if known is not None and known.tensors is not None:
        return known.tensors
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in modules_of(model):
        # As named_parameters() and named_buffers() do, which go through all modules once each.
        dot = "." if prefix else ""
        for entries, kind in ((parameters, "_parameters"), (buffers, "_buffers")):
            # Scripted modules keep them elsewhere than in their __dict__.
            for name, tensor in getattr(module, kind).items():
                if tensor is not None and id(tensor) not in seen and isinstance(tensor, Tensor):
                    seen.add(id(tensor))
                    entries[f"{prefix}{dot}{name}"] = tensor
    found = parameters | buffers
    if known is not None:
        known.tensors = found
    return found


def held_tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """:func:`tensors_of`, and plain attributes that are tensors."""
    registered = tensors_of(model)
    return {**registered, **attribute_tensors_of(model, registered.values())}


def tensors_with(model: nn.Module, names: Container[str]) -> dict[str, Tensor]:
    """:func:`tensors_of`, and plain attributes that have one of the names."""
    registered = tensors_of(model)
    attributes = attribute_tensors_of(model, registered.values()).items()
    return {**registered, **{name: tensor for name, tensor in attributes if name in names}}


def substitute(value: Any, change: Any) -> Any:
    """``value`` with ``change`` applied to each tensor inside tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {k: substitute(v, change) for k, v in value.items()}
    if isinstance(value, tuple):
        items = [substitute(v, change) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [substitute(v, change) for v in value]
    return value


@contextlib.contextmanager
def substrate_mode(substrate: str) -> Iterator[Any]:
    """A function tensor -> stand-in for ``"meta"``, ``"fake"`` or ``"real"``."""
    # TorchScript's optimiser computes with constants, at the first or a later run.
    with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
        if substrate == "meta":
            yield _on_meta
        elif substrate == "fake":
            with fake_tensors_silent(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
                yield lambda t: _fake(mode, t)
        else:
            # A copy: a training-mode forward moves the running statistics.
            yield lambda t: t.detach().clone()


@contextlib.contextmanager
def fake_tensors_silent() -> Iterator[None]:
    """Keeps torch from logging, traceback and all, what a forward on fake tensors raises.

    Who runs it catches that, and tries on or tells it in a message. The level of the logger is put
    back.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")
    usual = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(usual)


def _on_meta(tensor: Tensor) -> Tensor:
    if tensor.layout is torch.strided and tensor.is_contiguous():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return tensor.detach().to("meta")


def _fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    if tensor.is_meta or tensor.layout is not torch.strided or not tensor.is_contiguous():
        return mode.from_tensor(tensor.detach(), static_shapes=True)
    with torch._C._DisableTorchDispatch():  # noqa: SLF001 - the mode would have it fake as it is
        meta = _on_meta(tensor)
    return mode.fake_tensor_converter.from_meta_and_device(mode, meta, tensor.device)


def substrate_device(substrate: str) -> torch.device | None:
    """Where a forward on such stand-ins makes its tensors; None for where it says itself."""
    return torch.device("meta") if substrate == "meta" else None


def call_substituted(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    inputs: Any,
    caches: set[tuple[str, str]] | None = None,
    prepare: Callable[[nn.Module], object] | None = None,
) -> Any:
    """Run ``model`` with other tensors in place of its parameters and buffers.

    A tensor is replaced wherever a module holds it: under every name of a shared module (where
    ``torch.func.functional_call`` would not put the original back), and in plain attributes. What
    the forward stores on its modules (a counter, an entry of a cache, a hook or its result) is
    forgotten; ``caches`` receives the module and the name of each dict, list or set of tensors that
    it has written to. ``prepare`` is called with the model before it runs; what that changes is
    forgotten too.
    """
    originals = held_tensors_of(model)
    stand_ins = {id(originals[name]): tensor for name, tensor in tensors.items()}
    before = [(path, module, module.__dict__.copy()) for path, module in modules_of(model)]
    # Containers as they are now: what is in them, and those with nothing in them.
    contents: list[tuple[str, str, Any, Any]] = []
    empty: list[Any] = []
    try:
        for path, module, attributes in before:
            _put_in(path, module, attributes, stand_ins, contents, empty)
        if prepare is not None:
            prepare(model)
        with memories_apart(model):
            if isinstance(inputs, Mapping):
                return model(**inputs)
            return model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    finally:
        for _, module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        if any(empty):
            filled = {id(container) for container in empty if container}
            for path, _, attributes in before:
                contents += [(path, n, v, ()) for n, v in attributes.items() if id(v) in filled]
        for path, name, value, content in contents:
            now = values_of(value)
            if same_values(now, values_of(content)):
                continue
            if caches is not None and tensors_in(now):
                caches.add((path, name))
            refill(value, content)


def _put_in(
    path: str,
    module: nn.Module,
    attributes: Mapping[str, Any],
    stand_ins: Mapping[int, Tensor],
    contents: list[tuple[str, str, Any, Any]],
    empty: list[Any],
) -> None:
    """Put stand-ins in place of the tensors of one module, and note what its containers hold."""

    def change(tensor: Any) -> Any:
        return stand_ins.get(id(tensor), tensor)

    for name, value in attributes.items():
        kind = type(value)
        if kind in _SCALARS:
            continue
        if name in _TENSOR_DICTS:
            if value:
                module.__dict__[name] = {k: change(t) for k, t in value.items()}
        elif kind in _CONTAINERS and not (kind is list and _holds_tensors(value)):
            if value:
                contents.append((path, name, value, value.copy()))
            else:
                empty.append(value)
        elif _holds_tensors(value):
            module.__dict__[name] = substitute(value, change)


_TENSOR_DICTS = frozenset({"_parameters", "_buffers"})
_SCALARS = frozenset({bool, int, float, str, type(None)})
_CONTAINERS = frozenset({dict, OrderedDict, list, set})


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        type(value) in (list, tuple) and bool(value) and isinstance(value[0], Tensor)
    )

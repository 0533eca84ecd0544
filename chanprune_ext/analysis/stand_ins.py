"""Running a model on other tensors than its own: on the meta device, fake, copied or narrowed."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["call_substituted", "substitute", "substrate_mode", "tensors_of"]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once, under its first name."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    found.update((name, b) for name, b in model.named_buffers() if isinstance(b, Tensor))
    return found


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
    if substrate == "meta":
        with torch.device("meta"):
            yield lambda t: t.detach().to("meta")
    elif substrate == "fake":
        from torch._subclasses import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield lambda t: mode.from_tensor(t.detach(), static_shapes=True)
    else:
        # A copy: a training-mode forward moves the running statistics.
        yield lambda t: t.detach().clone()


def call_substituted(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Any) -> Any:
    """Run ``model`` with other tensors in place of its parameters and buffers.

    A tensor is replaced wherever a module holds it: under every name of a shared module (where
    ``torch.func.functional_call`` would not put the original back), and in plain attributes. What
    the forward stores on its modules (a counter, an entry of a cache, a hook or its result) is
    forgotten.
    """
    originals = tensors_of(model)
    stand_ins = {id(originals[name]): tensor for name, tensor in tensors.items()}

    def change(tensor: Tensor) -> Tensor:
        return stand_ins.get(id(tensor), tensor)

    before = [(module, dict(module.__dict__)) for module in model.modules()]
    caches: list[tuple[Any, Any]] = []
    try:
        for module, attributes in before:
            for name, value in attributes.items():
                if name in ("_parameters", "_buffers") or _holds_tensors(value):
                    module.__dict__[name] = substitute(value, change)
                elif type(value) in (dict, OrderedDict, list, set):
                    caches.append((value, value.copy()))
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    finally:
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for cache, content in caches:
            cache.clear()
            cache.extend(content) if isinstance(cache, list) else cache.update(content)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        type(value) in (list, tuple) and bool(value) and isinstance(value[0], Tensor)
    )

"""The modules of a model, in order."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = [
    "OWN_ATTRIBUTES",
    "Remembered",
    "modules_of",
    "plain_module",
    "remembered",
    "structure_remembered",
]


# What every module has for itself: parameters, mostly empty dicts of hooks, and so on.
OWN_ATTRIBUTES = frozenset(nn.Module().__dict__)


def plain_module(model: nn.Module) -> nn.Module:
    """The network inside what DistributedDataParallel, DataParallel or torch.compile made of it."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:  # noqa: SLF001 - torch.compile has no public name
            model = model.get_submodule("_orig_mod")
        else:
            return model


@dataclass(eq=False)
class Remembered:
    """What was found in a model once, for as long as its structure stays what it is.

    Attributes:
        model: The model.
        modules: As from :func:`modules_of`.
        tensors: As from :func:`chanprune_ext.analysis.stand_ins.tensors_of`, once it was asked.
    """

    model: nn.Module
    modules: list[tuple[str, nn.Module]]
    tensors: dict[str, Tensor] | None = None


_REMEMBERED: ContextVar[Remembered | None] = ContextVar("structure", default=None)


@contextmanager
def structure_remembered(model: nn.Module) -> Iterator[None]:
    """Go through ``model`` once only, though many steps ask for its modules and tensors.

    Until the end nothing may put modules, parameters or buffers into it, take or exchange any, but
    for a while (as a forward on stand-ins does, which puts everything back).
    """
    token = _REMEMBERED.set(Remembered(model, modules_of(model)))
    try:
        yield
    finally:
        _REMEMBERED.reset(token)


def remembered(model: nn.Module) -> Remembered | None:
    """What is known of ``model`` under :func:`structure_remembered`."""
    known = _REMEMBERED.get()
    return known if known is not None and known.model is model else None


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What ``model.named_modules()`` yields, as a list that is not to be changed.

    That is a tower of generators, one for each level, and takes several times as long: in a network
    of a thousand small modules it would be most of the time of an analysis, which goes through them
    again and again.
    """
    known = remembered(model)
    if known is not None:
        return known.modules
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module | None]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module is None or id(module) in seen:
            continue
        if type(module).named_modules is not nn.Module.named_modules:
            told = module.named_modules(prefix=path)
            new = [(name, m) for name, m in told if id(m) not in seen]
            seen.update(id(m) for _, m in new)
            found += new
            continue
        seen.add(id(module))
        found.append((path, module))
        children = module._modules  # noqa: SLF001 - named_children() leaves shared ones out
        if children:
            dot = f"{path}." if path else ""
            waiting += [(f"{dot}{name}", child) for name, child in reversed(children.items())]
    return found

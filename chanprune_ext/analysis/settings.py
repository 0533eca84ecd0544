"""Settings that modules hold, objects (``self.config``) or dicts: their ints that forwards read."""

from __future__ import annotations

import copy
import functools
import types
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from chanprune_ext.module_tree import OWN_ATTRIBUTES, modules_of

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Iterable, Iterator

    from chanprune_ext.analysis.provenance import Attribute

__all__ = ["contents_of", "derived_of", "own_settings", "owner_of", "settings_of"]

# Objects that have a __dict__, but no settings in it.
_NO_SETTINGS = (
    *(nn.Module, Tensor, type, types.FunctionType, types.MethodType, types.ModuleType),
    *(functools.partial, dict, list, tuple, set, BaseException),
)
_MOST_SETTINGS = 1000  # a vocabulary has more
_DEEPEST = 3  # settings within settings
_NUMBERS = frozenset({int, tuple, list})


@functools.lru_cache(maxsize=4096)
def _has_settings(kind: Any) -> bool:
    """Whether objects of a class may be settings: those that somebody's code defines."""
    module = kind.__module__.partition(".")[0]
    return module not in ("builtins", "torch", "functools") and not issubclass(kind, _NO_SETTINGS)


def _are_settings(value: Any) -> bool:
    kind: Any = type(value)
    return (kind is dict or _has_settings(kind)) and len(contents_of(value)) <= _MOST_SETTINGS


def settings_of(model: nn.Module) -> list[tuple[str, str, Any]]:
    """Settings with numbers, each once: path of the first module that holds them, and their name.

    The name has dots for settings that no module holds by itself, but within others.
    """
    return [
        (path, name, settings)
        for path, name, settings in _all_settings(model)
        if any(type(n) in _NUMBERS for n in contents_of(settings).values())
    ]


def _all_settings(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    seen: set[int] = set()
    held = [
        (path, name, value)
        for path, module in modules_of(model)
        for name, value in module.__dict__.items()
        if name not in OWN_ATTRIBUTES
    ]
    for _ in range(_DEEPEST):
        within: list[tuple[str, str, Any]] = []
        for path, name, value in held:
            if id(value) in seen or not _are_settings(value):
                continue
            seen.add(id(value))
            yield path, name, value
            within += [
                (path, f"{name}.{key}", inner)
                for key, inner in contents_of(value).items()
                if isinstance(key, str) and key.isidentifier()
            ]
        held = within


def contents_of(owner: Any) -> dict[str, Any]:
    """Where the numbers of a module, a settings object, or a dict of settings stand."""
    return owner if isinstance(owner, dict) else getattr(owner, "__dict__", {})


def derived_of(module: nn.Module) -> dict[str, Any]:
    """What a module keeps of its settings in another form, as it is with their present numbers."""
    if "axes_lengths" in module.__dict__ and type(module).__module__.startswith("einops."):
        return {"_axes_lengths": tuple(module.__dict__["axes_lengths"].items())}
    return {}


def owner_of(model: nn.Module, attribute: Attribute) -> tuple[Any, str]:
    """The module or settings that have an attribute, or None, and its name there."""
    owner: Any = model.get_submodule(attribute.module)
    *holders, name = attribute.name.split(".")
    for holder in holders:
        owner = contents_of(owner).get(holder)
    return owner, name


def own_settings(
    model: nn.Module, attributes: Iterable[Attribute], undo: contextlib.ExitStack
) -> None:
    """Gives a model copies of the settings that attributes are part of, and of what holds these.

    Other models may hold the same ones: they are to keep theirs.

    Args:
        model: The model whose attributes are about to change.
        attributes: The attributes; those of modules themselves need nothing.
        undo: Receives what puts the objects back.
    """
    owners = [owner for owner, _ in (owner_of(model, attribute) for attribute in attributes)]
    affected = {id(owner) for owner in owners if not isinstance(owner, nn.Module)}
    if not affected:
        return
    settings = [each for _, _, each in _all_settings(model)]
    while more := [s for s in settings if id(s) not in affected and _holds_any(s, affected)]:
        affected.update(map(id, more))
    copies = {id(s): copy.copy(s) for s in settings if id(s) in affected}
    for made in copies.values():
        held = contents_of(made)
        held.update({key: copies[id(v)] for key, v in held.items() if id(v) in copies})
    for _, module in modules_of(model):
        for name, value in module.__dict__.items():
            if id(value) in copies:
                undo.callback(module.__dict__.__setitem__, name, value)
                module.__dict__[name] = copies[id(value)]


def _holds_any(settings: Any, ids: set[int]) -> bool:
    return any(id(value) in ids for value in contents_of(settings).values())

"""What code remembers beside its modules: ``functools.lru_cache``, dicts of a file or a class.

A run on stand-ins must not leave any there, nor find what an earlier run has left: sizes that are
equal, but known to come from nowhere, or tensors of widths that are gone.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
from collections import OrderedDict, defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.analysis.provenance import may_hold_traced
from chanprune_ext.module_tree import modules_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import nn

__all__ = ["memories_apart", "refill", "same_values", "values_of"]

_Cached = type(functools.lru_cache(lambda: None))
_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, list, set})
# No forward has what these remember computed from its sizes; and they remember a lot.
_ELSEWHERE = sys.stdlib_module_names | {
    *("chanprune_ext", "torch", "triton", "numpy", "scipy", "pandas", "sympy", "mpmath"),
    *("networkx", "matplotlib", "PIL", "IPython", "pytest", "_pytest", "hypothesis", "setuptools"),
}


class _Named(NamedTuple):
    """A function that remembers, under a name of a file, a class or a module."""

    held: Any
    name: str
    cached: Any
    anew: Callable[..., Any]


# Those of the files that are loaded, and how many files that were.
_in_loaded: list[_Named] = []
_loaded = 0
# What has remembered something in the run that is going on.
_polluted: set[Any] = set()


@contextlib.contextmanager
def memories_apart(model: nn.Module) -> Iterator[None]:
    """While a model runs on stand-ins, keeps what they compute out of what code remembers.

    Functions that remember results are asked as ever, but where one is called with traced sizes, or
    returns tensors, it computes anew. Dicts, lists and sets of the files and classes that the
    modules are written in are put back.
    """
    kinds = dict.fromkeys(
        kind
        for _, module in modules_of(model)
        for kind in type(module).__mro__
        if kind.__module__.partition(".")[0] not in _ELSEWHERE
    )
    files = {name: sys.modules[name] for name in {k.__module__ for k in kinds} & {*sys.modules}}
    contents = [pair for owner in (*kinds, *files.values()) for pair in _contents(vars(owner))]
    in_dicts = [*_in_files(vars(file) for file in files.values())]
    for _, module in modules_of(model):
        in_dicts += _found_in(module.__dict__)
    in_classes = [(kind, found) for kind in kinds for found in _found_in(vars(kind))]
    try:
        for held, name, _, anew in in_dicts:
            held[name] = anew
        for kind, found in in_classes:
            setattr(kind, found.name, found.anew)
        yield
    finally:
        for held, name, cached, _ in in_dicts:
            held[name] = cached
        for kind, found in in_classes:
            setattr(kind, found.name, found.cached)
        while _polluted:
            _polluted.pop().cache_clear()
        for container, content in contents:
            now = values_of(container)
            changed = not same_values(now, values_of(content))
            if changed and (tensors_in(now) or may_hold_traced(now)):
                refill(container, content)


def values_of(container: Any) -> list[Any]:
    """What a dict, list or set holds."""
    return list(container.values() if isinstance(container, dict) else container)


def same_values(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether they are the same objects."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


def refill(container: Any, content: Any) -> None:
    """Gives a dict, list or set the content of another."""
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)


def _in_files(again: Iterable[Mapping[str, Any]]) -> Iterator[_Named]:
    """Every function that remembers, wherever a loaded file has a name for it.

    Args:
        again: Files that may have changed since they were loaded, a notebook say.
    """
    global _loaded  # noqa: PLW0603 - looking through thousands of files takes a while
    if len(sys.modules) != _loaded:
        _loaded = len(sys.modules)
        _in_loaded.clear()
        for path, file in list(sys.modules.items()):
            held = getattr(file, "__dict__", None)
            if held is not None and path.partition(".")[0] not in _ELSEWHERE:
                _in_loaded.extend(_found_in(held))
    looked_through = {id(held): held for held in again}
    for found in _in_loaded:
        if id(found.held) not in looked_through and found.held.get(found.name) is found.cached:
            yield found
    for held in looked_through.values():
        yield from _found_in(held)


def _found_in(held: Mapping[str, Any]) -> list[_Named]:
    return [
        _Named(held, name, value, _computing_anew(value))
        for name, value in list(held.items())
        if type(value) is _Cached
    ]


def _computing_anew(cached: Any) -> Callable[..., Any]:
    """What is called in place of a function that ``functools.lru_cache`` made."""
    function = cached.__wrapped__

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if may_hold_traced(args) or may_hold_traced(kwargs.values()):
            return function(*args, **kwargs)
        computed = cached.cache_info().misses
        result = cached(*args, **kwargs)
        if not (may_hold_traced((result,)) or tensors_in(result)):
            return result
        if cached.cache_info().misses > computed:
            _polluted.add(cached)
            return result
        return function(*args, **kwargs)

    for name in ("cache_info", "cache_clear", "cache_parameters"):
        setattr(call, name, getattr(cached, name))
    return call


def _contents(namespace: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """The containers of a file or a class, each with a copy."""
    return [
        (value, value.copy())
        for name, value in list(namespace.items())
        if type(value) in _CONTAINERS and not name.startswith("__")
    ]

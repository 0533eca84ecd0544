"""What code remembers beside its modules: ``functools.lru_cache``, dicts of a file or a class.

A run on stand-ins must not leave any there, nor find what an earlier run has left: sizes that are
equal, but known to come from nowhere, or tensors of widths that are gone.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import OrderedDict, defaultdict
from typing import TYPE_CHECKING, Any

from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.analysis.provenance import may_hold_traced
from chanprune_ext.module_tree import modules_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import nn

__all__ = ["memories_apart"]

_Cached = type(functools.lru_cache(lambda: None))
_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, list, set})
# No forward has what these remember computed from its sizes; and they remember a lot.
_ELSEWHERE = sys.stdlib_module_names | {
    *("chanprune_ext", "torch", "triton", "numpy", "scipy", "pandas", "sympy", "mpmath"),
    *("networkx", "matplotlib", "PIL", "IPython", "pytest", "_pytest", "hypothesis", "setuptools"),
}
# Where loaded files have names for functions that remember, and how many files were loaded then.
_in_loaded: list[tuple[dict[str, Any], str]] = []
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
    in_dicts = [
        *_in_files(vars(file) for file in files.values()),
        *((m.__dict__, name) for _, m in modules_of(model) for name in _names(m.__dict__)),
    ]
    in_classes = [(kind, name) for kind in kinds for name in _names(vars(kind))]
    before = [held[name] for held, name in in_dicts]
    before_in_classes = [vars(kind)[name] for kind, name in in_classes]
    try:
        for (held, name), cached in zip(in_dicts, before, strict=True):
            held[name] = _computing_anew(cached)
        for (kind, name), cached in zip(in_classes, before_in_classes, strict=True):
            setattr(kind, name, _computing_anew(cached))
        yield
    finally:
        for (held, name), cached in zip(in_dicts, before, strict=True):
            held[name] = cached
        for (kind, name), cached in zip(in_classes, before_in_classes, strict=True):
            setattr(kind, name, cached)
        while _polluted:
            _polluted.pop().cache_clear()
        _put_back(contents)


def _in_files(again: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
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
                _in_loaded.extend((held, name) for name in _names(held))
    looked_through = {id(held): held for held in again}
    for held, name in _in_loaded:
        if id(held) not in looked_through and type(held.get(name)) is _Cached:
            yield held, name
    for held in looked_through.values():
        yield from ((held, name) for name in _names(held))


def _names(held: Mapping[str, Any]) -> list[str]:
    """Names of the functions that remember."""
    return [name for name, value in list(held.items()) if type(value) is _Cached]


@functools.lru_cache(maxsize=10_000)
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


def _put_back(contents: list[tuple[Any, Any]]) -> None:
    """Empties containers of what has come since, where tensors or traced numbers are in it."""
    for now, then in contents:
        if len(now) == len(then):
            continue
        values = list(now.values() if isinstance(now, dict) else now)
        if tensors_in(values) or may_hold_traced(values):
            now.clear()
            now.extend(then) if isinstance(now, list) else now.update(then)

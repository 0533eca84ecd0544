"""Plain numbers that a forward has made of traced ones: ``int(x.shape[1] / 2)``.

``int()`` returns a plain int whatever it is called with. What it was made of is noted for the
function that called it, and found again where the same run of that function passes the number on.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

from chanprune_ext.analysis.calls import is_user_file, user_frame

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import CodeType, FrameType

__all__ = ["note", "noting", "recollected"]

_COMPREHENSIONS = frozenset(("<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>"))

# Number -> what it was made of; None where that is not the same everywhere.
Made: TypeAlias = "dict[int, Any]"

# Of a function that notes numbers: its latest run, and what that has noted. The frame itself is
# held, for the address of one that has ended may be the next one's.
_noted: dict[CodeType, tuple[FrameType | None, Made]] | None = None
_NOTHING: tuple[None, Made] = None, {}


@contextlib.contextmanager
def noting() -> Iterator[None]:
    """While this lasts, numbers are noted; afterwards they are forgotten."""
    global _noted  # noqa: PLW0603 - int() has nobody to tell but this file
    before, _noted = _noted, {}
    try:
        yield
    finally:
        _noted = before


def note(number: int, expr: Any, same: Callable[[Any, Any], bool]) -> None:
    """Called by ``__int__`` of a traced number.

    Args:
        number: What it returns.
        expr: What that was made of.
        same: Whether two of those are.
    """
    if _noted is None:
        return
    frame: FrameType | None = sys._getframe(2)
    if frame is None or not is_user_file(frame.f_code.co_filename):
        return
    frame = _function_of(frame)
    # A literal of the same value could be either.
    if number in _literals(frame.f_code):
        return
    run, made = _noted.get(frame.f_code, _NOTHING)
    if run is not frame:
        made = {}
    _noted[frame.f_code] = frame, made
    earlier = made.get(number, expr)
    made[number] = expr if earlier is not None and same(earlier, expr) else None


def recollected(values: Any, traced: Callable[[int, Any], int]) -> Any:
    """Arguments of a call, with numbers that were noted for the code that makes it traced again.

    Args:
        values: Tuples, lists, dicts and slices of arguments.
        traced: Makes a traced number of one, and of what was noted of it.
    """
    if not _noted:
        return values
    frame = user_frame()
    if frame is None:
        return values
    frame = _function_of(frame)
    run, made = _noted.get(frame.f_code, _NOTHING)
    return _traced_in(values, made, traced) if run is frame else values


def _traced_in(value: Any, made: Made, traced: Callable[[int, Any], int]) -> Any:
    kind = type(value)
    if kind is int:
        expr = made.get(value)
        return value if expr is None else traced(value, expr)
    if kind is tuple or kind is list:
        return kind(_traced_in(item, made, traced) for item in value)
    if kind is dict:
        return {key: _traced_in(item, made, traced) for key, item in value.items()}
    if kind is slice:
        return slice(*(_traced_in(v, made, traced) for v in (value.start, value.stop, value.step)))
    return value


def _function_of(frame: FrameType) -> FrameType:
    """The function that a comprehension, which has a frame of its own, is part of."""
    while frame.f_code.co_name in _COMPREHENSIONS and frame.f_back is not None:
        frame = frame.f_back
    return frame


@functools.lru_cache(maxsize=4096)
def _literals(code: CodeType) -> frozenset[int]:
    """Whole numbers that are written out in a function."""
    found: set[int] = set()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
            values = step.argval if isinstance(step.argval, tuple) else (step.argval,)
            found.update(value for value in values if type(value) is int)
    return frozenset(found)

"""``np.prod(x.shape[1:])``: numpy returns a number of its own, and forgets what it was made of."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from chanprune_ext.analysis.provenance import TracedInt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["traced_products"]

_lock = threading.Lock()
_users = 0
_usual: Any = None  # numpy's own function, while another one stands in its place


class _NumpyInt(TracedInt):
    """A traced product that also has what a number of numpy's has."""

    def item(self) -> int:
        """Itself: a plain number would be an untraced one."""
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(np.int64(self.__index__()), name)


def _traced(prod: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(prod)
    def product(a: Any, *args: Any, **kwargs: Any) -> Any:
        value = prod(a, *args, **kwargs)
        sizes = a if isinstance(a, (tuple, list)) and not args and not kwargs else ()
        if not any(isinstance(size, TracedInt) for size in sizes):
            return value
        found = math.prod(sizes)
        return _NumpyInt(found, found.expr) if isinstance(found, TracedInt) else value

    return product


@contextlib.contextmanager
def traced_products() -> Iterator[None]:
    """While this lasts, ``numpy.prod`` of traced sizes is a traced size.

    It is the whole process that sees it; of other numbers it returns what it always does.
    """
    global _users, _usual  # noqa: PLW0603 - as numpy's function is
    with _lock:
        _users += 1
        if _users == 1:
            _usual = np.prod
            np.prod = _traced(_usual)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                np.prod, _usual = _usual, None

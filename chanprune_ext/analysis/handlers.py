"""Tables of functions by the names of the operations or calls that they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["entering"]

F = TypeVar("F")


def entering(table: dict[str, F]) -> Callable[..., Callable[[F], F]]:
    """A decorator, called with names, that enters the function below it into ``table``."""

    def named(*names: str) -> Callable[[F], F]:
        def enter(function: F) -> F:
            table.update(dict.fromkeys(names, function))
            return function

        return enter

    return named

"""What a model returns: tensors by the names of their places in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.errors import InvalidArgumentError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["named_tensors", "picked_outputs"]


def picked_outputs(outputs: Callable[[Any], Any], returned: Any) -> Any:
    """Those of a model's outputs that a user wants to keep their shape.

    Raises:
        InvalidArgumentError: There are none, or ``outputs`` fails.
    """
    try:
        picked = outputs(returned)
    except Exception as error:
        raise InvalidArgumentError(
            f"outputs raised {type(error).__name__} when called with what the model returns, a "
            f"{type(returned).__name__}: {error}; it must pick what is to keep its shape"
        ) from error
    if not tensors_in(picked):
        raise InvalidArgumentError(
            f"outputs picked no tensor of what the model returns, a {type(returned).__name__}, but "
            f"{picked!r}; without any, the model's own outputs would change their shape"
        )
    return picked


def named_tensors(returned: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in it, each with its place: ``"logits"``, ``"[0]"``, ``"past[0].keys"``, ``""``.

    What is stored in objects of other kinds than tuples, lists and dicts has the object's place.
    """
    if isinstance(returned, (tuple, list)):
        for position, item in enumerate(returned):
            yield from named_tensors(item, f"{place}[{position}]")
    elif isinstance(returned, Mapping):
        for key, item in returned.items():
            yield from named_tensors(item, f"{place}.{key}" if place else str(key))
    else:
        for tensor in tensors_in(returned):
            yield place, tensor

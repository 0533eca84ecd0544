"""Tensors made inside a forward: uniform ones stretch with their neighbours, others do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.analysis.rules.registry import rule

if TYPE_CHECKING:
    from chanprune_ext.analysis.tracer import Tracer


@rule(
    *(f"aten::{n}" for n in ("zeros", "ones", "full", "empty", "rand", "randn")),
    *(f"aten::new_{n}" for n in ("zeros", "ones", "full", "empty")),
    *("aten::empty_strided", "aten::new_empty_strided"),
    creates=True,
)
def uniform(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """The same content (or noise) at every index: any index may go, as long as the size follows."""
    for out in tensors_in(output):
        tracer.set(out, [tracer.fresh(n) for n in out.shape])


@rule(*(f"aten::{n}_like" for n in ("zeros", "ones", "full", "empty", "rand", "randn")))
def like(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """The size follows the given tensor by itself."""
    tracer.set(output, tracer.dims(args[0]))

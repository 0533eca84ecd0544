"""Systems of equations: unknowns stay, systems and right-hand sides pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanprune_ext.analysis.rules.pointwise import broadcast_dims
from chanprune_ext.analysis.rules.registry import rule
from chanprune_ext.analysis.tracer import HEADS

if TYPE_CHECKING:
    from torch import Tensor

    from chanprune_ext.analysis.tracer import Tracer


@rule("aten::linalg_solve_triangular")
def solve_triangular(
    tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """(.., N, N) and (.., N, K) -> (.., N, K), or K x N with ``left=False``; K are right sides.

    The delta rule of linear attention: one system for every head and chunk of tokens.
    """
    matrix, sides = args[:2]
    batch = tuple(output.shape[:-2])
    *systems, rows, columns = broadcast_dims(tracer, [matrix], (*batch, *matrix.shape[-2:]))
    *own, first, second = broadcast_dims(tracer, [sides], (*batch, *sides.shape[-2:]))
    unknown, free = (first, second) if kwargs.get("left", True) else (second, first)
    for slots in (rows, columns, unknown):
        tracer.freeze(slots, "every unknown of a system depends on all others")
    for mine, theirs in zip(systems, own, strict=True):
        tracer.unify(mine, theirs)
    outer = [a if len(a) else b for a, b in zip(systems, own, strict=True)]
    for slots in outer:
        tracer.flag(slots, HEADS)
    inner = (unknown, free) if kwargs.get("left", True) else (free, unknown)
    tracer.set(output, [*outer, *inner])
    tracer.cost(1, *outer, unknown, unknown, free)

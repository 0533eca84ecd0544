"""Systems of equations: unknowns stay, systems and right-hand sides pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanprune_ext.analysis.rules.contraction import batched_matrices
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
    outer, system, sides = batched_matrices(tracer, args[0], args[1], output.shape[:-2])
    unknown, free = sides if kwargs.get("left", True) else reversed(sides)
    for slots in (*system, unknown):
        tracer.freeze(slots, "every unknown of a system depends on all others")
    for slots in outer:
        tracer.flag(slots, HEADS)
    tracer.set(output, [*outer, *sides])
    tracer.cost(1, *outer, unknown, unknown, free)

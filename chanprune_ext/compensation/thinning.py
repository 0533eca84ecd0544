"""How many of a feature map's positions a fit looks at."""

from __future__ import annotations

__all__ = ["thinned"]

# Positions beyond both of these are thinned out.
_SAMPLES_PER_COLUMN = 128
_ENOUGH_SAMPLES = 1 << 14


def thinned(samples: int, columns: int, axes: int) -> tuple[int, ...]:
    """Neighbouring positions see nearly the same: where there are plenty, some will do.

    Args:
        samples: Positions of all inputs together.
        columns: Unknowns per output channel.
        axes: Spatial axes.

    Returns:
        Step along each axis.
    """
    surplus = samples / max(_ENOUGH_SAMPLES, _SAMPLES_PER_COLUMN * columns)
    steps: list[int] = []
    for axes_left in range(axes, 0, -1):
        step = max(1, int(surplus ** (1 / axes_left)))
        surplus /= step
        steps.append(step)
    return tuple(steps)

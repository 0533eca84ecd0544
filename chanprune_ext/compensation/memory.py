"""How much of the work can be in memory at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch

from ..errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .survey import Survey
    from .targets import Target

__all__ = ["MemoryPlan", "plan_memory"]

_MOST_BATCH = 64  # samples that go through a network together
_LEAST_PIECE, _MOST_PIECE = 1 << 14, 1 << 20  # elements of an unfolded piece: stays in cache
_MARGIN = 1.25  # for what is alive inside a call and can't be seen from outside


@dataclass(frozen=True)
class MemoryPlan:
    """What keeps the working memory within the limit.

    Attributes:
        batch_size: Most samples that go through the networks together.
        piece: Most elements of one unfolded piece of a layer's input.
        resident_from: Call index from which on all batches can stay paused in memory together.
        cache: Bytes that may be spent on keeping one target's values before that.
        alive: Bytes of activations of all batches that are alive after each call.
    """

    batch_size: int
    piece: int
    resident_from: int
    cache: int
    alive: tuple[int, ...] = ()


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on ``device`` now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    # Pages that only cache files count as available: the kernel gives them up.
    return int(psutil.virtual_memory().available)


def plan_memory(
    surveys: tuple[Survey, Survey],
    surveyed_samples: int,
    samples: int,
    targets: Sequence[Target],
    limit: int | None,
    device: torch.device,
) -> MemoryPlan:
    """Divides the memory between paused forwards, the running one and unfolded input.

    Activations of early layers are large and quickly recomputed, those of late layers small and
    slow to recompute. So early targets are reached by running every batch anew, one at a time, and
    as soon as the activations of all batches fit together, they stay.

    Args:
        surveys: Calls of both networks.
        surveyed_samples: Samples the surveys were made with.
        samples: Calibration samples in all.
        targets: In order.
        limit: Bytes of working memory, besides the networks, the calibration data and the moments
            of one layer; None: half of what is free.
        device: Where the networks live.

    Raises:
        InvalidArgumentError: not even one sample fits.
    """
    if limit is None:
        limit = free_memory(device) // 2
    limit = int(limit)
    alive = [
        _MARGIN * sum(facts) / surveyed_samples
        for facts in zip(
            *([call.alive for call in survey.calls] for survey in surveys), strict=True
        )
    ]
    peak = max(alive)
    piece = max(_LEAST_PIECE, min(_MOST_PIECE, limit // 64))
    left = limit - 16 * piece
    if peak > left:
        raise InvalidArgumentError(
            f"memory_limit: one sample needs {int(peak + 16 * piece):,} bytes, got {limit:,}; "
            "raise the limit"
        )
    batch_size = max(1, min(_MOST_BATCH, int(limit / 8 / peak))) if peak else _MOST_BATCH
    left -= int(batch_size * peak)
    resident_from = len(alive)
    for target in reversed(targets):
        if alive[target.call] * samples > left:
            break
        resident_from = target.call
    everywhere = tuple(int(bytes_ * samples) for bytes_ in alive)
    return MemoryPlan(batch_size, piece, resident_from, cache=int(left), alive=everywhere)

"""Seeds of independent random draws, made of several small numbers."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["drawing_from", "generator_of", "mixed"]


def mixed(*numbers: int) -> int:
    """One 63-bit seed out of several small numbers, without the collisions of adding them."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def generator_of(*numbers: int) -> torch.Generator:
    """A generator of its own with that seed."""
    return torch.Generator().manual_seed(mixed(*numbers))


@contextmanager
def drawing_from(*numbers: int, gpus: Iterable[int] = ()) -> Iterator[None]:
    """Lends torch's global generator, and those of some GPUs, seeded so; puts them back after."""
    gpus = list(gpus)
    with torch.random.fork_rng(devices=gpus):
        for generator in (
            torch.default_generator,
            *(torch.cuda.default_generators[g] for g in gpus),
        ):
            generator.manual_seed(mixed(*numbers))
        yield

"""Arguments of a reconstruction, checked before anything is touched."""

from __future__ import annotations

from typing import Any

import torch

from ..compensation.checks import check_memory_limit
from ..errors import InvalidArgumentError

__all__ = ["check_options", "check_parts"]

_AMP = (None, torch.float16, torch.bfloat16)


def check_options(
    epochs: int,
    lr: float,
    batch_size: int,
    held_back: float,
    views: int,
    augment: Any,
    amp: torch.dtype | None,
    memory_limit: int | None,
    seed: int,
) -> None:
    """Refuses options out of range.

    Raises:
        InvalidArgumentError: names the option.
    """
    _check_count("epochs", epochs)
    _check_count("batch_size", batch_size)
    if not 0 < lr < 1:
        raise InvalidArgumentError(f"lr: expected a number in (0, 1), got {lr}")
    if not 0 <= held_back < 1:
        raise InvalidArgumentError(f"held_back: expected a share in [0, 1), got {held_back}")
    _check_count("seed", seed, least=0)
    _check_count("views", views, least=0)
    if (views > 0) != (augment is not None):
        raise InvalidArgumentError(
            "views: expected a number > 0 together with augment=, the function that makes views; "
            f"got views={views} and augment={augment!r}"
        )
    if amp not in _AMP:
        raise InvalidArgumentError(f"amp: expected one of {_AMP}, got {amp}")
    check_memory_limit(memory_limit)


def check_parts(tune_blocks: bool, tune_outputs: bool, output_blocks: int) -> None:
    """Refuses a reconstruction of nothing.

    Raises:
        InvalidArgumentError: names the option.
    """
    if not tune_blocks and not tune_outputs:
        raise InvalidArgumentError("tune_blocks, tune_outputs: expected at least one to be True")
    _check_count("output_blocks", output_blocks)


def _check_count(name: str, value: Any, least: int = 1) -> None:
    if not isinstance(value, int) or value < least:
        raise InvalidArgumentError(f"{name}: expected an integer >= {least}, got {value!r}")

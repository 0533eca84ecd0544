"""What a reconstruction did, block by block and as a whole."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..compensation.report import Deviation

__all__ = ["BlockReport", "ReconstructionReport"]


@dataclass(frozen=True)
class BlockReport:
    """One block.

    Errors are ``|pruned - original|^2 / |original|^2`` at the block's output on the held-back
    samples, with all earlier blocks as they were left; on the samples of the fit where none are
    held back. For ``"output"``, the last block and all that follows it tuned on the network's
    output, it is the mean KL divergence in nats where that output is a matrix of logits.

    Attributes:
        name: Its module, or the first and the last of them; or ``"output"``.
        modules: Dotted paths of its modules.
        parameters: Elements that were tuned.
        error_before: Before tuning.
        error_after: As it was left.
        steps: Optimiser steps made.
        epoch: Epoch whose weights were kept, from 1; 0 if the block was left as it was.
        kept_in_memory: Share of its samples that fitted into memory.
        seconds: Wall time.
        left: Why the block was left as it was; None if its weights changed.
    """

    name: str
    modules: tuple[str, ...]
    parameters: int = 0
    error_before: float | None = None
    error_after: float | None = None
    steps: int = 0
    epoch: int = 0
    kept_in_memory: float = 1.0
    seconds: float = 0.0
    left: str | None = None

    def __str__(self) -> str:
        if self.left is not None:
            return f"{self.name}: left as it was: {self.left}"
        return f"{self.name}: {self.error_before:.4g} -> {self.error_after:.4g}"


@dataclass(frozen=True)
class ReconstructionReport:
    """Result of :func:`chanprune_ext.reconstruction.reconstruct`.

    Attributes:
        kept: ``"reconstructed"``, or ``"before"`` if the network was left as it was.
        reason: Why, in one sentence.
        samples: Samples that were tuned on, every view of an input counted.
        held_back: Samples that judged.
        before: Deviation of the outputs before, on the held-back samples.
        after: Deviation of the outputs afterwards, whether or not it was kept.
        blocks: Every block in order, then the layers that are in none.
        seconds: Wall time of the whole.
    """

    kept: str
    reason: str
    samples: int
    held_back: int
    before: Deviation
    after: Deviation
    blocks: tuple[BlockReport, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers, ready for JSON."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def __str__(self) -> str:
        tuned = sum(block.left is None for block in self.blocks)
        lines = [
            f"reconstruction: kept {self.kept} ({self.reason})",
            f"  samples: {self.samples} tuned on, {self.held_back} held back",
            f"  blocks: {tuned} of {len(self.blocks)} tuned, {self.seconds:.1f} s",
            f"  before: {self.before}",
            f"  after: {self.after}",
        ]
        return "\n".join(lines)


def _plain(value: Any) -> Any:
    """JSON knows no tuples, no infinity and no NaN: the latter become strings."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

"""One block, from its samples to its verdict."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .matching import Matching, floating
from .objective import RelativeError, full_precision, squares
from .passages import run
from .report import BlockReport
from .tuning import DivergedError, tune
from .weights import TunedWeights, master_copies, tunable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from ..compensation.ledger import Ledger
    from .blocks import Block
    from .feed import Feed
    from .tuning import Options

__all__ = ["settled", "tune_block"]

_EQUAL = 1e-10  # relative squared error below which there is nothing to gain


def tune_block(
    block: Block,
    modules: Sequence[nn.Module],
    feeds: tuple[Feed, Feed],
    matching: Matching,
    wanted: Callable[[Tensor], bool],
    options: Options,
    ledger: Ledger,
) -> BlockReport:
    """Tunes a block, and leaves it as it was unless its error on the second feed got smaller.

    Args:
        block: The block.
        modules: Its modules in the pruned network.
        feeds: Samples to tune on and to judge by, both opened at the block.
        matching: What of the original's output to compare with.
        wanted: Whether a parameter may change.
        options: How.
        ledger: Notes every tensor before it changes.
    """
    start = time.perf_counter()
    fit, judge = feeds
    report = BlockReport(block.name, block.modules, kept_in_memory=fit.share_kept)
    before = error_of(modules, judge, matching)
    if before <= _EQUAL:
        return replace(report, error_before=before, error_after=before, left="it has no error")
    copies = master_copies(modules)
    found = tunable(modules, copies, wanted)
    if not found:
        reason = "all its parameters are frozen or shared with other parts"
        return replace(report, error_before=before, error_after=before, left=reason)
    weights = TunedWeights((copy, beside) for _, copy, beside in found)
    report = replace(report, parameters=weights.count)
    loss = RelativeError(matching(fit[i].target) for i in range(len(fit)))

    def loss_of(index: int) -> Tensor:
        inputs = fit.inputs(index).mapped(full_precision)
        with options.autocast():
            outputs = run(copies, inputs)
        return loss(floating(outputs), matching(fit[index].target))

    def judged() -> float:
        return error_of(copies, judge, matching, full_precision)

    tuned = tune(weights, len(fit), loss_of, judged, options)
    after = settled(
        [(real, copy) for real, copy, _ in found],
        before,
        lambda: error_of(modules, judge, matching),
        ledger,
    )
    return replace(
        report,
        error_before=before,
        error_after=after,
        steps=tuned.steps,
        epoch=tuned.epoch if after < before else 0,
        seconds=time.perf_counter() - start,
        left=None if after < before else "no epoch lowered its error",
    )


def settled(
    pairs: Sequence[tuple[Tensor, Tensor]],
    before: float,
    judge: Callable[[], float],
    ledger: Ledger,
) -> float:
    """Gives the network the tuned values if that lowers its error there; the error it is left with.

    The network may round them: what counts is what it computes itself.

    Args:
        pairs: The network's parameters and their tuned values.
        before: Error so far.
        judge: Error of the network as it is.
        ledger: Notes the parameters.
    """
    values = [real.detach().clone() for real, _ in pairs]
    with torch.no_grad():
        for real, tuned in pairs:
            ledger.remember(real)
            real.copy_(tuned)
        after = judge()
        if after < before:
            return after
        for (real, _), value in zip(pairs, values, strict=True):
            real.copy_(value)
    return before


def _same(tensor: Tensor) -> Tensor:
    return tensor


@torch.no_grad()
def error_of(
    modules: Sequence[nn.Module],
    feed: Feed,
    matching: Matching,
    change: Callable[[Tensor], Tensor] = _same,
) -> float:
    """Relative squared error of a block over all samples of a feed.

    Raises:
        DivergedError: A value is not finite.
    """
    total = energy = 0.0
    for i in range(len(feed)):
        outputs = run(modules, feed.inputs(i).mapped(change))
        error, scale = squares(floating(outputs), matching(feed[i].target))
        total, energy = total + float(error), energy + float(scale)
    if total != total or total == float("inf"):
        raise DivergedError("its output is not finite")
    return total / energy if energy > 0 else total

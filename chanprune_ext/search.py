"""How much can go at a tolerated loss: a search over pruned and compensated candidates."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from chanprune_ext.allocation import Budget
from chanprune_ext.compensation import compensate
from chanprune_ext.compensation.batches import ReadBatches, read_batches, split_batches
from chanprune_ext.compensation.outputs import DeviationMeter, forward, output_tensors
from chanprune_ext.criteria import score_groups
from chanprune_ext.elimination import elimination
from chanprune_ext.errors import BudgetError, InvalidArgumentError, NothingToPruneError
from chanprune_ext.module_modes import evaluating
from chanprune_ext.pruning import plan
from chanprune_ext.recovery.evaluation import device_of
from chanprune_ext.verification import input_shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

    from chanprune_ext.analysis import CouplingGroup
    from chanprune_ext.criteria import Criterion
    from chanprune_ext.plan import PruningPlan

__all__ = ["Candidate", "SearchResult", "prune_within"]

_log = logging.getLogger(__name__)
_BATCH = 64


@dataclass(frozen=True)
class Candidate:
    """One pruned and compensated network that was tried.

    Attributes:
        share: Share of the cost it was asked to keep.
        loss: What it lost: see :func:`prune_within`.
        accepted: Whether that is within the tolerance.
    """

    share: float
    loss: float
    accepted: bool


@dataclass(frozen=True)
class SearchResult:
    """The smallest network found within the tolerance.

    Attributes:
        model: The pruned and compensated network.
        plan: How it was pruned.
        loss: What it lost on the samples it was judged by.
        candidates: All that were tried, in order.
    """

    model: nn.Module
    plan: PruningPlan
    loss: float
    candidates: tuple[Candidate, ...]

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__}: lost {self.loss:.4g}, {len(self.candidates)} candidates, "
            f"{self.plan!r}>"
        )

    def __str__(self) -> str:
        lines = [
            f"  asked for x{c.share:.3f}: lost {c.loss:.4g}{'' if c.accepted else ', too much'}"
            for c in self.candidates
        ]
        plan = self.plan
        sizes = (
            f"params {plan.params_before:,} -> {plan.params_after:,}, "
            f"MACs {plan.macs_before:,} -> {plan.macs_after:,}"
        )
        return "\n".join([f"search: lost {self.loss:.4g}, {sizes}", *lines])


def prune_within(
    model: nn.Module,
    example_inputs: Any,
    batches: Any,
    *,
    tolerance: float = 0.01,
    evaluate: Callable[[nn.Module], float] | None = None,
    cost: str = "macs",
    least: float = 0.1,
    steps: int = 6,
    held_back: float = 0.25,
    criterion: str | Criterion | None = None,
    **options: Any,
) -> SearchResult:
    """Removes as much as a tolerated loss allows; no labels, no training.

    Candidates of different sizes are planned, pruned and compensated, and the smallest one whose
    loss is within the tolerance is returned; sizes are tried by bisection, since the loss grows as
    channels go. Channels are chosen by :func:`chanprune_ext.elimination` over all layers.

    The loss is measured on held-back samples of ``batches``, which take no part in choosing or
    compensating: for a classifier (one matrix of logits) the share of samples whose most likely
    class is another one than the original's, for anything else the relative squared error of the
    outputs. With ``evaluate``, it is how much lower than the original's its value is.

    Args:
        model: A trained network; left as it is.
        example_inputs: As for :func:`chanprune_ext.plan`.
        batches: Calibration data, as for :func:`chanprune_ext.compensate`.
        tolerance: The most that may be lost.
        evaluate: Quality of a network, higher is better, such as its accuracy on validation data.
        cost: What is to become small: ``"macs"`` or ``"params"``.
        least: Shares of the cost below this are not tried, in (0, 1).
        steps: Candidates to try.
        held_back: Share of the samples to judge by, in (0, 1).
        criterion: Another way of choosing channels, as for :func:`chanprune_ext.plan`.
        **options: Further arguments of :func:`chanprune_ext.plan`, but for those that say how much
            goes: that is what is searched for.

    Raises:
        InvalidArgumentError: An argument is out of range.
        NothingToPruneError: Every candidate lost more than the tolerance.
    """
    _check(tolerance, cost, least, steps, held_back)
    _check_options(options)
    inputs = input_shapes(example_inputs)
    items = read_batches(batches, model, device=device_of(model), inputs=inputs)
    data = split_batches(items, model, held_back=held_back, batch_size=_BATCH)
    if not data.held_back:
        raise InvalidArgumentError("batches: too few samples to hold any back to judge by")
    fit = ReadBatches(data.fit)
    chosen = _remembered(elimination(fit) if criterion is None else criterion)
    judge = _Judge(model, data.held_back, evaluate)
    best: tuple[nn.Module, PruningPlan, float] | None = None
    tried: list[Candidate] = []
    low, high = least, 1.0
    for _ in range(steps):
        share = (low + high) / 2
        budget = Budget(macs=share) if cost == "macs" else Budget(params=share)
        try:
            made = plan(
                model, example_inputs, budget=budget, criterion=chosen, scope="global", **options
            )
        except BudgetError:  # what cannot be taken away is all that is left
            low = share
            continue
        pruned = made.apply(model)
        compensate(pruned, model, fit, progress=False)
        loss = judge.loss(pruned)
        tried.append(Candidate(share, loss, loss <= tolerance))
        _log.info("%s x%.3f: loss %.4g, tolerated %.4g", cost, share, loss, tolerance)
        if loss <= tolerance:
            best, high = (pruned, made, loss), share
        else:
            low = share
    if best is None and not tried:
        raise NothingToPruneError(
            f"nothing was pruned: {cost} x{low:.2f} and less cannot be reached with what may be "
            f"removed; raise steps or max_ratio"
        )
    if best is None:
        smallest = min(tried, key=lambda candidate: candidate.loss)
        raise NothingToPruneError(
            f"nothing was pruned: of {len(tried)} candidates the best lost {smallest.loss:.4g} "
            f"(at {cost} x{smallest.share:.2f}) and tolerance is {tolerance:.4g}; raise tolerance, "
            f"steps, or the number of calibration samples"
        )
    return SearchResult(*best, tuple(tried))


def _check(tolerance: float, cost: str, least: float, steps: int, held_back: float) -> None:
    if not 0 <= tolerance < float("inf"):
        raise InvalidArgumentError(f"tolerance: expected a finite number >= 0, got {tolerance!r}")
    if cost not in ("macs", "params"):
        raise InvalidArgumentError(f"cost: expected 'macs' or 'params', got {cost!r}")
    if not 0 < least < 1:
        raise InvalidArgumentError(f"least: expected a share in (0, 1), got {least!r}")
    if not isinstance(steps, int) or steps < 1:
        raise InvalidArgumentError(f"steps: expected an integer >= 1, got {steps!r}")
    if not 0 < held_back < 1:
        raise InvalidArgumentError(f"held_back: expected a share in (0, 1), got {held_back!r}")


def _check_options(options: Mapping[str, Any]) -> None:
    """Arguments of a plan that the search gives itself."""
    for name in ("ratio", "threshold", "budget", "scope"):
        if name in options:
            raise InvalidArgumentError(
                f"{name}: not an argument of prune_within, which looks for the smallest budget "
                f"itself and ranks all channels together; say what may be lost with tolerance and "
                f"what to save with cost and least, or use chanprune_ext.plan"
            )


def _remembered(criterion: str | Criterion) -> Criterion:
    """A criterion that computes its scores once: they do not depend on how much goes."""
    known: list[list[np.ndarray]] = []

    def remembered(
        model: nn.Module, groups: Sequence[CouplingGroup], seed: int
    ) -> list[np.ndarray]:
        if not known:
            known.append(score_groups(model, groups, criterion, seed))
        return known[0]

    name = criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "function")
    remembered.__name__ = name
    remembered.__wrapped__ = criterion  # type: ignore[attr-defined]
    remembered.comparable = getattr(criterion, "comparable", False)  # type: ignore[attr-defined]
    return remembered


class _Judge:
    """Tells what a network has lost."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        evaluate: Callable[[nn.Module], float] | None,
    ) -> None:
        self._batches = batches
        self._evaluate = evaluate
        if evaluate is None:
            self._expected = self._outputs(model)
        else:
            self._quality = float(evaluate(model))

    @torch.no_grad()
    def _outputs(self, model: nn.Module) -> list[list[Tensor]]:
        with evaluating(model):
            return [output_tensors(forward(model, batch)) for batch in self._batches]

    def loss(self, model: nn.Module) -> float:
        if self._evaluate is not None:
            return self._quality - float(self._evaluate(model))
        found = self._outputs(model)
        if all(len(e) == 1 and e[0].ndim == 2 and e[0].shape[1] > 1 for e in self._expected):
            pairs = zip(self._expected, found, strict=True)
            changed = [e[0].argmax(1) != f[0].argmax(1) for e, f in pairs]
            return float(torch.cat(changed).float().mean())
        meter = DeviationMeter()
        for expected, mine in zip(self._expected, found, strict=True):
            meter.add(expected, mine)
        return meter.deviation().relative_l2 ** 2

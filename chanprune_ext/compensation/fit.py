"""Fits the layers of one target."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from .ledger import Ledger
from .lockstep import Lockstep, Observation
from .moments import Moments
from .report import LayerReport
from .solve import Solution, Solver, quadratic_loss
from .targets import Layer, Target

__all__ = ["FitOptions", "fit_target", "one_sided_residual", "skipped_report"]

_DEAD_SCALE = 1e-6
_RIDGE_GROWTH = 10.0
_MOST_GROWTHS = 4


@dataclass(frozen=True)
class FitOptions:
    """How layers are fitted.

    Attributes:
        ridge: Strength of the ridge, relative to the mean energy of an input column.
        one_sided_steps: Further solves where a ReLU follows.
        piece: Most elements of one unfolded piece of input.
        round_off: Relative error below which there is nothing to repair.
    """

    ridge: float
    one_sided_steps: int
    piece: int
    round_off: float


class _Error:
    """Squared errors behind the clamp that follows a target, fit and held-back batches apart."""

    def __init__(self, bounds: tuple[float, float] | None) -> None:
        self._bounds = bounds
        self._sums = {False: [0.0, 0.0], True: [0.0, 0.0]}

    def add(self, seen: Observation) -> None:
        a, b = seen.original, seen.pruned
        if self._bounds is not None:
            a, b = a.clamp(*self._bounds), b.clamp(*self._bounds)
        sums = self._sums[seen.held_back]
        sums[0] += float((a - b).square().sum(dtype=torch.float64))
        sums[1] += float(a.square().sum(dtype=torch.float64))

    @property
    def relative(self) -> float:
        """Relative error on the held-back batches, or on the others if there are none."""
        error, energy = self._sums[True] if self._sums[True][1] > 0 else self._sums[False]
        return (error / energy) ** 0.5 if energy > 0 else float(error > 0)


def one_sided_residual(
    original: Tensor, pruned: Tensor, bounds: tuple[float, float] | None
) -> Tensor:
    """What should be added to ``pruned``, if values beyond the same bound count as equal.

    Without bounds this is the difference. With them it is the difference where the original lies
    inside, and elsewhere only what lies on the inner side of the bound: the majorising quadratic of
    a convex loss, so repeated fits descend.
    """
    if bounds is None:
        return original - pruned
    low, high = bounds
    residual = torch.where(original <= low, (low - pruned).clamp(max=0), original - pruned)
    return torch.where(original >= high, (high - pruned).clamp(min=0), residual)


def skipped_report(layer: Layer, target: Target, reason: str) -> LayerReport:
    """The report of a layer that is left alone."""
    groups, rows, columns = layer.shape
    return LayerReport(
        module=layer.module,
        entry=layer.entry,
        kind=layer.kind,
        target=target.module,
        rows=groups * rows,
        columns=columns,
        skipped=reason,
    )


class _LayerFit:
    def __init__(
        self, layer: Layer, target: Target, runs: Lockstep, options: FitOptions, ledger: Ledger
    ) -> None:
        self.layer = layer
        self.target = target
        self.runs = runs
        self.options = options
        self.ledger = ledger
        live = layer.scale.abs() >= _DEAD_SCALE
        self.inverse_scale = torch.where(live, 1 / layer.scale, torch.zeros_like(layer.scale))

    def residual(self, seen: Observation, bounds: tuple[float, float] | None) -> Tensor:
        """What the layer's own output should change by."""
        residual = one_sided_residual(seen.original, seen.pruned, bounds)
        return residual * self.layer.along_channels(self.inverse_scale, residual)

    def moments(self) -> Moments:
        _, rows, columns = self.layer.shape
        return Moments(
            self.layer.geometry, columns, rows, self.layer.weight.device, self.options.piece
        )

    def run(self) -> LayerReport:
        start = time.perf_counter()
        layer, target = self.layer, self.target
        for seen in self.runs.observe(target):
            first = _Error(None)
            first.add(seen)
            if seen.inputs[layer.call] is None:
                return skipped_report(layer, target, "its input is overwritten before its target")
            if first.relative <= self.options.round_off:
                return skipped_report(layer, target, "nothing to repair")
            break

        fit, judge, before = self.moments(), self.moments(), _Error(target.bounds)
        for seen in self.runs.observe(target):
            before.add(seen)
            x = seen.inputs[layer.call]
            assert x is not None
            (judge if seen.held_back else fit).add(x, self.residual(seen, None))
        solver, change = self.least_squares(fit, judge)
        if change is None:
            return skipped_report(layer, target, "no gain on the held-back samples")

        self.ledger.remember(layer.weight, layer.bias, layer.mean)
        start_weight = layer.weight.detach().clone()
        steps, error = 0, before.relative
        one_sided = 0 if target.bounds is None else self.options.one_sided_steps
        for step in range(1 + one_sided):
            self.apply(change, 1.0)
            after = _Error(target.bounds)
            fit.clear_rows()
            last = step == one_sided
            for seen in self.runs.observe(target):
                after.add(seen)
                x = seen.inputs[layer.call]
                assert x is not None
                if not seen.held_back and not last:
                    fit.add(x, self.residual(seen, target.bounds), gram=False)
            if not after.relative < error:
                self.apply(change, -1.0)
                break
            steps, error = steps + 1, after.relative
            if not last:
                offset = (start_weight - layer.weight).double().view(layer.shape)
                change = solver.solve(fit, offset)
        groups, rows, columns = layer.shape
        return LayerReport(
            module=layer.module,
            entry=layer.entry,
            kind=layer.kind,
            target=target.module,
            rows=groups * rows,
            columns=columns,
            samples=fit.samples,
            error_before=before.relative,
            error_after=error,
            ridge=solver.ridge,
            condition=solver.condition,
            rank=solver.rank,
            steps=steps,
            seconds=time.perf_counter() - start,
            skipped=None if steps else "no gain",
        )

    def least_squares(self, fit: Moments, judge: Moments) -> tuple[Solver, Solution | None]:
        """The fit, with the ridge raised as long as the held-back samples gain by it."""
        weights = self.layer.scale.square().view(fit.row_energy.shape)
        ridge = self.options.ridge
        solver = Solver(fit, ridge, intercept=self.layer.holds_intercept)
        change = solver.solve(fit)
        if not judge.samples:
            return solver, change
        none = float((weights * judge.row_energy).sum()) / judge.samples
        loss = float((weights * quadratic_loss(judge, change)).sum())
        for _ in range(_MOST_GROWTHS):
            stiffer = Solver(
                fit, solver.ridge * _RIDGE_GROWTH, intercept=self.layer.holds_intercept
            )
            candidate = stiffer.solve(fit)
            candidate_loss = float((weights * quadratic_loss(judge, candidate)).sum())
            if not candidate_loss < loss:
                break
            solver, change, loss = stiffer, candidate, candidate_loss
        return solver, change if loss < none else None

    def apply(self, change: Solution, sign: float) -> None:
        """Adds a change to the layer, and to the values of the paused forwards."""
        layer = self.layer
        delta = sign * change.weight.reshape(layer.weight.shape)
        constant = None if change.intercept is None else sign * change.intercept.flatten()
        with torch.no_grad():
            layer.weight.copy_(layer.weight.double() + delta)
            if constant is not None and layer.bias is not None:
                layer.bias.copy_(layer.bias.double() + constant)
            elif constant is not None and layer.mean is not None:
                layer.mean.copy_(layer.mean.double() - layer.mean_sign * constant)

        def at_target(x: Tensor) -> Tensor:
            y = layer.geometry.apply(
                x, delta.to(x.dtype), None if constant is None else constant.to(x.dtype)
            )
            return y * layer.along_channels(layer.scale, y)

        self.runs.carry(self.target, layer, at_target)


def fit_target(
    target: Target, runs: Lockstep, options: FitOptions, ledger: Ledger
) -> list[LayerReport]:
    """Fits the layers of a target one after the other.

    Args:
        target: The value to match.
        runs: Both networks, from which the value is observed.
        options: How to fit.
        ledger: Notes what is changed.
    """
    reports = [_LayerFit(layer, target, runs, options, ledger).run() for layer in target.layers]
    runs.leave(target)
    return reports

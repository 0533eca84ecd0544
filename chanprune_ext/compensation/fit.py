"""Fits the layers of one target."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops.accumulation import accumulation_dtype, widened
from .linear_maps import unfolded
from .moments import Moments
from .pooled_windows import pooled_windows, windows_help
from .report import LayerReport
from .samples import Samples
from .targets import DEAD_SCALE
from .thinning import thinned

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .ledger import Ledger
    from .lockstep import Lockstep, Observation
    from .ridge import Change, Evidence, Solver
    from .targets import Layer, Target

__all__ = ["FitOptions", "fit_target", "one_sided_residual", "skipped_report"]

RIDGE_GROWTH = 10.0
MOST_RIDGE_GROWTHS = 4
LEAST_GAIN = 1e-4  # relative; a step that gains less is not kept
GAIN_TO_GO_ON = 3e-3  # a step that gains less is the last


@dataclass(frozen=True)
class FitOptions:
    """How layers are fitted.

    Attributes:
        ridge: Strength of the ridge, relative to the mean energy of an input column.
        one_sided_steps: Further solves where a ReLU follows.
        piece: Most elements of one unfolded piece of input.
        round_off: Relative error below which there is nothing to repair.
        joint_rounds: How often the layer in front of a clamp is refitted for what comes behind.
    """

    ridge: float
    one_sided_steps: int
    piece: int
    round_off: float
    joint_rounds: int = 0


class _Error:
    """Squared errors behind the clamp that follows a target, fit and held-back batches apart."""

    def __init__(self, bounds: tuple[float, float] | None) -> None:
        self._bounds = bounds
        self._sums = {False: [0.0, 0.0], True: [0.0, 0.0]}

    def add(self, original: Tensor, pruned: Tensor, *, held_back: bool) -> None:
        if self._bounds is not None:
            original, pruned = original.clamp(*self._bounds), pruned.clamp(*self._bounds)
        original, pruned = widened(original), widened(pruned)
        sums = self._sums[held_back]
        sums[0] += float((original - pruned).square().sum())
        sums[1] += float(original.square().sum())

    @property
    def relative(self) -> float:
        """Relative error on the held-back batches, or on the others if there are none."""
        error, energy = self._sums[True] if self._sums[True][1] > 0 else self._sums[False]
        return (error / energy) ** 0.5 if energy > 0 else float(error > 0)


@dataclass(frozen=True)
class _Piece:
    """Some samples: columns, and the target's value in both networks as rows.

    Attributes:
        held_back: Whether they only judge.
        columns: What the weights multiply.
        original: Rows in the original network.
        pruned: Rows in the pruned one, with the weights before the fit.
        weight: How often each sample counts.
        extra: Whether the network itself never makes these values, so that they tell no error.
    """

    held_back: bool
    columns: Tensor
    original: Tensor
    pruned: Tensor
    weight: float = 1.0
    extra: bool = False

    @property
    def bytes(self) -> int:
        """Memory of all tensors."""
        return self.columns.nbytes + self.original.nbytes + self.pruned.nbytes


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


class _Fit:
    """Fits layers whose outputs are added up into one target, in units of the target."""

    def __init__(
        self,
        layers: list[Layer],
        target: Target,
        runs: Lockstep,
        options: FitOptions,
        ledger: Ledger,
    ) -> None:
        self.layers = layers
        self.target = target
        self.runs = runs
        self.options = options
        self.ledger = ledger
        # A channel that any of the layers cannot move is left alone in all of them.
        live = torch.stack([layer.scale.abs() >= DEAD_SCALE for layer in layers]).all(0)
        self.live = live.double().view(*layers[0].shape[:2], 1)
        self.inverse_scales = [
            torch.where(live, 1 / layer.scale, torch.zeros_like(layer.scale)) for layer in layers
        ]
        self.intercept_at = next((i for i, x in enumerate(layers) if x.holds_intercept), None)
        groups, rows, _ = layers[0].shape
        self.shape = groups, rows, sum(layer.shape[2] for layer in layers)
        self.every: tuple[int, ...] = ()
        self.fit_samples = 0
        self.kept: list[_Piece] = []

    @property
    def with_windows(self) -> bool:
        """Whether averages over windows are taken for further samples."""
        few = windows_help(self.fit_samples, self.shape[2])
        return few and self.layers[0].averages is not None

    def inputs(self, seen: Observation) -> list[Tensor] | None:
        """Inputs of the layers; None if one has been overwritten."""
        found = [seen.inputs[layer.call] for layer in self.layers]
        inputs = [x for x in found if x is not None]
        return inputs if len(inputs) == len(found) else None

    def pieces(self) -> Iterator[_Piece]:
        """All samples, at the chosen positions, with the weights before the fit.

        They are looked at once for every step, so what there is room for stays unfolded.
        """
        if self.kept:
            yield from self.kept
            return
        kept: list[_Piece] = []
        room = self.runs.spare(self.target)
        for piece in self.fresh_pieces():
            room -= piece.bytes
            if room >= 0:
                kept.append(piece)
            else:
                kept.clear()
            yield piece
        self.kept = kept

    def fresh_pieces(self) -> Iterator[_Piece]:
        """The same, from what the batches show."""
        turns = {False: 0, True: 0}
        for seen in self.runs.observe(self.target):
            inputs = self.inputs(seen)
            assert inputs is not None
            dtype = accumulation_dtype(seen.pruned)
            for columns, (original, pruned) in unfolded(
                [layer.geometry for layer in self.layers],
                [x.to(dtype) for x in inputs],
                [seen.original.to(dtype), seen.pruned.to(dtype)],
                size=self.options.piece,
                every=self.every,
                turn=turns[seen.held_back],
            ):
                turns[seen.held_back] += 1
                yield _Piece(seen.held_back, columns, original, pruned)
            if seen.averaged is not None and self.with_windows and not seen.held_back:
                yield self.windows(seen, dtype)

    def windows(self, seen: Observation, dtype: torch.dtype) -> _Piece:
        """Averages over some positions where the network takes those over all."""
        assert seen.averaged is not None
        layer = self.layers[0]
        original, pruned = (x.to(dtype) for x in seen.averaged)
        parts = pooled_windows(pruned)
        return _Piece(
            held_back=False,
            columns=parts.flatten(0, 1).t().unsqueeze(0),
            original=_window_rows(
                pooled_windows(original), original, seen.original, self.runs.original_weight(layer)
            ),
            pruned=_window_rows(parts, pruned, seen.pruned, layer.weight),
            weight=1 / parts.shape[1],
            extra=True,
        )

    def residual(
        self, original: Tensor, pruned: Tensor, bounds: tuple[float, float] | None
    ) -> Tensor:
        """What the target's rows should change by."""
        return one_sided_residual(original, pruned, bounds) * self.live.to(pruned.dtype)

    def evidence(self) -> Evidence:
        """Where pieces are collected: as moments, or as they are if that is less."""
        groups, rows, columns = self.shape
        if self.fit_samples < columns and not self.with_windows:
            return Samples()
        return Moments(groups, rows, columns, self.layers[0].weight.device)

    def run(self) -> list[LayerReport]:
        start = time.perf_counter()
        reason = self.reason_to_skip()
        if reason is not None:
            return [skipped_report(layer, self.target, reason) for layer in self.layers]
        fit, judge, before = self.evidence(), self.evidence(), _Error(self.target.bounds)
        for piece in self.pieces():
            if not piece.extra:
                before.add(piece.original, piece.pruned, held_back=piece.held_back)
            residual = self.residual(piece.original, piece.pruned, None)
            (judge if piece.held_back else fit).add(piece.columns, residual, piece.weight)
        solver, change = self.least_squares(fit, judge)
        steps, error = 0, before.relative
        if change is not None:
            steps, error, change = self.descend(solver, change, fit, error)
        if not steps and self.target.bounds is not None and self.options.one_sided_steps:
            self.look_inside_bounds(fit, judge)
            solver, change = self.least_squares(fit, judge)
            if change is not None:
                steps, error, change = self.descend(solver, change, fit, error)
        if steps and change is not None:
            self.apply(change)
        rank, condition = solver.spectrum()
        seconds = time.perf_counter() - start
        return [
            replace(
                skipped_report(layer, self.target, ""),
                samples=round(fit.samples),
                error_before=before.relative,
                error_after=error,
                ridge=solver.ridge,
                condition=condition,
                rank=rank,
                steps=steps,
                seconds=seconds / len(self.layers),
                skipped=None if steps else "no gain",
            )
            for layer in self.layers
        ]

    def reason_to_skip(self) -> str | None:
        """Looks at batches until one differs: why there is nothing to do.

        Also chooses the thinning, for which batches of different sizes are all looked at.
        """
        rows = self.layers[0].weight.shape[0]
        samples, differs = 0, False
        for seen in self.runs.observe(self.target):
            if self.inputs(seen) is None:
                return "its input is overwritten before its target is complete"
            if not differs:
                difference = _Error(None)
                difference.add(seen.original, seen.pruned, held_back=False)
                differs = not difference.relative <= self.options.round_off
            positions = seen.pruned.numel() // rows
            if differs and self.runs.alike:
                samples = positions * self.runs.fit_batches
                break
            samples += 0 if seen.held_back else positions
        if not differs:
            return "nothing to repair"
        self.every = self.thinning(samples)
        return None

    def thinning(self, samples: int) -> tuple[int, ...]:
        """The step along each axis; notes how many samples that leaves."""
        steps = thinned(samples, self.shape[2], self.layers[0].geometry.axes)
        self.fit_samples = samples // math.prod(steps)
        return steps

    def look_inside_bounds(self, fit: Evidence, judge: Evidence) -> None:
        """Replaces the residual by the one-sided one, for the weights before the fit.

        Most values of a sparse activation lie far beyond its bound: a fit to all of them can be
        worse inside than none, while the one-sided one can only gain on the samples it is made of.
        """
        fit.clear_residual()
        judge.clear_residual()
        for piece in self.pieces():
            residual = self.residual(piece.original, piece.pruned, self.target.bounds)
            evidence = judge if piece.held_back else fit
            evidence.add_residual(piece.columns, residual, piece.weight)

    def least_squares(self, fit: Evidence, judge: Evidence) -> tuple[Solver, Change | None]:
        """The fit, with the ridge raised as long as the held-back samples gain by it.

        The change is None if the held-back samples are better off without any.
        """
        intercept = self.intercept_at is not None
        solver = fit.solver(self.options.ridge, intercept=intercept)
        change = solver.solve()
        if not judge.samples:
            return solver, change
        loss = judge.loss(change)
        for _ in range(MOST_RIDGE_GROWTHS):
            stiffer = fit.solver(solver.ridge * RIDGE_GROWTH, intercept=intercept)
            candidate = stiffer.solve()
            candidate_loss = judge.loss(candidate)
            if not candidate_loss < loss:
                break
            solver, change, loss = stiffer, candidate, candidate_loss
        return solver, change if loss < judge.loss(None) else None

    def descend(
        self, solver: Solver, change: Change, fit: Evidence, error: float
    ) -> tuple[int, float, Change]:
        """Goes on from the least-squares change with one-sided ones while the error shrinks.

        Returns:
            Number of changes that were worth it, the error with all of them, and their sum.
        """
        bounds = self.target.bounds
        one_sided = 0 if bounds is None else self.options.one_sided_steps
        made = change
        for step in range(1 + one_sided):
            after = _Error(bounds)
            fit.clear_residual()
            for piece in self.pieces():
                pruned = piece.pruned + change.applied(piece.columns)
                if not piece.extra:
                    after.add(piece.original, pruned, held_back=piece.held_back)
                if not piece.held_back and step < one_sided:
                    residual = self.residual(piece.original, pruned, bounds)
                    fit.add_residual(piece.columns, residual, piece.weight)
            if not after.relative < error * (1 - LEAST_GAIN):
                return step, error, made
            gain, made, error = 1 - after.relative / error, change, after.relative
            if gain < GAIN_TO_GO_ON:
                return step + 1, error, made
            if step < one_sided:
                change = made + solver.solve(made)
        return 1 + one_sided, error, made

    def apply(self, change: Change) -> None:
        """Adds a change to the layers, and to the values of the paused forwards."""
        first = 0
        for i, (layer, inverse) in enumerate(zip(self.layers, self.inverse_scales, strict=True)):
            self.ledger.remember(layer.weight, layer.bias, layer.mean)
            part = change.weight[..., first : first + layer.shape[2]]
            first += layer.shape[2]
            delta = (part * inverse.view(*layer.shape[:2], 1)).reshape(layer.weight.shape)
            constant = None
            if change.intercept is not None and i == self.intercept_at:
                constant = change.intercept.flatten() * inverse
            layer.change(delta, constant)
            self.runs.carry(self.target, layer, partial(_at_target, layer, delta, constant))


def _window_rows(parts: Tensor, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """What a linear layer makes of averages over windows, given what it makes of the whole.

    Args:
        parts: The averages over windows, ``[n, windows, channels]``.
        x: All positions, ``[n, channels, *positions]``.
        y: Output for the average over all positions, ``[n, rows]``.
        weight: ``[rows, channels]``.

    Returns:
        ``[1, rows, n * windows]``.
    """
    difference = parts - x.flatten(2).mean(2).unsqueeze(1)
    rows = y.to(x.dtype).unsqueeze(1) + difference @ weight.detach().to(x.dtype).t()
    return rows.flatten(0, 1).t().unsqueeze(0)


def _at_target(layer: Layer, delta: Tensor, constant: Tensor | None, x: Tensor) -> Tensor:
    """What a change of a layer's weights adds to its target."""
    shift = None if constant is None else constant.to(x.dtype)
    y = layer.geometry.apply(x, delta.to(x.dtype), shift)
    return y * layer.along_channels(layer.scale, y)


def fit_target(
    target: Target, runs: Lockstep, options: FitOptions, ledger: Ledger
) -> list[LayerReport]:
    """Fits the layers of a target: together where they have no groups, else one by one.

    Args:
        target: The value to match.
        runs: Both networks, from which the value is observed.
        options: How to fit.
        ledger: Notes what is changed.
    """
    together = all(layer.geometry.groups == 1 for layer in target.layers)
    bundles = [target.layers] if together else [[layer] for layer in target.layers]
    return [
        report for bundle in bundles for report in _Fit(bundle, target, runs, options, ledger).run()
    ]

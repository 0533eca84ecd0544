"""Refits a layer for what the next one makes of its output, through the clamp between them.

On its own a layer is asked for the values that its kept channels had in the original network. Once
channels are gone, other values may serve the next layer better. Where a ReLU lies between the two,
the value behind the second layer is linear in the first one's weights as long as no unit crosses
the bound, so the best change is a least-squares problem too (one Gauss-Newton step), solved by
conjugate gradients, preconditioned by the first layer's input moments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops.accumulation import accumulation_dtype
from .fit import one_sided_residual
from .linear_maps import unfolded
from .moments import Moments
from .ridge import Factor
from .thinning import thinned

if TYPE_CHECKING:
    from .fit import FitOptions
    from .ledger import Ledger
    from .lockstep import Lockstep, Segment
    from .targets import Layer, Pair

__all__ = ["refit_jointly"]

_ITERATIONS = 6  # of conjugate gradients: more fits the noise of the calibration data
_STEPS = 2  # Gauss-Newton steps on the same samples
_SHARES = (1.0, 0.5, 0.25)  # of a step that are tried
_RIDGE = 3e-3  # next to the preconditioner
_LEAST_GAIN = 1e-3  # relative; less is not worth a refit of the next layer
_ENOUGH_VALUES = 1 << 24  # between the layers: a step looks at some of the batches beyond that


class _Linearised:
    """What a change of the first layer does to the target, to first order."""

    def __init__(self, pair: Pair, dtype: torch.dtype) -> None:
        self.pair = pair
        self.shape = pair.first.weight.shape
        weight = pair.second.weight.detach()
        scale = pair.second.scale.view(-1, *[1] * (weight.ndim - 1))
        self.weight = (weight.double() * scale).to(dtype)
        self.bounds = pair.between.bounds or (-torch.inf, torch.inf)

    def first(self, x: Tensor, change: Tensor) -> Tensor:
        """What the change adds to the value between: ``change`` is ``[rows, columns + 1]``."""
        weight = change[:, :-1].reshape(self.shape)
        return self.pair.first.geometry.apply(x, weight, change[:, -1].contiguous())

    def second(self, h: Tensor) -> Tensor:
        """What a change behind the clamp adds to the target."""
        return self.pair.second.geometry.apply(h, self.weight, None)

    def open(self, between: Tensor) -> Tensor:
        """Where the clamp lets changes through."""
        return (between > self.bounds[0]) & (between < self.bounds[1])

    def exactly(self, segment: Segment, change: Tensor) -> tuple[Tensor, Tensor]:
        """The value between and the target with the change, clamp and all."""
        between = segment.between + self.first(segment.x, change)
        step = between.clamp(*self.bounds) - segment.between.clamp(*self.bounds)
        return between, segment.pruned + self.second(step)


def refit_jointly(pair: Pair, runs: Lockstep, options: FitOptions, ledger: Ledger) -> bool:
    """Refits the first layer of a pair for the target behind the second.

    Args:
        pair: Two layers with a clamp between them.
        runs: Both networks.
        options: How layers are fitted.
        ledger: Notes what is changed.

    Returns:
        Whether the layer was changed.
    """
    segments = runs.segments(pair)
    if not segments or not any(not s.held_back for s in segments):
        return False
    dtype = accumulation_dtype(segments[0].x)
    for s in segments:
        s.x, s.between, s.original, s.pruned = (
            _differentiable(t.to(dtype)) for t in (s.x, s.between, s.original, s.pruned)
        )
    map_ = _Linearised(pair, dtype)
    start = before = _error(pair, segments)
    if not start > options.round_off**2 * _energy(pair, segments):
        return False
    fit = _some([s for s in segments if not s.held_back])
    precondition = _Preconditioner(pair, fit, options.piece)
    total = segments[0].x.new_zeros(len(pair.first.weight), precondition.columns + 1)
    for _ in range(_STEPS):
        step = _gauss_newton(map_, fit, precondition)
        best: tuple[float, Tensor] | None = None
        for share in _SHARES:
            after = _error(pair, segments, map_, share * step)
            if best is None or after < best[0]:
                best = after, share * step
            else:
                break
        assert best is not None
        if not best[0] < before * (1 - _LEAST_GAIN):
            break
        before = best[0]
        total += best[1]
        for segment in segments:
            segment.between, segment.pruned = map_.exactly(segment, best[1])
    if not before < start * (1 - _LEAST_GAIN):
        return False
    _apply(pair.first, total, ledger)
    runs.replace(pair, segments)
    return True


def _differentiable(value: Tensor) -> Tensor:
    """The value, copied if it comes out of a forward in inference mode."""
    return value.clone() if value.is_inference() else value


def _channels_last(value: Tensor) -> Tensor:
    """The value in the layout in which a CPU is fastest at convolutions and their gradients."""
    if value.ndim != 4 or value.device.type != "cpu":
        return value
    return value.contiguous(memory_format=torch.channels_last)


def _some(segments: list[Segment]) -> list[Segment]:
    """All of them, or evenly spread ones where there is more than enough to see."""
    every = max(1, sum(s.between.numel() for s in segments) // _ENOUGH_VALUES)
    return segments[:: min(every, len(segments))]


def _error(
    pair: Pair,
    segments: list[Segment],
    map_: _Linearised | None = None,
    change: Tensor | None = None,
) -> float:
    """Squared error behind the target's clamp, on held-back samples where there are some."""
    bounds = pair.target.bounds or (-torch.inf, torch.inf)
    total = 0.0
    for segment in _judges(segments):
        value = segment.pruned
        if map_ is not None and change is not None:
            _, value = map_.exactly(segment, change)
        total += float((segment.original.clamp(*bounds) - value.clamp(*bounds)).square().sum())
    return total


def _energy(pair: Pair, segments: list[Segment]) -> float:
    """Squared value behind the target's clamp in the original, on the same samples."""
    bounds = pair.target.bounds or (-torch.inf, torch.inf)
    return sum(float(s.original.clamp(*bounds).square().sum()) for s in _judges(segments))


def _judges(segments: list[Segment]) -> list[Segment]:
    return [s for s in segments if s.held_back] or segments


class _Preconditioner:
    """The inverse of ``(E[x x^T] + l I)`` by row, over the gain of the second layer."""

    def __init__(self, pair: Pair, fit: list[Segment], piece: int) -> None:
        layer = pair.first
        groups, rows, columns = layer.shape
        self.columns = columns
        self.groups, self.rows = groups, rows
        samples = sum(s.between.numel() for s in fit) // (groups * rows)
        every = thinned(samples, columns, layer.geometry.axes)
        moments = Moments(groups, 0, columns + 1, layer.weight.device)
        turn = 0
        for segment in fit:
            for x, (y,) in unfolded(
                [layer.geometry], [segment.x], [segment.between], size=piece, every=every, turn=turn
            ):
                ones = torch.ones_like(x[:, :1])
                moments.add(torch.cat([x, ones], 1), y[:, :0])
                turn += 1
        gram = moments.gram / moments.samples
        energy = gram.diagonal(dim1=-2, dim2=-1)[:, :-1].mean(-1)
        self._factor = Factor(gram, energy, _RIDGE)
        weight = pair.second.weight.detach().double()
        gain = (weight * pair.second.scale.view(-1, *[1] * (weight.ndim - 1))).square()
        # One value an input channel: [groups, rows of a group, channels of a group, taps].
        parts = gain.view(pair.second.geometry.groups, -1, weight.shape[1], weight[0, 0].numel())
        by_channel = parts.sum((1, 3)).flatten()
        floor = 1e-3 * float(by_channel.mean()) + 1e-30
        self.gain = by_channel.clamp(min=floor).unsqueeze(1)

    def ridge(self, change: Tensor) -> Tensor:
        """The penalty's gradient."""
        wide = change.double().view(self.groups, self.rows, -1)
        product = (wide @ self._factor.matrix).view(change.shape)
        return (product * self.gain).to(change.dtype)

    def __call__(self, gradient: Tensor) -> Tensor:
        wide = (gradient.double() / self.gain).view(self.groups, self.rows, -1)
        return self._factor.solve(wide.mT).mT.reshape(gradient.shape).to(gradient.dtype)


def _gauss_newton(
    map_: _Linearised,
    fit: list[Segment],
    precondition: _Preconditioner,
) -> Tensor:
    """The change that explains the residual best, to first order."""
    positions = sum(s.between.numel() for s in fit) / len(precondition.gain)
    bounds = map_.pair.target.bounds
    residuals = [one_sided_residual(s.original, s.pruned, bounds) for s in fit]
    inputs = [_channels_last(s.x) for s in fit]
    gates = [_channels_last(map_.open(s.between)) for s in fit]

    def pulled_back(change: Tensor, values: list[Tensor] | None) -> Tensor:
        """``J^T`` of one value a segment; None: of what ``change`` adds, ``J change``."""
        total = torch.zeros_like(change)
        for i, (x, gate) in enumerate(zip(inputs, gates, strict=True)):
            with torch.enable_grad():
                at = change.clone().requires_grad_()
                made = map_.second(map_.first(x, at) * gate)
                value = made.detach() if values is None else _channels_last(values[i])
                total += torch.autograd.grad(made, at, value)[0]
        return total / positions

    zero = fit[0].x.new_zeros(len(map_.pair.first.weight), precondition.columns + 1)
    change = zero.clone()
    left = pulled_back(zero, residuals)
    ahead = precondition(left)
    direction, power = ahead, float((left * ahead).sum())
    for _ in range(_ITERATIONS):
        if not power > 0:
            break
        image = pulled_back(direction, None) + _RIDGE * precondition.ridge(direction)
        bend = float((direction * image).sum())
        if not bend > 0:
            break
        change = change + (power / bend) * direction
        left = left - (power / bend) * image
        ahead = precondition(left)
        power, last = float((left * ahead).sum()), power
        direction = ahead + (power / last) * direction
    if not map_.pair.first.holds_intercept:
        change[:, -1] = 0
    return change


def _apply(layer: Layer, change: Tensor, ledger: Ledger) -> None:
    ledger.remember(layer.weight, layer.bias, layer.mean)
    inverse = 1 / layer.scale
    delta = change[:, :-1].double() * inverse.unsqueeze(1)
    constant = change[:, -1].double() * inverse if layer.holds_intercept else None
    layer.change(delta.reshape(layer.weight.shape), constant)

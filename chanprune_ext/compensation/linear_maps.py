"""Convolutions and linear layers as least squares sees them: ``rows = weights @ columns``."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["CONVOLUTIONS", "LinearMap", "bound_arguments", "linear_map", "unfolded"]

CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_LINEAR_ARGUMENTS = ("input", "weight", "bias")
_ALL = (slice(None), slice(None))  # images and channels


def bound_arguments(
    names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a call by name; what was not given is absent."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(int(v) for v in value)
    return values * axes if len(values) == 1 else values


@dataclass(frozen=True)
class LinearMap:
    """The geometry of one convolution or linear call.

    Attributes:
        axes: Number of spatial axes: 1, 2 or 3 for a convolution, 0 for a linear layer.
        groups: Groups of the convolution, each a system of its own.
        kernel: Taps along each axis.
        stride: Step along each axis.
        padding: Zeros ``(before, after)`` along each axis.
        dilation: Distance of taps along each axis.
    """

    axes: int
    groups: int = 1
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()

    def channel_axis(self, ndim: int) -> int:
        """The axis of the output channels in an output of ``ndim`` axes."""
        return ndim - 1 - self.axes

    def columns(self, x: Tensor, starts: Sequence[int], every: Sequence[int]) -> Tensor:
        """What the weights multiply, ``[groups, channels per group * taps, samples]``.

        Args:
            x: Inputs ``[n, channels, *axes]``; of a linear layer ``[n, features]``.
            starts: First output position along each axis.
            every: Step from there on, along each axis.
        """
        if not self.axes:
            return x.t().unsqueeze(0)
        margins = [edge for pair in reversed(self.padding) for edge in pair]
        # Channels first: every tap is then one strided copy into a contiguous slab.
        source = (F.pad(x, margins) if any(margins) else x).transpose(0, 1)
        channels, images = source.shape[:2]
        firsts, steps, extents = [], [], []
        for axis in range(self.axes):
            reach = self.dilation[axis] * (self.kernel[axis] - 1)
            outputs = (source.shape[2 + axis] - reach - 1) // self.stride[axis] + 1
            firsts.append(starts[axis] * self.stride[axis])
            steps.append(every[axis] * self.stride[axis])
            extents.append(len(range(starts[axis], outputs, every[axis])))
        slab = x.new_empty((channels, *self.kernel, images, *extents))
        for tap in itertools.product(*(range(k) for k in self.kernel)):
            begins = [f + t * d for f, t, d in zip(firsts, tap, self.dilation, strict=True)]
            window = _ALL + tuple(
                slice(begin, begin + step * (extent - 1) + 1, step)
                for begin, step, extent in zip(begins, steps, extents, strict=True)
            )
            target = slab[:, tap[0]]
            for position in tap[1:]:
                target = target[:, position]
            target.copy_(source[window])
        per_group = channels // self.groups * math.prod(self.kernel)
        return slab.view(self.groups, per_group, images * math.prod(extents))

    def rows(self, y: Tensor, starts: Sequence[int], every: Sequence[int]) -> Tensor:
        """An output at the same positions, ``[groups, rows per group, samples]``."""
        if not self.axes:
            return y.t().unsqueeze(0)
        taken = y[_ALL + tuple(slice(a, None, n) for a, n in zip(starts, every, strict=True))]
        return taken.transpose(0, 1).reshape(self.groups, y.shape[1] // self.groups, -1)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Computes the call with other weights."""
        if not self.axes:
            return F.linear(x, weight, bias)
        if self._is_pointwise and x.ndim == self.axes + 2:
            by_position = x.movedim(1, -1)
            if by_position.is_contiguous():  # one matrix product: faster, above all its gradients
                return F.linear(by_position, weight.flatten(1), bias).movedim(-1, 1)
        margins = [edge for pair in reversed(self.padding) for edge in pair]
        if all(before == after for before, after in self.padding):
            padding = [before for before, _ in self.padding]  # without a padded copy
        else:
            x, padding = F.pad(x, margins), [0] * self.axes
        y: Tensor = _CONVOLVE[self.axes](
            x, weight, bias, self.stride, padding, self.dilation, self.groups
        )
        return y

    @property
    def _is_pointwise(self) -> bool:
        """Whether every output position is a product of the weights with one input position."""
        return (
            self.groups == 1
            and {*self.kernel, *self.stride} == {1}
            and not any(edge for pair in self.padding for edge in pair)
        )


def unfolded(
    maps: Sequence[LinearMap],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    *,
    size: int,
    every: Sequence[int] = (),
    turn: int = 0,
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Unfolds the inputs of layers whose outputs are added up, piece by piece.

    Args:
        maps: The layers; several only if none has groups.
        inputs: Their inputs.
        outputs: Tensors of their outputs' shape.
        size: Most elements that the columns of one piece should have; at least one image (for
            linear layers: one vector) is taken.
        every: Take every n-th position only, one n for each spatial axis; empty: take all. Where to
            start changes from piece to piece, so that all positions have their turn.
        turn: Number of pieces that came before.

    Yields:
        Columns ``[groups, unknowns, samples]``, those of the layers one below the other, and the
        outputs as rows ``[groups, rows per group, samples]``.
    """
    axes = maps[0].axes
    if not axes:
        inputs = [x.reshape(-1, x.shape[-1]) for x in inputs]
        outputs = [y.reshape(-1, y.shape[-1]) for y in outputs]
    elif outputs[0].ndim == axes + 1:
        inputs = [x.unsqueeze(0) for x in inputs]
        outputs = [y.unsqueeze(0) for y in outputs]
    images, extents = outputs[0].shape[0], outputs[0].shape[2:]
    every = every or (1,) * axes
    positions = math.prod(-(-e // n) for e, n in zip(extents, every, strict=True))
    unknowns = sum(x.shape[1] * math.prod(m.kernel) for m, x in zip(maps, inputs, strict=True))
    step = max(1, size // max(1, unknowns * positions))
    for first in range(0, images, step):
        piece = slice(first, first + step)
        starts = [
            min(turn // math.prod(every[:axis]) % every[axis], extents[axis] - 1)
            for axis in range(axes)
        ]
        columns = [m.columns(x[piece], starts, every) for m, x in zip(maps, inputs, strict=True)]
        yield (
            columns[0] if len(columns) == 1 else torch.cat(columns, 1),
            [maps[0].rows(y[piece], starts, every) for y in outputs],
        )
        turn += 1


def linear_map(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[LinearMap, dict[str, Any]] | None:
    """Reads a call of a convolution or linear layer.

    Args:
        name: Low-level name of the call.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        The geometry, and the arguments by name; None for any other call.
    """
    if name == "linear":
        return LinearMap(axes=0), bound_arguments(_LINEAR_ARGUMENTS, args, kwargs)
    if name not in CONVOLUTIONS:
        return None
    axes = CONVOLUTIONS[name]
    bound = bound_arguments(_CONV_ARGUMENTS, args, kwargs)
    kernel = tuple(int(k) for k in bound["weight"].shape[2:])
    dilation = _per_axis(bound.get("dilation", 1), axes)
    padding = bound.get("padding", 0)
    if padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        margins = tuple((span // 2, span - span // 2) for span in spans)
    elif padding == "valid":
        margins = ((0, 0),) * axes
    else:
        margins = tuple((p, p) for p in _per_axis(padding, axes))
    geometry = LinearMap(
        axes=axes,
        groups=int(bound.get("groups", 1)),
        kernel=kernel,
        stride=_per_axis(bound.get("stride", 1), axes),
        padding=margins,
        dilation=dilation,
    )
    return geometry, bound

"""Convolutions and linear layers as what they are to least squares: ``rows = weights @ columns``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

__all__ = ["CONVOLUTIONS", "LinearMap", "bound_arguments", "linear_map"]

CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_LINEAR_ARGUMENTS = ("input", "weight", "bias")


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

    def _batched(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if self.axes and x.ndim == self.axes + 1 else x

    def chunks(self, x: Tensor, rows: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Cuts input and output into pieces along the samples.

        Args:
            x: Input of the call.
            rows: A tensor of the output's shape.
            size: Most elements that the columns of one piece should have; at least one image
                (for a linear layer: one vector) is taken.

        Yields:
            Input and output of one piece, ``[n, channels, *axes]`` (linear: ``[n, features]``).
        """
        if not self.axes:
            x, rows = x.reshape(-1, x.shape[-1]), rows.reshape(-1, rows.shape[-1])
            per_sample = x.shape[1]
        else:
            x, rows = self._batched(x), self._batched(rows)
            per_sample = x.shape[1] * math.prod(self.kernel) * math.prod(rows.shape[2:])
        step = max(1, size // max(1, per_sample))
        for start in range(0, x.shape[0], step):
            yield x[start : start + step], rows[start : start + step]

    def columns(self, x: Tensor) -> Tensor:
        """What the weights multiply: ``[groups, channels per group * taps, samples]``.

        Args:
            x: A piece of the input, as :meth:`chunks` yields it.
        """
        if not self.axes:
            return x.t().unsqueeze(0)
        margins = [edge for pair in reversed(self.padding) for edge in pair]
        # Channels first: every tap is then one strided copy into a contiguous slab.
        source = (F.pad(x, margins) if any(margins) else x).transpose(0, 1)
        extents = [
            (source.shape[2 + a] - self.dilation[a] * (self.kernel[a] - 1) - 1) // self.stride[a]
            + 1
            for a in range(self.axes)
        ]
        channels, images = source.shape[:2]
        slab = x.new_empty((channels, *self.kernel, images, *extents))
        for tap in itertools.product(*(range(k) for k in self.kernel)):
            window = tuple(
                slice(
                    tap[a] * self.dilation[a],
                    tap[a] * self.dilation[a] + self.stride[a] * (extents[a] - 1) + 1,
                    self.stride[a],
                )
                for a in range(self.axes)
            )
            slab[(slice(None), *tap)] = source[(slice(None), slice(None), *window)]
        per_group = channels // self.groups * math.prod(self.kernel)
        return slab.view(self.groups, per_group, images * math.prod(extents))

    def rows(self, y: Tensor) -> Tensor:
        """A piece of the output (see :meth:`chunks`) as ``[groups, rows per group, samples]``."""
        if not self.axes:
            return y.t().unsqueeze(0)
        channels = y.shape[1]
        return y.transpose(0, 1).reshape(self.groups, channels // self.groups, -1)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Computes the call with other weights."""
        if not self.axes:
            return F.linear(x, weight, bias)
        margins = [edge for pair in reversed(self.padding) for edge in pair]
        padded = F.pad(x, margins) if any(margins) else x
        y: Tensor = _CONVOLVE[self.axes](
            padded, weight, bias, self.stride, 0, self.dilation, self.groups
        )
        return y


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

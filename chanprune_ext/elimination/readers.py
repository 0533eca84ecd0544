"""The layers that read coupling groups, and the second moments of what they read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..analysis.call_trace import record_calls
from ..analysis.calls import CallMode, run_model, steady_calls
from ..compensation.batches import first_samples, sample_count
from ..compensation.linear_maps import unfolded
from ..compensation.moments import Moments
from ..compensation.pooled_windows import pooled_windows, windows_help
from ..compensation.survey import survey_calls
from ..compensation.targets import DEAD_SCALE, find_targets
from ..compensation.thinning import thinned
from ..ops.accumulation import widened

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ..compensation.ledger import Ledger
    from ..compensation.targets import Layer

__all__ = ["Reader", "find_readers", "measure_readers"]

_PIECE = 1 << 22  # elements of one unfolded piece of input
_SURVEYED = 2  # samples that tell how the calls are made


@dataclass
class Reader:
    """A layer whose inputs may be pruned.

    Attributes:
        layer: The layer, and the way its output takes.
        target: Call that makes the value its output becomes a part of.
        by_channel: Whether the moments are those of single positions and not of whole windows.
        moments: Of its inputs, over the calibration data.
        energy: Mean squared value of the target around its mean, summed over channels.
    """

    layer: Layer
    target: int
    by_channel: bool
    moments: Moments
    energy: float = 0.0
    _every: tuple[int, ...] = ()
    _with_windows: bool | None = None
    _turn: int = 0
    _sums: list[Tensor] = field(default_factory=list)

    @property
    def taps(self) -> int:
        """Columns of one input channel."""
        return 1 if self.by_channel else math.prod(self.layer.geometry.kernel)

    def weights(self) -> Tensor:
        """Weights in units of the target, ``[groups, rows, columns]``, float64."""
        groups, rows, _ = self.layer.shape
        weight = self.layer.weight.detach().double()
        channels = weight.shape[1]
        scaled = weight * self.layer.scale.view(-1, *[1] * (weight.ndim - 1))
        flat = scaled.reshape(groups, rows, channels, -1)
        if self.by_channel:
            return flat.permute(0, 3, 1, 2).reshape(groups, -1, channels)
        return flat.reshape(groups, rows, -1)

    def refit(self, weights: Tensor, ledger: Ledger) -> None:
        """Replaces the layer's weights, and shifts its output so that its mean stays.

        Args:
            weights: As :meth:`weights` returns them.
            ledger: Notes what is changed.
        """
        layer = self.layer
        ledger.remember(layer.weight, layer.bias, layer.mean)
        live = layer.scale.abs() >= DEAD_SCALE
        inverse = torch.where(live, 1 / layer.scale, torch.zeros_like(layer.scale))
        difference = weights - self.weights()
        mean = self.moments.column_sum / self.moments.samples
        shift = -(difference @ mean.unsqueeze(-1)).squeeze(-1)
        groups, rows, _ = layer.shape
        if self.by_channel:
            difference = difference.reshape(groups, -1, rows, difference.shape[-1])
            difference = difference.permute(0, 2, 3, 1)
            shift = shift.reshape(groups, -1, rows).sum(1)
        delta = difference.reshape(layer.weight.shape)
        delta = delta * inverse.view(-1, *[1] * (delta.ndim - 1))
        layer.change(delta, shift.flatten() * inverse if layer.holds_intercept else None)

    def see_layer(self, x: Tensor, y: Tensor, batches: float) -> None:
        """Adds what the layer reads in a batch; in all there are ``batches`` times as many samples.

        The first batch decides how many positions are looked at.
        """
        geometry = self.layer.geometry
        x = widened(x)
        columns = self.moments.gram.shape[-1]
        if not self._every:
            value = x if self.by_channel else y
            axis = geometry.channel_axis(value.ndim)
            samples = round(value.numel() // value.shape[axis] * batches)
            self._every = thinned(samples, columns, geometry.axes)
        if self.by_channel:
            steps = tuple(slice(self._turn % n, None, n) for n in self._every)
            pixels = x[(slice(None),) * (x.ndim - len(steps)) + steps]
            axis = geometry.channel_axis(pixels.ndim)
            flat = pixels.transpose(0, axis).reshape(geometry.groups, columns, -1)
            self.moments.add(flat, flat[:, :0])
            self._turn += 1
            return
        for piece, rows in unfolded(
            [geometry], [x], [y], size=_PIECE, every=self._every, turn=self._turn
        ):
            self.moments.add(piece, rows[0][:, :0])
            self._turn += 1

    def see_averaged(self, x: Tensor, batches: float) -> None:
        """Adds averages over some positions, where the layer reads the average over all.

        Whether they are taken is decided by the first batch, as in :meth:`see_layer`.
        """
        if self._with_windows is None:
            self._with_windows = windows_help(round(x.shape[0] * batches), x.shape[1])
        if not self._with_windows:
            return
        parts = pooled_windows(widened(x))
        columns = parts.flatten(0, 1).t().unsqueeze(0)
        self.moments.add(columns, columns[:, :0], weight=1 / parts.shape[1])

    def see_target(self, value: Tensor) -> None:
        """Adds the value that the layer's output is a part of."""
        axis = self.layer.geometry.channel_axis(value.ndim)
        flat = value.transpose(0, axis).reshape(value.shape[axis], -1).double()
        sums = [flat.new_tensor(flat.shape[1]), flat.sum(1), flat.square().sum(1)]
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums

    def settle(self) -> None:
        """Computes the energy from what was added."""
        count, total, squares = self._sums
        self.energy = float((squares / count - (total / count).square()).clamp(min=0).sum())
        self._sums = []


class _Collecting(CallMode):
    def __init__(self, readers: Iterable[Reader], batches: float) -> None:
        super().__init__()
        self._batches = batches
        self._at_layer: dict[int, list[Reader]] = {}
        self._at_target: dict[int, list[Reader]] = {}
        self._at_average: dict[int, list[Reader]] = {}
        for reader in readers:
            if reader.layer.averages is not None:
                self._at_average.setdefault(reader.layer.averages, []).append(reader)
            self._at_layer.setdefault(reader.layer.call, []).append(reader)
            self._at_target.setdefault(reader.target, []).append(reader)

    def after(
        self, index: int, _: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        for reader in self._at_layer.get(index, ()):
            reader.see_layer(args[0] if args else kwargs["input"], output, self._batches)
        for reader in self._at_target.get(index, ()):
            reader.see_target(output)
        for reader in self._at_average.get(index, ()):
            reader.see_averaged(args[0], self._batches)
        return output


def find_readers(
    model: nn.Module, batch: Any, windows: Mapping[str, bool], most_columns: int
) -> dict[str, Reader]:
    """The layers, by the entry of their weight, that least squares can refit.

    Args:
        model: Network, left as it is.
        batch: Some inputs.
        windows: Weights whose inputs may be pruned -> whether to look at whole windows.
        most_columns: Windows with more columns are looked at position by position all the same.
    """
    few = first_samples(batch, _SURVEYED, model)
    with steady_calls(model), torch.no_grad():
        targets, _ = find_targets(record_calls(model, few), survey_calls(model, few), {})
    readers: dict[str, Reader] = {}
    for target in targets:
        for layer in target.layers:
            if layer.entry not in windows:
                continue
            groups, _, columns = layer.shape
            by_channel = columns > most_columns or not windows[layer.entry]
            if by_channel:
                columns //= math.prod(layer.geometry.kernel)
            moments = Moments(groups, 0, columns, layer.weight.device)
            readers[layer.entry] = Reader(layer, target.call, by_channel, moments)
    return readers


def measure_readers(
    model: nn.Module, readers: Mapping[str, Reader], batches: Sequence[Any]
) -> None:
    """Runs the network over the data once and adds up all moments."""
    samples = sum(sample_count(batch) for batch in batches)
    with steady_calls(model), torch.no_grad():
        for batch in batches:
            with _Collecting(readers.values(), samples / sample_count(batch)):
                run_model(model, batch)
    for reader in readers.values():
        reader.settle()

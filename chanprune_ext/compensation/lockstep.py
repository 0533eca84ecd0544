"""Original and pruned network on the same batches, held at the same call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..analysis.calls import tensors_in
from .batches import sample_count
from .outputs import forward_failed
from .paused_runs import PausedRun

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .memory import MemoryPlan
    from .targets import Layer, Pair, Target

__all__ = ["Lockstep", "Observation", "Segment"]

# Large feature maps have positions enough in so many samples, and so many bytes of them.
_LEAST_SAMPLES = 128
_ENOUGH_BYTES = 1 << 30
_ENOUGH_TO_REFIT = 1 << 25  # values between two layers that are refitted jointly


@dataclass
class Observation:
    """What one batch shows at a target.

    Attributes:
        original: The target's value in the original network at the kept channels, and multiplied
            where the plan has multiplied weights.
        pruned: Its value in the pruned network with the current weights.
        inputs: Call index of a layer -> its input in the pruned network; None where that has been
            overwritten since.
        held_back: Whether the batch only judges and takes no part in the fit.
        averaged: What is averaged over all positions in front of the layer, in the original and in
            the pruned network; None where nothing is, or where it has been overwritten since.
    """

    original: Tensor
    pruned: Tensor
    inputs: dict[int, Tensor | None]
    held_back: bool
    averaged: tuple[Tensor, Tensor] | None = None

    @property
    def bytes(self) -> int:
        """Memory of all tensors."""
        tensors = [self.original, self.pruned, *self.inputs.values(), *(self.averaged or ())]
        return sum(t.nbytes for t in tensors if t is not None)


@dataclass
class Segment:
    """What one batch shows between two layers and behind them.

    Attributes:
        x: Input of the first layer in the pruned network.
        between: The first layer's target in the pruned network, before it is clamped.
        original: The second layer's target in the original network, at the kept channels.
        pruned: The same value in the pruned network.
        held_back: Whether the batch only judges.
    """

    x: Tensor
    between: Tensor
    original: Tensor
    pruned: Tensor
    held_back: bool


class Lockstep:
    """Pairs of forwards, one pair a batch.

    Pairs either *stay*, paused from target to target with their activations in memory, or, for
    targets before ``memory.resident_from``, are run anew up to the target and dropped again. There
    as many batches are looked at as fit into ``memory.cache``, at least 128 samples; these are run
    at every look if they do not fit.

    Both networks must be in eval mode. Use as a context manager.

    Attributes:
        fit_batches: Number of batches that take part in the fit.
        alike: Whether all batches are of one size, up to the number of samples.

    Args:
        original: Network before pruning.
        pruned: Network after pruning; its weights may change while a pair is paused.
        fit: Inputs of the batches to fit on.
        held_back: Inputs of the batches to judge by.
        names: The calls that both networks make.
        targets: All targets, in order.
        memory: From which target on the pairs stay, and how much may be kept.
        device: Where the networks live.
    """

    def __init__(
        self,
        original: nn.Module,
        pruned: nn.Module,
        fit: Sequence[Any],
        held_back: Sequence[Any],
        names: Sequence[str],
        targets: Sequence[Target],
        memory: MemoryPlan,
        device: torch.device,
    ) -> None:
        self._original = original
        self._original_state: dict[str, Tensor] = original.state_dict()
        self._pruned = pruned
        self.fit_batches = len(fit)
        self._batches = [(x, False) for x in fit] + [(x, True) for x in held_back]
        shapes = {tuple(t.shape[1:] for t in tensors_in(x)) for x, _ in self._batches}
        self.alike = len(shapes) == 1
        self._names = names
        self._targets = targets
        self._resident_from = memory.resident_from
        self._cache = memory.cache
        self._alive = memory.alive
        self._seen: list[Observation] = []
        self._device = device
        self._resident: list[tuple[PausedRun, PausedRun]] | None = None
        self._at: int | None = None
        self._values: list[tuple[Tensor, Tensor]] = []
        self._between: dict[int, list[Tensor]] = {}

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(self, *_: object) -> None:
        for pair in self._resident or []:
            for run in pair:
                run.close()

    def _pair(self, batch: int, targets: Sequence[Target]) -> tuple[PausedRun, PausedRun]:
        inputs = self._batches[batch][0]
        layers = [layer for target in targets for layer in target.layers]
        averages = {layer.averages for layer in layers if layer.averages is not None}
        captures = {layer.call for layer in layers} | averages
        return (
            PausedRun(self._original, inputs, self._names, averages, self._device),
            PausedRun(self._pruned, inputs, self._names, captures, self._device),
        )

    def _advance(self, batch: int, pair: tuple[PausedRun, PausedRun], call: int) -> Any:
        try:
            return pair[0].advance(call), pair[1].advance(call)
        except Exception as error:
            raise forward_failed(self._batches[batch][0], error) from error

    def observe(self, target: Target) -> Iterator[Observation]:
        """The batches at ``target``, one after the other. May be repeated."""
        if target.call < self._resident_from:
            yield from self._seen or self._observe_anew(target)
            return
        if self._resident is None:
            staying = [t for t in self._targets if t.call >= target.call]
            self._resident = [self._pair(batch, staying) for batch in range(len(self._batches))]
        if self._at != target.call:
            self._values = [
                self._advance(batch, pair, target.call) for batch, pair in enumerate(self._resident)
            ]
            self._at = target.call
        for batch, (_, held_back) in enumerate(self._batches):
            yield self._observation(target, self._resident[batch], *self._values[batch], held_back)

    def spare(self, target: Target) -> int:
        """Bytes that may be spent at ``target`` beside what the pairs keep themselves.

        Before the pairs stay, none until what they show has been kept once.
        """
        if target.call < self._resident_from:
            kept = [seen.bytes for seen in self._seen]
            return self._cache - sum(kept) if kept else 0
        between = (t.nbytes for ts in self._between.values() for t in ts)
        return min(_ENOUGH_BYTES, self._cache - self._alive[target.call] - sum(between))

    def _observe_anew(self, target: Target) -> Iterator[Observation]:
        """Runs pairs up to ``target``, as many as can be kept, but not too few of them."""
        kept: list[Observation] | None = []
        size = samples = 0
        for batch in self._evenly():
            inputs, held_back = self._batches[batch]
            pair = self._pair(batch, [target])
            try:
                original, pruned = self._advance(batch, pair, target.call)
                seen = self._observation(target, pair, original, pruned, held_back)
            finally:
                for run in pair:
                    run.close()
            size += seen.bytes
            if samples >= _LEAST_SAMPLES and size > min(self._cache, _ENOUGH_BYTES):
                break
            if size > self._cache:
                kept = None
            if kept is not None:
                kept.append(seen)
            samples += sample_count(inputs)
            yield seen
        self._seen = kept or []

    def _observation(
        self,
        target: Target,
        pair: tuple[PausedRun, PausedRun],
        original: Tensor,
        pruned: Tensor,
        held_back: bool,
    ) -> Observation:
        first = target.layers[0]
        original = first.expected(original)
        inputs = {layer.call: pair[1].captured_input(layer.call) for layer in target.layers}
        averaged = None
        if first.averages is not None:
            found = [run.captured_input(first.averages) for run in pair]
            averaged = None if found[0] is None or found[1] is None else (found[0], found[1])
        return Observation(original, pruned, inputs, held_back, averaged)

    def original_weight(self, layer: Layer) -> Tensor:
        """The weight that makes, from the original's inputs, what the layer should compute."""
        return layer.expected_weight(self._original_state[layer.entry])

    def segments(self, pair: Pair) -> list[Segment]:
        """What the batches show of two layers in a row; empty where it can't be had.

        Paused forwards show all of it, if :meth:`leave` was told to keep what lies between.
        Otherwise as many batches as fit into the cache are run anew.
        """
        kept = self._between.get(pair.between.call)
        if kept is None:
            return self._segments_anew(pair)
        assert self._resident is not None
        found = []
        for batch, seen in enumerate(self.observe(pair.target)):
            x = self._resident[batch][1].captured_input(pair.first.call)
            if x is None or seen.inputs[pair.second.call] is None:
                return []
            found.append(Segment(x, kept[batch], seen.original, seen.pruned, seen.held_back))
        return found

    def _segments_anew(self, pair: Pair) -> list[Segment]:
        found: list[Segment] = []
        left, values = self._cache // 2, 0
        for batch in self._evenly():
            runs = self._pair(batch, [pair.between, pair.target])
            try:
                between = runs[1].advance(pair.between.call).clone()
                original, pruned = self._advance(batch, runs, pair.target.call)
                seen = self._observation(
                    pair.target, runs, original, pruned, self._batches[batch][1]
                )
                x = runs[1].captured_input(pair.first.call)
            finally:
                for run in runs:
                    run.close()
            if x is None:
                return []
            left -= sum(t.nbytes for t in (x, between, original, pruned))
            values += between.numel()
            full = left < 0 or values > _ENOUGH_TO_REFIT
            if full and seen.held_back in {segment.held_back for segment in found}:
                break
            found.append(Segment(x, between, seen.original, seen.pruned, seen.held_back))
        return found

    def _evenly(self) -> list[int]:
        """Batches in an order in which any first part has its share of held-back ones."""
        places = []
        for held_back in (True, False):
            those = [b for b, (_, judges) in enumerate(self._batches) if judges == held_back]
            places += [((i + 0.5 * (not held_back)) / len(those), b) for i, b in enumerate(those)]
        return [batch for _, batch in sorted(places)]

    def replace(self, pair: Pair, segments: Sequence[Segment]) -> None:
        """Lets the forwards go on with what the first layer's new weights give.

        Args:
            pair: Two layers whose first was changed.
            segments: As :meth:`segments` returned them, with the new values.
        """
        if pair.between.call not in self._between:
            self._rewind()
            return
        assert self._resident is not None
        low, high = pair.between.bounds or (None, None)
        for segment, (_, run), (_, value) in zip(
            segments, self._resident, self._values, strict=True
        ):
            read = run.captured_input(pair.second.call)
            assert read is not None
            with torch.inference_mode(value.is_inference()):
                read.copy_(segment.between.clamp(low, high))
                value.copy_(segment.pruned)
            run.refresh(pair.second.call)
        self._between[pair.between.call] = [segment.between for segment in segments]

    def _rewind(self) -> None:
        """Forgets all paused forwards: a layer they have passed has changed."""
        for pair in self._resident or []:
            for run in pair:
                run.close()
        self._resident = None
        self._at = None
        self._values = []
        self._seen = []
        self._between = {}

    def carry(self, target: Target, layer: Layer, change: Callable[[Tensor], Tensor]) -> None:
        """Lets paused forwards go on with what a layer's new weights would have given.

        Args:
            target: Where the forwards are paused.
            layer: The layer whose weights were changed.
            change: Input of the layer -> change of the target's value.
        """
        places = [(seen.inputs[layer.call], seen.pruned) for seen in self._seen]
        if target.call >= self._resident_from and self._resident is not None:
            places = [
                (run.captured_input(layer.call), value)
                for (_, run), (_, value) in zip(self._resident, self._values, strict=True)
            ]
        for x, value in places:
            if x is not None:
                with torch.inference_mode(value.is_inference()):
                    value.add_(change(x).to(value.dtype))

    def leave(self, target: Target, *, keep: bool = False, pair: Pair | None = None) -> None:
        """Lets go of what was kept for ``target``.

        Args:
            target: Where the forwards are paused.
            keep: Whether to keep the value and the inputs of its layers for the layer behind it.
            pair: The pair that ends here; what was kept for it goes too.
        """
        if keep and self._at == target.call:
            self._between[target.call] = [value.clone() for _, value in self._values]
        done = [] if keep and self._at == target.call else target.layers
        if pair is not None:
            self._between.pop(pair.between.call, None)
            done = [*done, pair.first]
        for original, run in self._resident or []:
            for layer in done:
                run.release(layer.call)
                if layer.averages is not None:
                    run.release(layer.averages)
                    original.release(layer.averages)
        self._values = []
        self._seen = []
        self._at = None

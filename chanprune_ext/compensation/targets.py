"""Which layers are fitted, and to which value of the original network.

From the output of a convolution or linear layer the value is followed forwards as long as nothing
but per-channel affine steps happen to it: a batch norm in eval mode, adding something else to it,
dropout. Where that ends is the layer's *target*: two networks agree there if the layer's output is
shifted by the difference divided by the scale on the way. For the last convolution of a residual
block this is the value after the skip has been added, so that the layer also repairs what arrives
through the skip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .linear_maps import LinearMap, bound_arguments, linear_map
from .pooled_windows import averaging_call
from .survey import Activation, CallFacts, Survey

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..analysis.call_trace import Call, CallTrace
    from ..analysis.scales import Rescaling

__all__ = ["DEAD_SCALE", "Layer", "Pair", "Skipped", "Target", "find_targets"]

_PASSED_ON = {"dropout", "dropout_", "feature_dropout", "feature_dropout_", "contiguous"}
_SUMS = {"add": 1.0, "add_": 1.0, "sub": -1.0, "sub_": -1.0}
_BATCH_NORM = (
    "input",
    "weight",
    "bias",
    "running_mean",
    "running_var",
    "training",
    "momentum",
    "eps",
    "cudnn_enabled",
)
# Linear in a weight, but not of the form that is fitted.
_UNFITTED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "bilinear", "addmm")
_CLAMPS = ("relu", "relu6", "hardtanh")
DEAD_SCALE = 1e-6


@dataclass
class Layer:
    """A layer that can be fitted.

    Attributes:
        call: Index of its call.
        module: Dotted path of the module that makes the call.
        entry: State-dict entry of its weight.
        kind: Such as ``"conv2d"``, ``"depthwise conv2d"``, ``"linear"``.
        geometry: Shape of the linear map.
        weight: The pruned network's weight.
        bias: Its bias, if it has one.
        scale: What a change of the layer's output is multiplied by on the way to the target,
            one factor a channel, float64.
        mean: Running mean of the first batch norm on the way, which can hold an intercept.
        mean_sign: Sign with which the layer's output reaches that batch norm.
        kept_rows: Kept output channels as indices into the original's; None: all of them.
        factor: What the plan has multiplied the output by, one factor a channel, float64, so that a
            constant behind it that follows a width keeps its effect; None: nothing.
        inputs_pruned: Whether input channels were removed.
        reads: Call that makes the value whose clamped form this layer alone reads; None if there
            is none.
        averages: Call that averages over all positions what this linear layer reads; None if none
            does, or if something is added to the layer's output.
    """

    call: int
    module: str
    entry: str
    kind: str
    geometry: LinearMap
    weight: Tensor
    bias: Tensor | None
    scale: Tensor
    mean: Tensor | None
    mean_sign: float
    kept_rows: Tensor | None
    inputs_pruned: bool
    reads: int | None = None
    averages: int | None = None
    factor: Tensor | None = None

    @property
    def holds_intercept(self) -> bool:
        """Whether a constant can be added to the layer's output."""
        return self.bias is not None or self.mean is not None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups, rows per group, columns per group."""
        groups = self.geometry.groups
        return groups, self.weight.shape[0] // groups, self.weight[0].numel()

    def change(self, delta: Tensor, constant: Tensor | None) -> None:
        """Adds to the weight, and a constant to the output: in the bias, or behind it in the mean.

        Args:
            delta: Of the weight's shape.
            constant: One value a channel; None adds nothing.
        """
        with torch.no_grad():
            self.weight.copy_(self.weight.double() + delta)
            if constant is None:
                return
            if self.bias is not None:
                self.bias.copy_(self.bias.double() + constant)
            elif self.mean is not None:
                self.mean.copy_(self.mean.double() - self.mean_sign * constant)

    def along_channels(self, values: Tensor, like: Tensor) -> Tensor:
        """Shapes one value a channel for broadcasting against an output of the layer."""
        shape = [1] * like.ndim
        shape[self.geometry.channel_axis(like.ndim)] = -1
        return values.to(like).view(shape)

    def expected(self, original: Tensor) -> Tensor:
        """What the pruned network should compute where the original computes ``original``.

        Args:
            original: The layer's output, or its target.
        """
        if self.kept_rows is not None:
            original = original.index_select(
                self.geometry.channel_axis(original.ndim), self.kept_rows
            )
        if self.factor is None:
            return original
        return original * self.along_channels(self.factor, original)

    def expected_weight(self, original: Tensor) -> Tensor:
        """The weight that gives this, from the original's inputs."""
        weight = original if self.kept_rows is None else original[self.kept_rows]
        if self.factor is None:
            return weight
        return weight * self.factor.to(weight).view(-1, *[1] * (weight.ndim - 1))


@dataclass
class Target:
    """A value at which the two networks are compared, and the layers that aim at it.

    Attributes:
        call: Index of the call that makes the value.
        module: Module that makes the call.
        layers: In the order of their calls.
        bounds: Limits that the only reader clamps the value to (a ReLU: 0 and infinity); None
            where something else reads it.
        is_output: Whether the model returns the value.
    """

    call: int
    module: str
    layers: list[Layer] = field(default_factory=list)
    bounds: tuple[float, float] | None = None
    is_output: bool = False


@dataclass(frozen=True)
class Pair:
    """A layer, the clamp behind it, and the layer that alone reads what comes through.

    Attributes:
        first: The layer that is refitted.
        between: Its target, whose bounds are the clamp's.
        second: The layer behind the clamp.
        target: The value that is matched.
    """

    first: Layer
    between: Target
    second: Layer
    target: Target


@dataclass(frozen=True)
class Skipped:
    """A layer that is left alone, and why."""

    module: str
    entry: str
    kind: str
    reason: str


@dataclass
class _Path:
    """Where a layer's output leads, step by step."""

    value: int
    call: int
    module: str
    sign: float = 1.0
    scale: Tensor | None = None
    factor: Tensor | None = None
    mean: Tensor | None = None
    mean_sign: float = 1.0


class _Finder:
    def __init__(
        self,
        trace: CallTrace,
        survey: Survey,
        kept: Mapping[str, Mapping[int, Tensor]],
        rescalings: Sequence[Rescaling],
    ):
        self.trace = trace
        self.survey = survey
        self.kept = kept
        self.rescalings = rescalings
        self.readers = trace.consumers()
        self.makers = trace.producer()
        self.entry_reads: dict[str, int] = {}
        for call in trace.calls:
            for value in dict.fromkeys(call.inputs):
                entry = call.parameters.get(value)
                if entry is not None:
                    self.entry_reads[entry] = self.entry_reads.get(entry, 0) + 1

    def entry_of(self, tensor: Any) -> str | None:
        return self.survey.entries.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def layer(self, call: Call) -> tuple[Layer, _Path] | Skipped | None:
        facts = self.survey.calls[call.index]
        if facts.name in _UNFITTED and call.parameters:
            first = next(iter(call.parameters.values()))
            return Skipped(call.module, first, facts.name, f"{facts.name} is not fitted")
        found = linear_map(facts.name, facts.args, facts.kwargs)
        if found is None:
            return None
        geometry, bound = found
        weight, bias = bound["weight"], bound.get("bias")
        kind = _kind(facts.name, geometry, weight)
        entry = self.entry_of(weight)
        if entry is None:
            return Skipped(call.module, "", kind, "its weight is computed, not a parameter")
        if not weight.is_floating_point():
            return Skipped(call.module, entry, kind, f"its weight is {weight.dtype}")
        if self.entry_reads.get(entry, 0) != 1:
            return Skipped(call.module, entry, kind, "its weight is used by several calls")
        if isinstance(bias, Activation):
            return Skipped(call.module, entry, kind, "its bias is computed, not a parameter")
        bias_entry = self.entry_of(bias)
        if bias_entry is not None and self.entry_reads.get(bias_entry, 0) != 1:
            return Skipped(call.module, entry, kind, "its bias is used by several calls")
        if any(r.entry == entry and r.dim != 0 for r in self.rescalings):
            return Skipped(call.module, entry, kind, "the plan has multiplied its inputs' weights")
        path = self.follow(call, geometry, facts)
        factor = self.factor(entry, weight) if path.factor is None else path.factor
        changed = self.kept.get(entry, {})
        rows = weight.shape[0]
        scale = torch.full((rows,), path.sign, dtype=torch.float64, device=weight.device)
        layer = Layer(
            call=call.index,
            module=call.module,
            entry=entry,
            kind=kind,
            geometry=geometry,
            weight=weight,
            bias=bias,
            scale=scale if path.scale is None else scale * path.scale,
            mean=None if bias is not None else path.mean,
            mean_sign=path.mean_sign,
            kept_rows=changed[0].to(weight.device) if 0 in changed else None,
            inputs_pruned=1 in changed,
            reads=self.clamped(call),
            averages=self.averaging(call) if path.call == call.index else None,
            factor=factor,
        )
        return layer, path

    def factor(self, entry: str | None, parameter: Tensor) -> Tensor | None:
        """What the plan has multiplied the rows of a parameter by."""
        found = [r for r in self.rescalings if r.entry == entry and r.dim == 0]
        if entry is None or not found:
            return None
        rows = self.kept.get(entry, {}).get(0)
        rows = torch.arange(len(parameter), device="cpu") if rows is None else rows.cpu()
        factor = torch.ones(len(parameter), dtype=torch.float64, device="cpu")
        for rescaling in found:
            factor[torch.isin(rows, rescaling.indices.cpu())] = rescaling.factor
        return factor.to(parameter.device)

    def averaging(self, call: Call) -> int | None:
        """The call that averages over all positions what the linear layer ``call`` reads."""
        facts = self.survey.calls
        if facts[call.index].name != "linear":
            return None
        return averaging_call(call, self.makers, self.trace.calls, facts)

    def clamped(self, call: Call) -> int | None:
        """The call whose output reaches ``call``, and nothing else, through a clamp."""
        maker = self.makers.get(call.inputs[0])
        if maker is None or self.readers[call.inputs[0]] != [call.index]:
            return None
        clamp = self.trace.calls[maker]
        if clamp.name.rstrip("_") not in _CLAMPS or len(clamp.inputs) != 1:
            return None
        return self.makers.get(clamp.inputs[0])

    def follow(self, call: Call, geometry: LinearMap, facts: CallFacts) -> _Path:
        shape = facts.output_shape
        path = _Path(value=call.outputs[0], call=call.index, module=call.module)
        while path.value not in self.trace.output_values:
            readers = self.readers.get(path.value, [])
            if len(readers) != 1:
                break
            reader = self.trace.calls[readers[0]]
            if reader.inputs.count(path.value) != 1 or len(reader.outputs) != 1:
                break
            reads = self.survey.calls[reader.index]
            if reads.output_shape != shape or not self.step(path, reader, reads, geometry):
                break
            path.value, path.call, path.module = reader.outputs[0], reader.index, reader.module
        return path

    def step(self, path: _Path, reader: Call, facts: CallFacts, geometry: LinearMap) -> bool:
        """Takes a per-channel affine step; False if the call is anything else."""
        if facts.name in _PASSED_ON:
            return facts.name == "contiguous" or not facts.drops
        if facts.name in _SUMS:
            if facts.kwargs.get("alpha", 1) != 1 or len(facts.args) > 2:
                return False
            if reader.inputs.index(path.value) == 1 or not isinstance(facts.args[0], Activation):
                path.sign *= _SUMS[facts.name]
            return True
        return facts.name == "batch_norm" and self.batch_norm(path, reader, facts, geometry)

    def batch_norm(self, path: _Path, reader: Call, facts: CallFacts, geometry: LinearMap) -> bool:
        bound = bound_arguments(_BATCH_NORM, facts.args, facts.kwargs)
        mean, variance = bound["running_mean"], bound["running_var"]
        shape = facts.output_shape or ()
        if (
            bound["training"]
            or not isinstance(mean, Tensor)
            or not isinstance(variance, Tensor)
            or isinstance(bound["weight"], Activation)
            or reader.inputs[0] != path.value
            or geometry.channel_axis(len(shape)) != 1
        ):
            return False
        factor = (variance.detach().double() + bound["eps"]).rsqrt()
        if bound["weight"] is not None:
            factor = factor * bound["weight"].detach().double()
            # Only a norm whose input is not multiplied can be: it starts anew.
            path.factor = self.factor(self.entry_of(bound["weight"]), bound["weight"])
        entry = self.entry_of(mean)
        if path.scale is None and entry is not None and self.entry_reads.get(entry, 0) == 1:
            path.mean, path.mean_sign = mean, path.sign
        path.scale = factor if path.scale is None else path.scale * factor
        return True

    def bounds(self, value: int) -> tuple[float, float] | None:
        """Limits that the only reader of a value clamps it to."""
        readers = self.readers.get(value, [])
        if len(readers) != 1 or value in self.trace.output_values:
            return None
        facts = self.survey.calls[readers[0]]
        name = facts.name.rstrip("_")
        if name == "relu":
            return 0.0, math.inf
        if name == "relu6":
            return 0.0, 6.0
        if name == "hardtanh":
            bound = bound_arguments(("input", "min_val", "max_val"), facts.args, facts.kwargs)
            return float(bound.get("min_val", -1)), float(bound.get("max_val", 1))
        return None


def _kind(name: str, geometry: LinearMap, weight: Any) -> str:
    if geometry.groups == 1:
        return name
    return f"{'depthwise' if weight.shape[1] == 1 else 'grouped'} {name}"


def find_targets(
    trace: CallTrace,
    survey: Survey,
    kept: Mapping[str, Mapping[int, Tensor]],
    rescalings: Sequence[Rescaling] = (),
) -> tuple[list[Target], list[Skipped]]:
    """Finds every layer that can be fitted and the value it aims at.

    Args:
        trace: Calls of the original network.
        survey: Calls of the pruned network: the same calls, with its own parameters.
        kept: State-dict entry -> axis -> kept indices.
        rescalings: What of the pruned network's parameters has been multiplied.

    Returns:
        Targets in the order in which a forward reaches them, and the layers left alone.
    """
    finder = _Finder(trace, survey, kept, rescalings)
    targets: dict[int, Target] = {}
    skipped: list[Skipped] = []
    for call in trace.calls:
        found = finder.layer(call)
        if isinstance(found, Skipped):
            skipped.append(found)
        elif found is not None:
            layer, path = found
            if bool((layer.scale.abs() < DEAD_SCALE).all()):
                skipped.append(
                    Skipped(layer.module, layer.entry, layer.kind, "its output is scaled to zero")
                )
                continue
            target = targets.setdefault(path.call, Target(path.call, path.module))
            target.bounds = finder.bounds(path.value)
            target.is_output = path.value in trace.output_values
            target.layers.append(layer)
    return [targets[index] for index in sorted(targets)], skipped

"""Which features of a pruned network and of its teacher can be compared, and channel by channel.

A student's channels are a subset of its teacher's, and the plan knows which: features need no
adapters. Where a module's output carries channels that went is read off the same trace that the
plan came from, so that concatenations, padded shortcuts, tokens and heads need no rule of their
own.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..analysis import analyse
from ..analysis.scales import scale_factor, scaled_outputs
from ..errors import InvalidArgumentError
from ..plan import plans_of
from .taps import plain_module

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ..analysis import Analysis
    from ..analysis.trace import TracedCall
    from ..plan import PruningPlan

__all__ = ["Tap", "composed_kept", "find_taps"]

Kept = dict[str, dict[int, Tensor]]

_JOINS = frozenset(
    {"add", "add_", "__add__", "__iadd__", "__radd__", "iadd", "sub", "sub_", "cat", "concat"}
)
_FEW = 4  # taps of a network whose blocks all have the same shape


@dataclass(frozen=True)
class Tap:
    """A module whose output both networks are compared at.

    Attributes:
        name: Path of the module, the same in both.
        channel_dim: The dim of the channels, counted from the front.
        width: The teacher's channels.
        kept: Dim of the teacher's output -> indices that the student has, int64.
        factors: What the student's features are multiplied by, float64, broadcast to the teacher's
            output: a scale that follows a pruned width is folded into weights in front of them.
            None: nothing.
    """

    name: str
    channel_dim: int
    width: int
    kept: Mapping[int, Tensor]
    factors: Tensor | None = None

    def rescaled(self, teacher: Tensor) -> Tensor:
        """The teacher's output, multiplied where the student's is."""
        return teacher if self.factors is None else teacher * self.factors.to(teacher)

    def matched(self, teacher: Tensor) -> Tensor:
        """The part of the teacher's output that the student has too, multiplied likewise."""
        teacher = self.rescaled(teacher)
        for dim, index in self.kept.items():
            teacher = teacher.index_select(dim, index.to(teacher.device))
        return teacher


def find_taps(
    student: nn.Module, teacher: nn.Module, inputs: Any, names: Sequence[str] | None = None
) -> tuple[Tap, ...]:
    """Find where to compare a pruned network with the one it came from.

    Args:
        student (nn.Module): the pruned network, or any other with the same modules.
        teacher (nn.Module): the network before pruning; also a less pruned one.
        inputs (Any): one batch, as :func:`chanprune_ext.plan` takes example inputs.
        names (Sequence[str], optional): paths of modules, or globs on them. Default: the last
            residual or concatenating block at each feature size; in networks without such blocks
            the last convolution or linear layer at each, and where all blocks have one size, as
            in vision transformers, four of them evenly spread.

    Returns:
        tuple[Tap, ...]: in execution order.

    Raises:
        InvalidArgumentError: a name matches no module whose output can be followed, or the networks
            did not come from each other.
    """
    student, teacher = plain_module(student), plain_module(teacher)
    analysis = analyse(teacher, inputs)
    plans = _plans_between(teacher, student)
    removed = _removed_labels(analysis, composed_kept(plans))
    makers = _last_calls(analysis, teacher)
    outputs = {name: analysis.trace.calls[index].outputs[0] for name, index in makers.items()}
    if names is None:
        chosen = _default_names(analysis, outputs)
    else:
        chosen = _named((names,) if isinstance(names, str) else names, teacher, outputs)
    if not chosen:
        raise InvalidArgumentError(
            "taps: found no module whose output can be compared; name some with taps=[...]"
        )
    factors: Mapping[int, Tensor] = {}
    if any(plan.rescalings for plan in plans):
        factors = _factors(analysis, teacher, student, inputs, [makers[name] for name in chosen])
    return tuple(
        _tap(analysis, removed, name, outputs[name], factors.get(makers[name])) for name in chosen
    )


def composed_kept(plans: Sequence[PruningPlan]) -> Kept:
    """Entry -> {dim: kept indices} of several plans applied one after the other."""
    kept: Kept = {}
    for plan in plans:
        for entry, dims in plan.kept.items():
            for dim, index in dims.items():
                before = kept.setdefault(entry, {})
                before[dim] = index if dim not in before else before[dim][index]
    return kept


def _plans_between(teacher: nn.Module, student: nn.Module) -> tuple[PruningPlan, ...]:
    theirs, ours = plans_of(teacher), plans_of(student)
    if len(theirs) > len(ours) or any(
        a is not b and a.to_dict() != b.to_dict() for a, b in zip(theirs, ours, strict=False)
    ):
        raise InvalidArgumentError(
            "teacher: it was pruned by another plan than the student, so that their channels "
            "cannot be matched; leave out losses on features, or give the network it came from"
        )
    return ours[len(theirs) :]


def _removed_labels(analysis: Analysis, kept: Kept) -> np.ndarray:
    """Bool (labels,): label classes that the student lost.

    An index goes as soon as one of its labels goes, so that every label of a kept index stays.
    """
    store = analysis.trace.store
    gone = np.zeros(store.size, dtype=bool)
    stay = np.zeros(store.size, dtype=bool)
    for entry, dims in kept.items():
        for dim, index in dims.items():
            slots = analysis.slots.get((entry, dim))
            if slots is None:
                raise InvalidArgumentError(
                    f"teacher: its '{entry}' cannot lose channels along dim {dim}, the student's "
                    "did; give the network the student was pruned from"
                )
            mask = np.zeros(slots.shape[1], dtype=bool)
            mask[index.numpy()] = True
            stay[slots[:, mask]] = True
            gone[slots[:, ~mask]] = True
    gone &= ~stay
    gone[0] = False
    return gone


def _factors(
    analysis: Analysis, teacher: nn.Module, student: nn.Module, inputs: Any, calls: Iterable[int]
) -> dict[int, Tensor]:
    """Call -> what the student's first output is multiplied by, where it is.

    Both make the same calls: where they compute with another number, a weight makes up for it.
    """
    ours = analyse(student, inputs).trace.calls
    found = {
        index: scale_factor(a.name, a.numbers, b.numbers)
        for index, (a, b) in enumerate(zip(analysis.trace.calls, ours, strict=False))
        if a.numbers is not None and b.numbers is not None
    }
    scaled = {index: factor for index, factor in found.items() if factor is not None}
    return scaled_outputs(teacher, inputs, analysis.trace.substrate, scaled, calls)


def _last_calls(analysis: Analysis, model: nn.Module) -> dict[str, int]:
    """Module -> index of the call that made the tensor it returns, in execution order.

    A module returns what the last call inside it made; one that runs several times counts as it
    ran last.
    """
    last: dict[str, int] = {}
    for index, call in enumerate(analysis.trace.calls):
        if not call.outputs or not call.outputs[0]:
            continue
        for path in _ancestors(call.module):
            last.pop(path, None)  # to the end: modules are ordered by when they return
            last[path] = index
    known = dict(model.named_modules())
    return {name: index for name, index in last.items() if name in known}


def _ancestors(module: str) -> list[str]:
    """A module and those it is inside of, innermost first, without the root."""
    parts = module.split(".") if module else []
    return [".".join(parts[: i + 1]) for i in reversed(range(len(parts)))]


def _default_names(analysis: Analysis, outputs: Mapping[str, tuple[np.ndarray, ...]]) -> list[str]:
    joins: dict[str, TracedCall] = {}  # the last one inside each module, at any depth
    for call in analysis.trace.calls:
        if call.name in _JOINS and len(call.inputs) > 1:
            joins.update(dict.fromkeys(_ancestors(call.module), call))
    blocks = [
        name
        for name, dims in outputs.items()
        if name in joins
        and joins[name].module == name
        and len(dims) > 2
        and _same_sizes(joins[name].outputs[0], dims)
    ]
    if not blocks:
        makers = {entry.rpartition(".")[0] for entry, _ in analysis.trace.roles}
        blocks = [name for name in outputs if name in makers and len(outputs[name]) > 1][:-1]
    blocks = [name for name in blocks if _labelled_dims(analysis, outputs[name])]
    by_size: dict[tuple[int, ...], str] = {}
    for name in blocks:
        by_size[tuple(slots.shape[1] for slots in outputs[name][1:])] = name
    if len(by_size) > 1:
        return [name for name in blocks if name in by_size.values()]
    few = min(_FEW, len(blocks))
    return [blocks[(i + 1) * len(blocks) // few - 1] for i in range(few)]


def _same_sizes(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    return [slots.shape[1] for slots in a] == [slots.shape[1] for slots in b]


def _named(
    globs: Sequence[str], model: nn.Module, outputs: Mapping[str, tuple[np.ndarray, ...]]
) -> list[str]:
    chosen: set[str] = set()
    for glob in globs:
        found = [name for name in outputs if fnmatch.fnmatchcase(name, glob)]
        if not found:
            exists = any(fnmatch.fnmatchcase(name, glob) for name, _ in model.named_modules())
            raise InvalidArgumentError(
                f"taps: {glob!r} matches no module "
                + (
                    "whose output can be followed"
                    if exists
                    else f"of the teacher; there are {', '.join(list(outputs)[:4])}, ..."
                )
            )
        chosen.update(found)
    return [name for name in outputs if name in chosen]


def _labelled_dims(analysis: Analysis, dims: Sequence[np.ndarray]) -> list[int]:
    """Dims whose indices are channels of some parameter, frozen ones included."""
    return [
        dim
        for dim, slots in enumerate(dims)
        if len(slots) and (len(analysis.trace.store.resolve(slots)) or slots.any())
    ]


def _tap(
    analysis: Analysis,
    removed: np.ndarray,
    name: str,
    dims: Sequence[np.ndarray],
    factors: Tensor | None,
) -> Tap:
    kept = {}
    for dim, slots in enumerate(dims):
        mask = analysis.kept_mask(slots, removed)
        if not mask.all():
            kept[dim] = torch.from_numpy(np.flatnonzero(mask))
    labelled = _labelled_dims(analysis, dims)
    default = 1 if len(dims) in (2, 4) else len(dims) - 1
    channel_dim = next(iter(kept), next(iter(labelled), default))
    return Tap(name, channel_dim, int(dims[channel_dim].shape[1]), kept, factors)

"""Scores by what the network loses once the layers that read a channel are refitted without it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..compensation.batches import read_batches, split_batches
from ..compensation.ridge import Factor
from ..criteria import l1
from ..errors import InvalidArgumentError
from ..host_memory import freed_memory_kept
from .backward import Problem, eliminate
from .probes import Probe, convex_steps, loss_curve
from .readers import Reader, find_readers, measure_readers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from ..analysis import CouplingGroup
    from ..compensation.ledger import Ledger
    from ..criteria import Criterion

__all__ = ["elimination"]

_BATCH = 64
_PROBES = (0.25, 0.5, 0.75)  # shares of a component's units that a probe takes away


def elimination(
    batches: Any,
    *,
    ridge: float = 1e-3,
    most_columns: int = 2400,
    probe: bool = False,
    held_back: float = 0.15,
) -> Criterion:
    """A criterion: what the network loses by a channel once the rest is refitted to make up for it.

    Units are removed one after the other, always the one whose removal raises the squared error of
    the layers that read it least, these layers being refitted in closed form at every step. What a
    step adds to the error, relative to the energy of the value that the layer is a part of (a
    residual sum, say), is the unit's score. Scores are losses in one unit, so groups can be
    compared: with ``scope="global"`` and a budget, they are weighed against what a unit saves.

    Plans made so are meant for :func:`chanprune_ext.compensate` afterwards, which does the refits.
    Layers that least squares does not reach (transposed convolutions, say) have no part in it; a
    group that only such layers read, or none (the width of queries and keys, whose products are
    read), is ranked by L1 norms, scaled to the mean of the other scores.

    Args:
        batches: Calibration data, as for :func:`chanprune_ext.compensate`; labels are ignored.
        ridge: Strength of the ridge, relative to the mean energy of a layer's inputs.
        most_columns: Layers with more inputs than this (channels times taps) are looked at tap by
            tap: faster, with a slightly worse order.
        probe: Measure the loss at the network's outputs for a few points of every curve, with that
            group alone pruned and its readers refitted, instead of taking the relative error for
            the loss. Costs forward passes.
        held_back: Share of the samples that the probes are measured on.

    Returns:
        A function for the ``criterion`` argument of :func:`chanprune_ext.plan`.

    Raises:
        InvalidArgumentError: An option is out of range, or, when used, the data are empty or not
            finite.
    """
    if not 0 < ridge < np.inf:
        raise InvalidArgumentError(f"ridge: expected a finite number > 0, got {ridge}")
    if most_columns < 1:
        raise InvalidArgumentError(f"most_columns: expected at least 1, got {most_columns}")
    if not 0 <= held_back < 1:
        raise InvalidArgumentError(f"held_back: expected a share in [0, 1), got {held_back}")

    @freed_memory_kept()
    def criterion(model: nn.Module, groups: Sequence[CouplingGroup], seed: int) -> list[np.ndarray]:
        device = next((t.device for t in model.parameters()), torch.device("cpu"))
        items = read_batches(batches, model, device=device)
        share = held_back if probe else 0.0
        data = split_batches(items, model, held_back=share, batch_size=_BATCH)
        readers = find_readers(model, items[0], _windows(groups), most_columns)
        measure_readers(model, readers, data.fit)
        probes = Probe(model, data.held_back or data.fit) if probe else None
        scores: dict[int, np.ndarray] = {}
        for rivals_apart in _disjoint(groups, readers):
            for component in _components(rivals_apart, readers):
                scores.update(_component_scores(component, readers, ridge, probes))
        return _completed(scores, l1(model, groups, seed))

    criterion.__name__ = "elimination"
    criterion.comparable = True  # type: ignore[attr-defined]
    return criterion


def _windows(groups: Sequence[CouplingGroup]) -> dict[str, bool]:
    """Weights that read groups -> whether one group alone reads through them, and only them.

    Whole windows tell more, but a residual stream has too many readers for them.
    """
    through = [_reading_entries(group) for group in groups]
    counts = Counter(entry for entries in through for entry in entries)
    return {
        entry: len(entries) <= 2 and counts[entry] == 1 for entries in through for entry in entries
    }


def _reading_entries(group: CouplingGroup) -> list[str]:
    """Weights along whose input channels the group is read, each once."""
    found = (m.entry for m in group.members if m.role == "in" and m.dim == 1)
    return list(dict.fromkeys(found))


def _read_through(group: CouplingGroup, readers: dict[str, Reader]) -> list[str]:
    return [entry for entry in _reading_entries(group) if entry in readers]


def _disjoint(
    groups: Sequence[CouplingGroup], readers: dict[str, Reader]
) -> list[list[CouplingGroup]]:
    """Groups in lists within which no input of a reader belongs to two.

    Heads and their width are two ways to take the same inputs: what one of them has removed, the
    other could not remove again, and no plan takes both.
    """
    lists: list[tuple[dict[str, set[int]], list[CouplingGroup]]] = []
    for group in groups:
        inputs = _inputs_read(group, readers)
        free = (
            (taken, members)
            for taken, members in lists
            if not any(taken.get(entry, set()) & indices for entry, indices in inputs.items())
        )
        taken, members = next(free, ({}, []))
        if not members:
            lists.append((taken, members))
        members.append(group)
        for entry, indices in inputs.items():
            taken.setdefault(entry, set()).update(indices)
    return [members for _, members in lists]


def _inputs_read(group: CouplingGroup, readers: dict[str, Reader]) -> dict[str, set[int]]:
    """Weights through which the group is read -> the input channels that are the group's."""
    inputs: dict[str, set[int]] = {}
    for member in group.members:
        if member.role == "in" and member.dim == 1 and member.entry in readers:
            inputs.setdefault(member.entry, set()).update(member.indices.ravel().tolist())
    return inputs


def _components(
    groups: Sequence[CouplingGroup], readers: dict[str, Reader]
) -> list[list[CouplingGroup]]:
    """Groups that share a reader, together; groups without any are left out."""
    components: list[tuple[set[str], list[CouplingGroup]]] = []
    for group in groups:
        entries = set(_read_through(group, readers))
        if not entries:
            continue
        touched = [c for c in components if c[0] & entries]
        components = [c for c in components if not c[0] & entries]
        merged = [g for _, members in touched for g in members] + [group]
        components.append((entries.union(*(c[0] for c in touched)), merged))
    return [sorted(members, key=lambda g: g.index) for _, members in components]


def _component_scores(
    groups: Sequence[CouplingGroup], readers: dict[str, Reader], ridge: float, probe: Probe | None
) -> dict[int, np.ndarray]:
    entries = list(dict.fromkeys(e for g in groups for e in _read_through(g, readers)))
    problems = [p for entry in entries for p in _problems(readers[entry], groups, ridge)]
    units = sum(g.units for g in groups)
    stops = sorted({max(1, min(units - 1, round(share * units))) for share in _PROBES})
    found = eliminate(problems, units, stops if probe is not None else ())
    loss = np.cumsum(found.increase.cpu().numpy())
    if probe is not None:
        points = []
        for stop, state in found.states.items():
            change = _Refit([readers[e] for e in entries], state)
            points.append((float(loss[stop - 1]), probe.loss(change)))
        loss = loss_curve(loss, points)
    score = np.empty(units)
    score[found.order.cpu().numpy()] = convex_steps(loss)
    ends = np.cumsum([g.units for g in groups])
    return {g.index: score[end - g.units : end] for g, end in zip(groups, ends, strict=True)}


def _problems(reader: Reader, groups: Sequence[CouplingGroup], ridge: float) -> Iterator[Problem]:
    """The least-squares problems of a layer, one for each group of a grouped convolution."""
    moments = reader.moments
    mean = moments.column_sum / moments.samples
    gram = moments.gram / moments.samples
    # Of offsets too, unlike in a refit: this ridge only steadies an order, and may be the stiffer.
    energy = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    gram = gram - mean.unsqueeze(-1) * mean.unsqueeze(-2)
    columns = _unit_columns(reader, groups).to(gram.device)
    scale = 1 / reader.energy if reader.energy > 0 else 0.0
    for matrix, unit, weights in zip(gram, energy, reader.weights(), strict=True):
        inverse = torch.cholesky_inverse(Factor(matrix[None], unit[None], ridge).lower[0])
        # The ridge pulls towards the weights as they are: with all columns they are the solution.
        yield Problem(inverse, weights.clone(), columns, scale)


def _unit_columns(reader: Reader, groups: Sequence[CouplingGroup]) -> Tensor:
    """Columns of a layer that each unit takes with it, ``[units, m]``, -1 fills up."""
    taps = reader.taps
    parts = []
    for group in groups:
        found = [m.indices for m in group.members if m.entry == reader.layer.entry and m.dim == 1]
        indices = np.concatenate(found, 1) if found else np.empty((group.units, 0), dtype=np.int64)
        indices = np.sort(indices, 1)
        # One index may stand for the same channel of several groups of a convolution.
        again = np.zeros_like(indices, dtype=bool)
        again[:, 1:] = indices[:, 1:] == indices[:, :-1]
        columns = indices[:, :, None] * taps + np.arange(taps)
        columns[again] = -1
        parts.append(torch.from_numpy(columns.reshape(group.units, -1)))
    width = max(part.shape[1] for part in parts)
    return torch.cat(
        [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=-1) for part in parts]
    )


class _Refit:
    """Gives layers the weights that an elimination has left."""

    def __init__(self, readers: Sequence[Reader], state: Sequence[Tensor]) -> None:
        self._readers = readers
        self._state = state

    def __call__(self, ledger: Ledger) -> None:
        first = 0
        for reader in self._readers:
            groups = reader.moments.gram.shape[0]
            weights = torch.stack(list(self._state[first : first + groups]))
            first += groups
            reader.refit(weights, ledger)


def _completed(scores: dict[int, np.ndarray], norms: list[np.ndarray]) -> list[np.ndarray]:
    """Scores of all groups; those without any get L1 norms, scaled to the others' mean."""
    every = np.concatenate(list(scores.values())) if scores else np.ones(1)
    mean = float(every.mean())
    return [
        scores[i] if i in scores else norm * (mean / norm.mean() if norm.mean() > 0 else 1.0)
        for i, norm in enumerate(norms)
    ]

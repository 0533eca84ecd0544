"""Channels that a user names one by one, and the units that take them away."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from chanprune_ext.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanprune_ext.analysis import Analysis, CouplingGroup
    from chanprune_ext.analysis.groups import Member

__all__ = ["channel_lists", "units_of_channels"]


def channel_lists(remove: Any) -> dict[str, tuple[int, ...]]:
    """The argument ``remove`` of :func:`chanprune_ext.plan`, checked as far as no model is needed.

    Raises:
        InvalidArgumentError: It is something else.
    """
    if not isinstance(remove, Mapping):
        raise InvalidArgumentError(
            f"remove must map names of modules to channels, such as {{'conv1': [0, 3]}}, got "
            f"{remove!r}"
        )
    return {name: _indices(name, given) for name, given in remove.items()}


def _indices(name: Any, given: Any) -> tuple[int, ...]:
    if not isinstance(name, str):
        raise InvalidArgumentError(f"remove: expected the name of a module, got {name!r}")
    if not isinstance(given, Iterable):
        given = [given]
    values = np.asarray(given.tolist() if hasattr(given, "tolist") else list(given))
    if values.ndim != 1 or (len(values) and not np.issubdtype(values.dtype, np.integer)):
        hint = "; of a mask, give the positions" if values.dtype == bool else ""
        raise InvalidArgumentError(
            f"remove[{name!r}]: expected the indices of channels, integers, got {given!r}{hint}"
        )
    return tuple(sorted({int(value) for value in values}))


def units_of_channels(
    analysis: Analysis,
    remove: Mapping[str, Sequence[int]],
    kinds: Sequence[str] | None,
) -> dict[int, np.ndarray]:
    """The units to remove so that the named channels go, and as little else as can be.

    Args:
        analysis: Groups of the model.
        remove: Name of a module that makes channels, of a norm or another module that they pass
            through, or of a parameter of one -> indices of some of them.
        kinds: Kinds of groups to choose from; None: all.

    Returns:
        Group index -> bool (units,), True where a unit is removed.

    Raises:
        InvalidArgumentError: A name or an index is none, a channel must stay, or a layer would be
            left without any.
    """
    removed: dict[int, np.ndarray] = {}
    for name, channels in remove.items():
        if not channels:
            continue
        for index, units in _units_of_module(analysis, name, channels, kinds).items():
            removed[index] = removed.get(index, False) | units
    _check_some_stay(analysis, removed)
    return removed


def _units_of_module(
    analysis: Analysis, name: str, channels: Sequence[int], kinds: Sequence[str] | None
) -> dict[int, np.ndarray]:
    touching = _touching(analysis, name)
    if not touching:
        raise InvalidArgumentError(f"remove[{name!r}]: {_why_none(analysis, name)}")
    members = _along_one_dim(name, touching)
    width = analysis.trace.shapes[members[0].entry][members[0].dim]
    beyond = [channel for channel in channels if not 0 <= channel < width]
    if beyond:
        raise InvalidArgumentError(
            f"remove[{name!r}]: it has channels 0 to {width - 1}, got {beyond[0]}"
        )
    chosen = np.zeros(width, dtype=bool)
    chosen[list(channels)] = True
    found: dict[int, np.ndarray] = {}
    # What takes the least else away comes first; heads and their width are rivals.
    ways = [
        _Way(group, member, chosen) for (group, _), member in zip(touching, members, strict=True)
    ]
    left = chosen.copy()
    for way in sorted(ways, key=lambda way: (way.besides, way.group.index)):
        if kinds is not None and way.group.kind not in kinds:
            continue
        if (way.taken & left).any():
            found[way.group.index] = way.units
            left &= ~way.taken
    if left.any():
        raise InvalidArgumentError(
            f"remove[{name!r}]: channel {int(left.argmax())} {_why_it_stays(analysis, name, kinds)}"
        )
    return found


class _Way:
    """One group's way to take channels away.

    Attributes:
        group: The group.
        units: Bool (units,): those that any of the channels belongs to.
        taken: Bool (width,): the channels that go with them.
        besides: How many that were not asked for.
    """

    def __init__(self, group: CouplingGroup, member: Member, chosen: np.ndarray) -> None:
        self.group = group
        self.units = chosen[member.indices].any(axis=1)
        self.taken = np.zeros(len(chosen), dtype=bool)
        self.taken[member.indices[self.units]] = True
        self.besides = int((self.taken & ~chosen).sum())


def _touching(analysis: Analysis, name: str) -> list[tuple[CouplingGroup, list[Member]]]:
    """Groups that a module or parameter makes channels of, with the dimensions that hold them.

    Of what makes none, a norm for instance, groups whose channels pass through it.
    """
    for role in ("out", "with"):
        found = [
            (group, [m for m in group.members if m.role == role and name in (m.entry, m.module)])
            for group in analysis.groups
        ]
        found = [(group, members) for group, members in found if members]
        if found:
            return found
    return []


def _along_one_dim(
    name: str, touching: Sequence[tuple[CouplingGroup, Sequence[Member]]]
) -> list[Member]:
    """One member of each group, all along the same dimension, by which channels are counted."""
    for first in touching[0][1]:
        place = (first.entry, first.dim)
        alike = [
            next((m for m in members if (m.entry, m.dim) == place), None) for _, members in touching
        ]
        members = [m for m in alike if m is not None]
        if len(members) == len(touching):
            return members
    places = dict.fromkeys(
        f"{members[0].entry!r} (dim {members[0].dim})" for _, members in touching
    )
    raise InvalidArgumentError(
        f"remove[{name!r}]: it has channels along {' and '.join(places)}; give the name of one of "
        f"these parameters, or of another module with the channels you mean"
    )


def _why_none(analysis: Analysis, name: str) -> str:
    frozen = _why_frozen(analysis, name)
    if frozen is not None:
        return frozen
    names = list(dict.fromkeys(p for group in analysis.groups for p in group.producers))
    names = [p for p in names if p.startswith(f"{name}.")] or names
    examples = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"no such module makes channels that may go; there are {examples or 'none'}"


def _why_it_stays(analysis: Analysis, name: str, kinds: Sequence[str] | None) -> str:
    frozen = _why_frozen(analysis, name)
    if frozen is not None:
        return f"must stay; {frozen}"
    others = sorted({group.kind for group, _ in _touching(analysis, name)})
    if kinds is not None and not set(others) <= set(kinds):
        return f"goes with none of kinds={tuple(kinds)}; it is part of {others}"
    return "must stay"


def _why_frozen(analysis: Analysis, name: str) -> str | None:
    """What keeps channels of a module or parameter, if anything does."""
    owners = ((f, (f.entry, f.entry.rpartition(".")[0])) for f in analysis.frozen)
    return next((str(frozen) for frozen, names in owners if name in names), None)


def _check_some_stay(analysis: Analysis, removed: Mapping[int, np.ndarray]) -> None:
    masks = analysis.kept_masks(analysis.removed_labels(removed))
    for entry, dims in masks.items():
        for mask in dims.values():
            if not mask.any():
                raise InvalidArgumentError(
                    f"remove: nothing would be left of {entry!r}; keep at least one channel"
                )

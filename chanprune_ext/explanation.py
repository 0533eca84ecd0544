"""Why the channels of a layer go together, and why some of them stay: the answers in words."""

from __future__ import annotations

import difflib
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chanprune_ext.analysis.groups import Frozen
from chanprune_ext.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from chanprune_ext.analysis.couplings import CoupledDim, Couplings, StuckDim
    from chanprune_ext.analysis.tracer import Event
    from chanprune_ext.group_summary import GroupSummary

__all__ = ["ExplainedGroup", "ExplainedMember", "Explanation", "cause", "explain"]

_HEADINGS = {"out": "made by", "with": "going along", "in": "read by"}
_VERBS = {"out": "makes", "with": "goes along with", "in": "reads"}
_IN_FULL = 3  # groups a layer goes along with that are told in full; beyond, one line each
# What backends and overloads add to the name of an operation.
_AFFIXES = ("native_", "cudnn_", "miopen_", "mkldnn_", "_legit", "_no_training", "_with_update")


@dataclass(frozen=True)
class ExplainedMember:
    """One dimension that loses channels with a group.

    Attributes:
        entry: Name of the parameter or buffer.
        module: Path of the module that owns it.
        dim: The dimension.
        role: ``"out"`` (makes the channels), ``"in"`` (reads them) or ``"with"`` (goes along).
        channels: How many indices of the dimension belong to the group.
        asked: The member belongs to what was asked about.
        via: Operations between the member and ``partner``, first to last; mostly one.
        partner: The member it meets there, one step nearer to what was asked about; None for
            members that were asked about, and where no operation is known.
    """

    entry: str
    module: str
    dim: int
    role: str
    channels: int
    asked: bool
    via: tuple[Event, ...] = ()
    partner: ExplainedMember | None = None

    def __str__(self) -> str:
        return f"{self.entry} dim {self.dim}"


@dataclass(frozen=True)
class ExplainedGroup:
    """One group that the layer makes channels of, goes along with, or reads.

    Attributes:
        summary: The group, with its width before and after.
        role: What the layer does with the channels: ``"out"``, ``"with"`` or ``"in"``.
        units: Into how many parts the group can be taken that leave one by one.
        rivals: Units of other groups that are other ways to take the same channels.
        members: All members, the nearest to the layer first.
        held: What made this plan keep the whole group, if anything did.
    """

    summary: GroupSummary
    role: str
    units: int
    rivals: tuple[int, ...]
    members: tuple[ExplainedMember, ...]
    held: Frozen | None

    def _title(self) -> str:
        summary = self.summary
        width = str(summary.width_before)
        if summary.width_after < summary.width_before:
            width += f" -> {summary.width_after}"
        title = f"group '{summary.name}': {width} channels"
        if self.units == 1:
            title += ", which only go all at once"
        elif self.units != summary.width_before:
            title += f" in {self.units} units"
        if summary.normalised:
            title += ", normalised over"
        return title

    def lines(self) -> list[str]:
        """The group in full: every member, by role, with its nearest coupling."""
        lines = [f"{_VERBS[self.role]} {self._title()}"]
        if self.held is not None:
            lines.append(f"  kept whole by this plan: {cause(self.held)}")
        if self.rivals:
            ways = " or ".join(str(units) for units in self.rivals)
            lines.append(f"  the same channels could go in {ways} units: one way is taken")
        makers = {m.module for m in self.members if m.role == "out"}
        for role, heading in _HEADINGS.items():
            by_module: dict[str, list[ExplainedMember]] = {}
            for member in self.members:
                # A bias is told with the weight it belongs to.
                beside = member.role == "with" and member.module in makers
                if role == ("out" if beside else member.role):
                    by_module.setdefault(member.module, []).append(member)
            if by_module:
                lines.append(f"  {heading}")
                lines.extend(f"    {_line(members)}" for members in by_module.values())
        return lines

    def short(self) -> str:
        """The group in one line, with where the layer meets it."""
        asked = next(m for m in self.members if m.asked)
        met_here = [m for m in self.members if m.partner is asked]
        near = next((m for m in met_here if m.role == "out"), next(iter(met_here), None))
        makers = _listed(self.summary.producers)
        met = "" if near is None else f"; {asked.module} -- {_told(near.via)} -- {near.module}"
        return f"{_VERBS[self.role]} {self._title()}, made by {makers}{met}"


@dataclass(frozen=True)
class Explanation:
    """What :meth:`PruningPlan.explain` found; printing it tells the whole story.

    Attributes:
        name: The name that was asked about.
        entries: The parameters and buffers it stands for, under the names that plans use.
        groups: Groups it makes channels of or goes along with.
        reads: Groups it reads.
        stuck: Its channels that no plan removes, and what keeps them.
        aliases: Of ``entries`` that are shared, the name that was asked about -> the plan's.
    """

    name: str
    entries: tuple[str, ...]
    groups: tuple[ExplainedGroup, ...]
    reads: tuple[ExplainedGroup, ...]
    stuck: tuple[StuckDim, ...]
    aliases: Mapping[str, str]

    def __str__(self) -> str:
        lines = [self.name]
        lines.extend(f"  {alias} is {entry}, shared" for alias, entry in self.aliases.items())
        many = sum(group.role == "with" for group in self.groups) > _IN_FULL
        for group in self.groups:
            told = [group.short()] if many and group.role == "with" else group.lines()
            lines.extend(f"  {line}" for line in told)
        lines.extend(f"  {group.short()}" for group in self.reads)
        alike: dict[tuple[bool, int, Event | None], list[str]] = {}
        for stuck in self.stuck:
            key = stuck.role == "in", stuck.channels, stuck.why
            alike.setdefault(key, []).append(f"{stuck.entry} dim {stuck.dim}")
        for (read, channels, event), dims in alike.items():
            what = f"{'reads' if read else 'keeps'} {channels} channels ({', '.join(dims)})"
            why = "no layer makes them" if event is None else cause(event)
            lines.append(f"  {what} that must stay: {why}")
        if len(lines) == 1:
            lines.append("  has no dimension that channels run along")
        return "\n".join(lines)


def explain(
    name: str,
    couplings: Couplings,
    groups: Sequence[GroupSummary],
    frozen: Sequence[Frozen],
    fingerprint: Mapping[str, Any],
) -> Explanation:
    """Say who is coupled to a layer, and what keeps its channels.

    Args:
        name: A module (all its parameters and those of its children) or one parameter, under any
            of its names.
        couplings: The graph of the model's channels.
        groups: The groups ``couplings`` numbers.
        frozen: What a plan says must stay; used for groups that this plan had to leave whole.
        fingerprint: The model's structure, as :func:`chanprune_ext.plan.structure_of` tells it.

    Raises:
        InvalidArgumentError: Nothing has this name, it has no parameters, or ``couplings`` are
            those of an older plan, which kept none.
    """
    if groups and not couplings.units:
        raise InvalidArgumentError(
            "this plan was saved by a version that did not keep what couples channels; make it "
            "again with chanprune_ext.plan"
        )
    found = _entries_named(name, couplings, fingerprint)
    entries = set(found.values())
    of_group: dict[int, list[int]] = {}
    for i, member in enumerate(couplings.members):
        of_group.setdefault(member.group, []).append(i)
    neighbours: dict[int, list[tuple[int, Event]]] = {}
    for a, b, number in couplings.edges.tolist():
        event = couplings.events[number]
        neighbours.setdefault(a, []).append((b, event))
        neighbours.setdefault(b, []).append((a, event))
    stuck = tuple(s for s in couplings.stuck if s.entry in entries)
    explained = []
    for index, positions in of_group.items():
        asked = [i for i in positions if couplings.members[i].entry in entries]
        if not asked:
            continue
        roles = {couplings.members[i].role for i in asked}
        explained.append(
            ExplainedGroup(
                groups[index],
                next(role for role in _HEADINGS if role in roles),
                couplings.units[index],
                tuple(couplings.units[sum(p) - index] for p in couplings.rivals if index in p),
                _members(couplings.members, positions, asked, neighbours),
                _held(groups[index], couplings, frozen),
            )
        )
    return Explanation(
        name,
        tuple(sorted(entries)),
        tuple(group for group in explained if group.role != "in"),
        tuple(group for group in explained if group.role == "in"),
        stuck,
        {alias: entry for alias, entry in found.items() if alias != entry},
    )


def _members(
    members: Sequence[CoupledDim],
    positions: Sequence[int],
    asked: Sequence[int],
    neighbours: Mapping[int, Sequence[tuple[int, Event]]],
) -> tuple[ExplainedMember, ...]:
    """Members of one group in the order in which a walk from those asked about meets them."""
    told: dict[int, ExplainedMember] = {}
    # Position -> the nearest member on the way back, and the operations in between.
    back: dict[int, tuple[ExplainedMember | None, tuple[Event, ...]]] = {}
    queue = deque(asked)
    back.update((i, (None, ())) for i in asked)
    while queue:
        i = queue.popleft()
        partner, via = back[i]
        if members[i].entry:
            told[i] = _member(members[i], i in asked, via, partner)
            partner, via = told[i], ()
        for other, event in neighbours.get(i, ()):
            if other not in back:
                # Two steps of one operation, through what a reshape made, count once.
                back[other] = (partner, via if event in via else (event, *via))
                queue.append(other)
    missed = [i for i in positions if members[i].entry and i not in told]
    return (*told.values(), *(_member(members[i], False, (), None) for i in missed))


def _member(
    member: CoupledDim, asked: bool, via: tuple[Event, ...], partner: ExplainedMember | None
) -> ExplainedMember:
    return ExplainedMember(
        member.entry,
        member.module,
        member.dim,
        member.role,
        member.channels,
        asked,
        via,
        partner,
    )


def _held(group: GroupSummary, couplings: Couplings, frozen: Sequence[Frozen]) -> Frozen | None:
    """What a plan gave as the reason to leave a whole group alone."""
    if group.width_after < group.width_before:
        return None
    stuck = {(s.entry, s.why.source, s.why.op) for s in couplings.stuck if s.why is not None}
    return next(
        (
            f
            for f in frozen
            if (f.entry.rpartition(".")[0] or f.entry) == group.name
            and (f.entry, f.source, f.op) not in stuck
        ),
        None,
    )


# -- names -----------------------------------------------------------------------------------------


def _entries_named(
    name: str, couplings: Couplings, fingerprint: Mapping[str, Any]
) -> dict[str, str]:
    """Name of every parameter and buffer that ``name`` stands for -> the name plans use."""
    if not isinstance(name, str):
        raise InvalidArgumentError(
            f"name must be that of a module or parameter (str), got {type(name).__name__}"
        )
    tensors = {**{entry: entry for entry in fingerprint["tensors"]}, **couplings.aliases}
    found = {n: e for n, e in tensors.items() if n == name or n.startswith(f"{name}.")}
    if found and name:
        return found
    modules = set(fingerprint["modules"])
    for path in tensors:
        while path := path.rpartition(".")[0]:
            modules.add(path)
    near = _near(name, [*sorted(modules), *tensors])
    hint = f"; did you mean {near}?" if near else ""
    if name in modules:
        raise InvalidArgumentError(
            f"name {name!r} is a {fingerprint['modules'].get(name, 'module')} without parameters, "
            f"so it has no channels of its own; ask for the layer before or after it"
        )
    raise InvalidArgumentError(f"name {name!r} is no module or parameter of the model{hint}")


def _near(name: str, names: Sequence[str]) -> str:
    """Up to four names that may have been meant, quoted."""
    inside = [n for n in names if name and n.endswith(f".{name}")]
    close = difflib.get_close_matches(name, names, n=4, cutoff=0.6)
    return ", ".join(repr(n) for n in list(dict.fromkeys([*inside, *close]))[:4])


# -- words -----------------------------------------------------------------------------------------


def _line(members: Sequence[ExplainedMember]) -> str:
    """All members of one module in one line."""
    module = members[0].module
    parts = ", ".join(
        f"{m.entry[len(module) :].lstrip('.') or m.entry} dim {m.dim}" for m in members
    )
    line = f"{module} ({parts})"
    met = [m for m in members if m.partner is not None]
    if any(m.asked for m in members) or not met:
        return line
    # The first that leads to another module tells more than a bias that leads to its own weight.
    shown = next((m for m in met if m.partner and m.partner.module != module), met[0])
    assert shown.partner is not None
    return f"{line} -- {_told(shown.via)} -- {shown.partner.module}"


def _told(via: Iterable[Event]) -> str:
    return ", ".join(_place(event) for event in via)


def _place(event: Event | Frozen) -> str:
    """An operation with its module and source line."""
    where = f" in '{event.module}'" if event.module else ""
    return f"{_plain(event.op)}{where} ({event.source})"


def cause(event: Event | Frozen) -> str:
    """Why channels stay, and at which operation."""
    why = event.why if isinstance(event, Frozen) else event.detail
    # Outputs, and sizes that a plan found at fault, have no operation of their own.
    return why if event.op == "output" else f"{why or 'kept'} -- {_place(event)}"


def _plain(op: str) -> str:
    """The name of an operation without namespace and backend: ``aten::add_`` -> ``add``."""
    name = op.rpartition("::")[2].strip("_")
    for affix in _AFFIXES:
        name = name.replace(affix, "")
    return name


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

"""What a plan tells of one coupling group."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GroupSummary"]


@dataclass(frozen=True)
class GroupSummary:
    """What a plan does to one coupling group.

    Attributes:
        name: The first module that makes the channels.
        producers: All modules that make them.
        consumers: All modules that read them.
        width_before: Channels of the first producer that belong to the group.
        width_after: How many of them stay.
        normalised: A layer takes statistics over the channels.
        kind: ``"heads"``, ``"head_dim"``, ``"residual"``, ``"mlp"`` or ``"hidden"``.
    """

    name: str
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    width_before: int
    width_after: int
    normalised: bool = False
    kind: str = "hidden"

"""Configurations that build a pruned transformers model, found by trying numbers.

A configuration states widths as a few numbers for all layers. Which number means what is not looked
up: a model is built on the meta device from every candidate, and its tensors are compared with
those of the pruned model.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from chanprune_ext.errors import ExportError, InvalidArgumentError
from chanprune_ext.plan import plans_within

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["narrow_configs"]

# Where a number stands: ("text_config", "hidden_size").
Place: TypeAlias = "tuple[str, ...]"
Shapes: TypeAlias = "dict[str, tuple[int, ...]]"

# What code computes from other numbers unless a configuration names it.
_IMPLIED = "head_dim"


def narrow_configs(model: nn.Module) -> Iterator[Any]:
    """All that are found: several numbers may give the same shapes, heads and their width say.

    Args:
        model: A pruned transformers model.

    Raises:
        InvalidArgumentError: It is no transformers model, or was not pruned.
        ExportError: There is none.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        raise InvalidArgumentError(
            f"model must be a transformers model with a config, got {type(model).__name__}"
        )
    plans = tuple(plan for found in plans_within(model).values() for plan in found)
    if not plans:
        raise InvalidArgumentError("model was not pruned: use its own save_pretrained")
    ratios = {
        (len(kept), plan.fingerprint["tensors"][entry][dim])
        for plan in plans
        for entry, dims in plan.kept.items()
        for dim, kept in dims.items()
    }
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    solved, left = [], []
    for start in _starts(model, config):
        search = _Search(type(model), start, wanted, ratios)
        found = search.solved()
        if found is None:
            left.append(search.left)
        else:
            yield found
            solved.append((search, found))
    if not solved:
        raise ExportError(left[0])
    for search, found in solved:
        before, after = dict(_numbers(search.start)), dict(_numbers(found))
        for place in [place for place, value in after.items() if before.get(place) != value]:
            other = search.solved(fixed=place)
            if other is not None:
                yield other


def _starts(model: nn.Module, config: Any) -> Iterator[Any]:
    """The configuration as it is, and with what modules have computed from it written down."""
    yield config
    places = {id(part): place for place, part in _parts(config)}
    implied = {
        (*place, _IMPLIED): value
        for module in model.modules()
        if (place := places.get(id(module.__dict__.get("config")))) is not None
        and type(value := module.__dict__.get(_IMPLIED)) is int
    }
    known = dict(_numbers(config))
    implied = {place: value for place, value in implied.items() if known.get(place) is None}
    if implied:
        start = copy.deepcopy(config)
        if all(_set(start, place, value) for place, value in implied.items()):
            yield start


class _Search:
    """Sets numbers of one configuration until a model built from it has the right shapes."""

    def __init__(
        self, build: Any, start: Any, wanted: Shapes, ratios: set[tuple[int, int]]
    ) -> None:
        self.build, self.start, self.wanted, self.ratios = build, start, wanted, ratios
        self.left = ""  # what was wrong in the end
        self.idle: set[Place] = set()  # numbers that no shape depends on

    def solved(self, fixed: Place | None = None) -> Any:
        """A configuration, found without changing one of its numbers; None if there is none."""
        best = copy.deepcopy(self.start)
        shapes = self.shapes(best)
        if shapes is None:
            self.left = f"{type(best).__name__} does not build a {self.build.__name__}"
            return None
        # Each round takes the one number that sets most tensors right; a few numbers make a model.
        while missing := self.missing(shapes):
            found = self.step(best, shapes, missing, fixed)
            if found is None:
                self.left = (
                    f"no configuration of {type(best).__name__} builds this model: {len(missing)} "
                    f"tensors such as {missing[0]!r}, {list(self.wanted[missing[0]])}, differ, as "
                    f"its layers have different widths or it has no number for them; use "
                    f"chanprune_ext.save, whose file rebuilds it from the plain model"
                )
                return None
            best, shapes = found
        return best

    def step(
        self, config: Any, shapes: Shapes, missing: list[str], fixed: Place | None
    ) -> tuple[Any, Shapes] | None:
        """The best change of one number: of those that are stated, else of those left open."""
        fewest, best = len(missing), None
        sizes = sorted({n for name in missing for n in self.wanted[name]})
        for stated in (True, False):
            for place, value in _numbers(config):
                if place == fixed or place in self.idle or (value is not None) != stated:
                    continue
                for number in self.scaled(value) if value is not None else sizes:
                    trial = copy.deepcopy(config)
                    made = self.shapes(trial) if _set(trial, place, number) else None
                    if made is None:
                        continue
                    if made == shapes:
                        self.idle.add(place)
                        break
                    if (left := len(self.missing(made))) < fewest:
                        fewest, best = left, (trial, made)
            if best is not None:
                break
        return best

    def scaled(self, value: int) -> list[int]:
        """A number as it would be if it had shrunk as some dimension has."""
        return sorted({value * a // b for a, b in self.ratios if value * a % b == 0} - {0, value})

    def shapes(self, config: Any) -> Shapes | None:
        """Of all tensors of a model that a configuration builds; None if it has others."""
        try:
            with torch.device("meta"):
                made = {n: tuple(t.shape) for n, t in self.build(config).state_dict().items()}
        except Exception:  # noqa: BLE001 - configurations that fit nothing raise anything
            return None
        return made if made.keys() == self.wanted.keys() else None

    def missing(self, shapes: Shapes) -> list[str]:
        return [name for name, shape in self.wanted.items() if shapes[name] != shape]


def _parts(config: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """A configuration and those within it, and where they stand."""
    yield place, config
    for name in config.to_dict():
        inner = getattr(config, name, None)
        if hasattr(inner, "to_dict"):
            yield from _parts(inner, (*place, name))


def _numbers(config: Any) -> Iterator[tuple[Place, int | None]]:
    """Whole numbers, and what is left open (None), of a configuration and those within it."""
    for place, part in _parts(config):
        for name, value in part.to_dict().items():
            if name.endswith(("_token_id", "_token_ids", "_token_index")):
                continue
            if value is None or (type(value) is int and value > 1):
                yield (*place, name), value


def _set(config: Any, place: Place, value: int) -> bool:
    """Set a number; False where the configuration doesn't take it."""
    *holders, name = place
    try:
        for holder in holders:
            config = getattr(config, holder)
        setattr(config, name, value)
    except Exception:  # noqa: BLE001 - configurations check what they are given each in its way
        return False
    return True

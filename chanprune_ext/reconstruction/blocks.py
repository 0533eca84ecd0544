"""Which parts of a network are tuned as one block, found from its coupling groups.

A block is the smallest module that makes and reads the channels of an inner group: the residual
block, the dense layer, the transformer layer. Where that module is a long ``nn.Sequential``, a run
of its children is a block of its own. What no group encloses (stem, classifier) is left over and
forms small blocks too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..group_summary import GroupSummary

__all__ = ["Block", "find_blocks"]

_MOST_LAYERS = 12  # weighted layers of one block; an Inception block has ten
_MOST_PARTS = 3  # parts that grow together: self-attention, cross-attention, MLP
_MOST_LAYERS_OF_RUN = 4  # of a sequence that grows around its only block
_BETWEEN_BLOCKS = "residual"  # kind of the groups that run through many blocks


@dataclass(frozen=True)
class Block:
    """Modules that run one after another, each on the output of the one before.

    Attributes:
        modules: Their dotted paths: one module, or consecutive children of an ``nn.Sequential``.
        layers: Paths of the modules inside that hold weights.
        encloses: Whether a coupling group begins and ends inside.
    """

    modules: tuple[str, ...]
    layers: frozenset[str]
    encloses: bool = True

    @property
    def name(self) -> str:
        """``"layer1.0"``, or ``"features.0 to features.1"``."""
        first, last = self.modules[0], self.modules[-1]
        return first if first == last else f"{first} to {last}"

    def holds(self, path: str) -> bool:
        """Whether the module called ``path`` is part of the block."""
        return any(path == own or path.startswith(f"{own}.") for own in self.modules)


def find_blocks(
    model: nn.Module, groups: Sequence[GroupSummary], order: Mapping[str, Sequence[int]]
) -> tuple[list[Block], dict[str, str]]:
    """Divides a network into blocks.

    Args:
        model: The network.
        groups: Its coupling groups.
        order: Path of every module -> the positions at which it was entered in one forward.

    Returns:
        Blocks in the order in which a forward enters them, and path -> reason for every layer that
        is in none.
    """
    tree = _Tree(model, order)
    blocks = _grown(tree, _enclosing(tree, groups))
    taken = frozenset().union(*(block.layers for block in blocks))
    left: dict[str, str] = {}
    blocks += _left_over(tree, "", taken, left)
    blocks.sort(key=lambda block: order[block.modules[0]][0])
    return blocks, left


class _Tree:
    """The modules of a model by path, and which layers each of them holds."""

    def __init__(self, model: nn.Module, order: Mapping[str, Sequence[int]]) -> None:
        self.modules = dict(model.named_modules())
        self.order = order
        self._layers: dict[str, set[str]] = {path: set() for path in self.modules}
        for path, module in self.modules.items():
            if any(p.dim() > 1 for p in module.parameters(recurse=False)):
                for above in _line(path):
                    self._layers[above].add(path)

    def layers(self, path: str) -> frozenset[str]:
        return frozenset(self._layers[path])

    def runs_once(self, path: str) -> bool:
        return len(self.order.get(path, ())) == 1

    def is_sequence(self, path: str) -> bool:
        """Whether the module does nothing but run its children in order."""
        return type(self.modules[path]).forward is nn.Sequential.forward

    def children(self, path: str) -> list[str]:
        return [
            f"{path}.{name}" if path else name
            for name, _ in self.modules[path].named_children()
            if (f"{path}.{name}" if path else name) in self.modules
        ]

    def module_of(self, name: str) -> str:
        """The module that is called ``name``, or that holds the parameter of this name."""
        return name if name in self.modules else name.rpartition(".")[0]

    def block(self, path: str, *, encloses: bool = True) -> Block:
        return Block((path,), self.layers(path), encloses)

    def run_of_children(self, path: str, inside: Sequence[str]) -> Block | None:
        """The children of a sequence from the first to the last that holds one of ``inside``."""
        children = self.children(path)
        if not all(self.runs_once(child) for child in children):
            return None
        wanted = [
            i for i, child in enumerate(children) if any(child in _line(name) for name in inside)
        ]
        first, last = min(wanted), max(wanted)
        while last + 1 < len(children) and not self.layers(children[last + 1]):
            last += 1  # norms and activations belong to the layer before them
        chosen = children[first : last + 1]
        layers = frozenset().union(*(self.layers(child) for child in chosen))
        if layers == self.layers(path) and path and self.runs_once(path):
            return self.block(path)
        return Block(tuple(chosen), layers)


def _line(path: str) -> list[str]:
    """A path and everything above it, the root (``""``) last."""
    line = [path]
    while path:
        path = path.rpartition(".")[0]
        line.append(path)
    return line


def _enclosing(tree: _Tree, groups: Sequence[GroupSummary]) -> list[Block]:
    """Small blocks around the groups that begin and end inside one; no two overlap."""
    candidates: dict[tuple[str, ...], Block] = {}
    for group in groups:
        if group.kind != _BETWEEN_BLOCKS:
            block = _around(tree, [tree.module_of(n) for n in (*group.producers, *group.consumers)])
            if block is not None and len(block.layers) <= _MOST_LAYERS:
                candidates[block.modules] = block
    chosen: list[Block] = []
    by_size = sorted(
        candidates.values(), key=lambda b: (len(b.layers), tree.order[b.modules[0]][0])
    )
    for block in by_size:
        met = [other for other in chosen if other.layers & block.layers]
        if len(met) > 1 or any(not other.layers < block.layers for other in met):
            continue
        chosen = [other for other in chosen if other not in met]
        chosen.append(block)
    return chosen


def _around(tree: _Tree, paths: Sequence[str]) -> Block | None:
    """The smallest block with all of these modules inside; None if it is the whole network."""
    if not all(path in tree.modules for path in paths):
        return None
    common = next(p for p in _line(paths[0]) if all(p in _line(path) for path in paths))
    while common and not tree.runs_once(common):
        common = common.rpartition(".")[0]
    if tree.is_sequence(common):
        return tree.run_of_children(common, paths)
    return tree.block(common) if common else None


def _grown(tree: _Tree, blocks: list[Block]) -> list[Block]:
    """Blocks as large as the module around them that adds nothing else, such as the skip."""
    grown = list(blocks)
    for block in blocks:
        if block not in grown:
            continue
        while (larger := _one_larger(tree, block, grown)) is not None:
            grown = [other for other in grown if not other.layers <= larger.layers]
            grown.append(larger)
            block = larger
    return grown


def _one_larger(tree: _Tree, block: Block, blocks: Sequence[Block]) -> Block | None:
    parent = block.modules[0].rpartition(".")[0]
    if not parent or not tree.runs_once(parent):
        return None
    layers = tree.layers(parent)
    if layers == block.layers:
        return tree.block(parent)
    inside = [other for other in blocks if other.layers <= layers]
    if tree.is_sequence(parent):
        fits = len(inside) == 1 and len(layers) <= _MOST_LAYERS_OF_RUN
    else:
        covered = frozenset().union(*(other.layers for other in inside))
        fits = len(inside) <= _MOST_PARTS and covered >= layers - {parent}
    return tree.block(parent) if fits and len(layers) <= _MOST_LAYERS else None


def _left_over(tree: _Tree, path: str, taken: frozenset[str], left: dict[str, str]) -> list[Block]:
    """The largest modules that no block touches."""
    layers = tree.layers(path)
    if layers <= taken:
        return []
    if path and not layers & taken and tree.runs_once(path) and len(layers) <= _MOST_LAYERS:
        return [tree.block(path, encloses=False)]
    if path in layers and path not in taken:
        left[path] = (
            "other blocks are inside"
            if not path or tree.runs_once(path)
            else f"it runs {len(tree.order.get(path, ()))} times in one forward"
        )
    return [
        block for child in tree.children(path) for block in _left_over(tree, child, taken, left)
    ]

"""What goes into a block and comes out of it while its network runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..analysis.calls import run_model, tensors_in
from ..analysis.stand_ins import substitute
from ..compensation.outputs import forward

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .blocks import Block

__all__ = ["Inputs", "Link", "Survey", "entry_order", "inputs_of", "passed", "run", "survey"]


@dataclass(frozen=True)
class Inputs:
    """Arguments of a block's first module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among them, in order."""
        return tensors_in((self.args, self.kwargs))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same arguments with ``change`` applied to every tensor."""
        return Inputs(substitute(self.args, change), substitute(self.kwargs, change))

    def with_tensors(self, tensors: Sequence[Tensor]) -> Inputs:
        """The same arguments with other tensors, in order."""
        left = iter(tensors)
        return self.mapped(lambda _: next(left))


@dataclass(frozen=True)
class Link:
    """Where the inputs of a block come from, when the block before it is all they need.

    Attributes:
        sources: For every tensor input: ``("output", i)`` or ``("input", i)`` of the block before.
    """

    sources: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Survey:
    """How one network runs its blocks.

    Attributes:
        inputs: Of every block, on a few samples.
        outputs: Likewise.
        links: How each block's inputs follow from the block before; None where something else runs
            in between, and for the first block.
        overwrites: Whether a block changes its inputs.
    """

    inputs: tuple[Inputs, ...]
    outputs: tuple[Any, ...]
    links: tuple[Link | None, ...]
    overwrites: tuple[bool, ...]


class _Reached(BaseException):
    """Ends a forward early; not an Exception, so that no model code swallows it."""


def entry_order(model: nn.Module, inputs: Any) -> dict[str, list[int]]:
    """Path of every module -> positions at which one forward enters it."""
    order: dict[str, list[int]] = {}
    entered = 0
    handles = []

    def note(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal entered
            order.setdefault(path, []).append(entered)
            entered += 1

        return hook

    try:
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(note(path), prepend=True))
        forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return order


def run(modules: Sequence[nn.Module], inputs: Inputs) -> Any:
    """Runs modules one after another."""
    value = modules[0](*inputs.args, **inputs.kwargs)
    for module in modules[1:]:
        value = module(value)
    return value


def _watch(
    model: nn.Module,
    block: Block,
    on_entry: Callable[[Inputs], None],
    on_exit: Callable[[Any], None],
) -> list[Any]:
    first, last = (model.get_submodule(block.modules[i]) for i in (0, -1))
    return [
        first.register_forward_pre_hook(
            lambda _, args, kwargs: on_entry(Inputs(args, kwargs)), prepend=True, with_kwargs=True
        ),
        last.register_forward_hook(lambda _, __, output: on_exit(output)),
    ]


def inputs_of(model: nn.Module, batch: Any, block: Block) -> Inputs:
    """Runs ``model`` on ``batch`` up to the entry of ``block``."""
    return passed(model, batch, block, stop_at_entry=True)[0]


def passed(
    model: nn.Module, batch: Any, block: Block, *, stop_at_entry: bool = False
) -> tuple[Inputs, Any]:
    """Runs ``model`` on ``batch`` until ``block`` is done; its inputs and its output."""
    found: list[Inputs] = []
    output: list[Any] = []

    def on_entry(inputs: Inputs) -> None:
        found.append(inputs if stop_at_entry else inputs.mapped(torch.clone))
        if stop_at_entry:
            raise _Reached

    def on_exit(value: Any) -> None:
        output.append(value)
        raise _Reached

    handles = _watch(model, block, on_entry, on_exit)
    try:
        run_model(model, batch)
    except _Reached:
        return found[0], output[0] if output else None
    finally:
        for handle in handles:
            handle.remove()
    raise RuntimeError(f"the forward did not reach {block.name}")


def survey(model: nn.Module, batch: Any, blocks: Sequence[Block]) -> Survey:
    """Runs ``model`` once and notes how its blocks hang together."""
    found: list[Inputs] = []
    sources: list[list[tuple[str, int] | None]] = []
    outputs: list[Any] = []
    overwrites: list[bool] = []
    made: dict[int, tuple[str, int, int, Tensor]] = {}
    received: dict[int, tuple[str, int, int, Tensor]] = {}

    def on_entry(inputs: Inputs) -> None:
        nonlocal received
        noted = received | made
        sources.append([_source(tensor, noted) for tensor in inputs.tensors])
        received = {
            id(t): ("input", i, t._version, t)  # noqa: SLF001 - torch has no other name for it
            for i, t in enumerate(inputs.tensors)
        }
        found.append(inputs.mapped(torch.clone))

    def on_exit(value: Any) -> None:
        nonlocal made
        overwrites.append(any(_source(e[-1], {i: e}) is None for i, e in received.items()))
        made = {
            id(t): ("output", i, t._version, t)  # noqa: SLF001
            for i, t in enumerate(tensors_in(value))
        }
        outputs.append(substitute(value, torch.clone))

    handles = [handle for block in blocks for handle in _watch(model, block, on_entry, on_exit)]
    try:
        forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    links: list[Link | None] = [None]
    for entry in sources[1:]:
        known = [source for source in entry if source is not None]
        links.append(Link(tuple(known)) if len(known) == len(entry) else None)
    return Survey(tuple(found), tuple(outputs), tuple(links), tuple(overwrites))


def _source(
    tensor: Tensor, noted: dict[int, tuple[str, int, int, Tensor]]
) -> tuple[str, int] | None:
    """What a tensor is, unless it has been written to since it was noted."""
    kind, index, version, _ = noted.get(id(tensor), ("", 0, -1, tensor))
    return (kind, index) if version == tensor._version else None  # noqa: SLF001

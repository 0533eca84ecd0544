"""What every block is tuned on: inputs from the pruned network, targets from the original."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..analysis.calls import tensors_in
from .passages import Inputs, Link, Survey, inputs_of, passed, run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from .blocks import Block

__all__ = ["Feed", "Sample"]


@dataclass(frozen=True)
class Sample:
    """One batch at one block.

    Attributes:
        student: The block's inputs in the pruned network, as far as it is reconstructed.
        teacher: Those tensors of the original's inputs that the next block needs too, by position.
        target: What the block returns in the original; None if nobody asked for it.
    """

    student: Inputs
    teacher: dict[int, Tensor]
    target: Any

    @property
    def bytes(self) -> int:
        """Memory of all tensors."""
        tensors = (*self.student.tensors, *self.teacher.values(), *tensors_in(self.target))
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


class Feed:
    """Samples of one block after the other, in memory as far as they fit.

    Where a block's inputs are what the block before it returned, its samples are made from the
    samples of that one; elsewhere both networks run from the beginning up to the block. Samples
    that do not fit are made anew each time they are asked for.

    Args:
        pruned: Network whose blocks are tuned one by one.
        original: The network it was made from.
        blocks: In order.
        surveys: How the pruned and the original network run them.
        batches: Inputs of the networks.
        limit: Most bytes to keep.
    """

    def __init__(
        self,
        pruned: nn.Module,
        original: nn.Module,
        blocks: Sequence[Block],
        surveys: tuple[Survey, Survey],
        batches: Sequence[Any],
        limit: int,
    ) -> None:
        self._networks = pruned, original
        self._blocks = blocks
        self._surveys = surveys
        self._batches = batches
        self._limit = limit
        self._block = -1
        self._with_targets = True
        self._kept: list[Sample | None] = [None] * len(batches)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Sample:
        kept = self._kept[index]
        return self._made(index) if kept is None else kept

    @property
    def bytes(self) -> int:
        """Memory of the samples that are kept."""
        return sum(sample.bytes for sample in self._kept if sample is not None)

    @property
    def share_kept(self) -> float:
        """Share of the samples that are in memory."""
        return sum(sample is not None for sample in self._kept) / len(self._kept)

    @torch.no_grad()
    def open(self, block: int, *, targets: bool = True) -> None:
        """Goes on to the block at this position; the ones before it are as they will stay.

        Args:
            block: Its position.
            targets: Note what the original returns there, for which it has to run.
        """
        links = tuple(survey.links[block] for survey in self._surveys)
        follows = block == self._block + 1 and targets and self._with_targets
        student, teacher = links if follows else (None, None)
        self._with_targets = targets
        before, self._block = self._kept, block
        self._kept = [None] * len(before)
        used = sum(sample.bytes for sample in before if sample is not None)
        for i, old in enumerate(before):
            if old is None or student is None or teacher is None:
                new = self._made(i)
            else:
                new = self._moved_on(old, student, teacher)
            before[i] = None
            used -= old.bytes if old is not None else 0
            if used + new.bytes <= self._limit:
                self._kept[i] = new
                used += new.bytes

    def close(self) -> None:
        """Lets go of all samples."""
        self._kept = [None] * len(self._batches)

    def inputs(self, index: int) -> Inputs:
        """The present block's inputs in the pruned network, free to be overwritten."""
        return self._free(self[index].student, 0)

    def _made(self, index: int) -> Sample:
        block = self._blocks[self._block]
        pruned, original = self._networks
        batch = self._batches[index]
        with torch.no_grad():
            student = inputs_of(pruned, batch, block)
            if not self._with_targets:
                return Sample(student, {}, None)
            inputs, target = passed(original, batch, block)
        return Sample(student, self._carried(inputs.tensors), target)

    def _moved_on(self, old: Sample, student: Link, teacher: Link) -> Sample:
        """The sample of the present block, from that of the block before."""
        previous = self._blocks[self._block - 1]
        pruned, original = self._networks
        modules = [pruned.get_submodule(path) for path in previous.modules]
        overwrites = self._surveys[0].overwrites[self._block - 1]
        out = run(modules, old.student.mapped(torch.clone) if overwrites else old.student)
        tensors = _followed(student, tensors_in(out), dict(enumerate(old.student.tensors)))
        inputs = self._surveys[0].inputs[self._block].with_tensors(tensors)
        received = _followed(teacher, tensors_in(old.target), old.teacher)
        modules = [original.get_submodule(p) for p in self._blocks[self._block].modules]
        given = self._surveys[1].inputs[self._block].with_tensors(received)
        target = run(modules, self._free(given, 1))
        return Sample(inputs, self._carried(received), target)

    def _free(self, inputs: Inputs, network: int) -> Inputs:
        overwrites = self._surveys[network].overwrites[self._block]
        return inputs.mapped(torch.clone) if overwrites else inputs

    def _carried(self, tensors: Sequence[Tensor]) -> dict[int, Tensor]:
        following = self._surveys[1].links[self._block + 1 :][:1]
        if not following or following[0] is None:
            return {}
        return {i: tensors[i] for kind, i in following[0].sources if kind == "input"}


def _followed(link: Link, outputs: Sequence[Tensor], inputs: dict[int, Tensor]) -> list[Tensor]:
    return [outputs[i] if kind == "output" else inputs[i] for kind, i in link.sources]

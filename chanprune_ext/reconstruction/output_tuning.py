"""The end of a network, tuned on the network's own output: its last block and all that follows.

What is in front of it need not run again: a copy of the network whose earlier blocks are replaced
by placeholders of the right shape is fed with the last block's inputs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..analysis.calls import run_model
from ..analysis.stand_ins import substitute
from ..compensation.batches import sample_count
from ..compensation.outputs import are_logits
from ..copying import copied
from .block_tuning import settled
from .matching import floating
from .objective import RelativeError, divergence, full_precision, squares
from .report import BlockReport
from .tuning import tune
from .weights import TunedWeights, tunable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..compensation.ledger import Ledger
    from .blocks import Block
    from .feed import Feed
    from .passages import Inputs
    from .tuning import Options

__all__ = ["OUTPUT", "End", "tune_output"]

OUTPUT = "output"
_GENTLER = (
    0.1  # of the learning rate: an image is one sample here, and hundreds of pixels in a block
)


class _Placeholder(nn.Module):
    """Stands for a block that need not run."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.value


@dataclass(frozen=True)
class Batches:
    """One of the two sets of samples.

    Attributes:
        feed: Opened at the last block.
        inputs: Of the whole network.
        targets: The original's outputs.
    """

    feed: Feed
    inputs: Sequence[Any]
    targets: Sequence[list[Tensor]]


class End:
    """A network from one of its blocks on.

    Args:
        model: The network.
        last: The block.
        earlier: The blocks before it.
        outputs: What the earlier ones return for some samples.
        samples: How many samples these are.
    """

    def __init__(
        self,
        model: nn.Module,
        last: Block,
        earlier: Sequence[Block],
        outputs: Sequence[Any],
        samples: int,
    ) -> None:
        skipped = [model.get_submodule(path) for block in earlier for path in block.modules]
        kept = {
            id(tensor): tensor
            for module in skipped
            for tensor in (*module.parameters(), *module.buffers())
        }
        self.model = copied(model, kept)
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in self.model.parameters()):
            self._replace(earlier)
            self.model.float()
        else:
            self._replace(earlier)
        self._outputs = outputs
        self._samples = samples
        self._entry = self.model.get_submodule(last.modules[0])

    def _replace(self, blocks: Sequence[Block]) -> None:
        self._placeholders: list[list[_Placeholder]] = []
        for block in blocks:
            self._placeholders.append([])
            for path in block.modules:
                above, _, name = path.rpartition(".")
                placeholder = _Placeholder()
                setattr(self.model.get_submodule(above), name, placeholder)
                self._placeholders[-1].append(placeholder)

    def __call__(self, batch: Any, inputs: Inputs) -> list[Tensor]:
        """The network's floating-point outputs, given the inputs of the last block."""
        samples = sample_count(batch)

        def blank(tensor: Tensor) -> Tensor:
            shape = list(tensor.shape)
            if shape and shape[0] == self._samples:
                shape[0] = samples
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            return torch.zeros(shape, dtype=dtype, device=tensor.device)

        for placeholders, output in zip(self._placeholders, self._outputs, strict=True):
            for placeholder in placeholders:
                placeholder.value = substitute(output, blank)
        handle = self._entry.register_forward_pre_hook(
            lambda *_: (inputs.args, inputs.kwargs), prepend=True, with_kwargs=True
        )
        try:
            return floating(run_model(self.model, substitute(batch, full_precision)))
        finally:
            handle.remove()


def tune_output(
    end: End,
    modules: Mapping[str, tuple[nn.Module, nn.Module]],
    sets: tuple[Batches, Batches],
    wanted: Callable[[Tensor], bool],
    options: Options,
    ledger: Ledger,
    *,
    logits: bool = True,
) -> BlockReport:
    """Tunes the end of a network on the network's output.

    Args:
        end: The end of a copy.
        modules: Path -> module in the network and in the copy, of all modules that run there.
        sets: What to tune on and what to judge by.
        wanted: Whether a parameter may change.
        options: How.
        ledger: Notes every tensor before it changes.
        logits: Whether an output that may be a matrix of logits is one.
    """
    start = time.perf_counter()
    fit, judge = sets
    logits = logits and are_logits(fit.targets[0])
    relative = RelativeError(fit.targets)
    report = BlockReport(OUTPUT, tuple(modules), kept_in_memory=fit.feed.share_kept)
    for parameter in end.model.parameters():
        parameter.requires_grad_(False)
    found = [item for mine, other in modules.values() for item in tunable([mine], [other], wanted)]
    if not found:
        return replace(report, left="all its parameters are frozen or shared with other parts")
    weights = TunedWeights((copy, beside) for _, copy, beside in found)
    report = replace(report, parameters=weights.count)

    def outputs(batches: Batches, index: int) -> list[Tensor]:
        return end(batches.inputs[index], batches.feed.inputs(index).mapped(full_precision))

    def loss_of(index: int) -> Tensor:
        with options.autocast():
            ours = outputs(fit, index)
        measure = divergence if logits else relative
        return measure(ours, fit.targets[index])

    @torch.no_grad()
    def judged() -> float:
        total = weight = 0.0
        for index, target in enumerate(judge.targets):
            ours = outputs(judge, index)
            if logits:
                total += float(divergence(ours, target)) * len(target[0])
                weight += len(target[0])
            else:
                error, energy = squares(ours, target)
                total, weight = total + float(error), weight + float(energy)
        return total / weight if weight > 0 else total

    gentle = replace(options.schedule, lr=_GENTLER * options.schedule.lr)
    tuned = tune(weights, len(fit.feed), loss_of, judged, replace(options, schedule=gentle))
    after = tuned.error_after
    if tuned.epoch:
        settled(
            [(real, copy) for real, copy, _ in found], tuned.error_before, lambda: after, ledger
        )
    return replace(
        report,
        error_before=tuned.error_before,
        error_after=after,
        steps=tuned.steps,
        epoch=tuned.epoch,
        seconds=time.perf_counter() - start,
        left=None if tuned.epoch else "no epoch lowered its error",
    )

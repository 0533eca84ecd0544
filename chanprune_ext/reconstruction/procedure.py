"""Blocks tuned one after another until each returns what it returned before the pruning."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..analysis.call_trace import record_calls
from ..analysis.calls import run_model, tensors_in
from ..compensation.batches import first_samples, read_batches, sample_count, split_batches
from ..compensation.checks import check_networks, inputs_of, kept_of, rescalings_of
from ..compensation.ledger import Ledger
from ..compensation.memory import free_memory
from ..compensation.outputs import DeviationMeter, forward, output_tensors
from ..errors import InvalidArgumentError
from ..host_memory import freed_memory_kept
from ..module_modes import evaluating
from ..plan import plan_of
from ..precision import in_software
from .block_tuning import tune_block
from .blocks import Block, find_blocks
from .checks import check_options, check_parts
from .feed import Feed
from .matching import Matching, UnmatchedError, match_outputs
from .output_tuning import OUTPUT, Batches, End, tune_output
from .passages import entry_order, survey
from .report import BlockReport, ReconstructionReport
from .tuning import DivergedError, Options, Schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ..compensation.report import Deviation
    from ..plan import PruningPlan

__all__ = ["reconstruct"]

_log = logging.getLogger(__name__)
_SURVEYED = 2  # samples that tell how the network runs


def reconstruct(
    pruned: nn.Module,
    original: nn.Module,
    batches: Any,
    *,
    epochs: int = 5,
    lr: float = 1e-2,
    batch_size: int = 32,
    held_back: float = 0.1,
    augment: Callable[[Any], Any] | None = None,
    views: int = 0,
    amp: torch.dtype | None = None,
    tune_blocks: bool = True,
    tune_outputs: bool = True,
    output_blocks: int = 1,
    memory_limit: int | None = None,
    logits: bool = True,
    seed: int = 0,
    progress: bool = True,
    plan: PruningPlan | None = None,
) -> ReconstructionReport:
    """Tunes the weights that are left, block by block, to the original's block outputs.

    Every block gets the inputs it has in the pruned network, all blocks before it already tuned,
    and its weights are moved by gradient until it returns what the block of the original returns
    from the original's own inputs; so each block also repairs what arrives wrong from the blocks
    before. No labels are needed, and no gradient runs through more than one block. In the end the
    last block, or the last few, and all that follows are tuned on the network's output. Call
    :func:`chanprune_ext.compensate` first: it does in closed form what it can, and this goes on
    from there.

    Block-wise reconstruction after Li et al., BRECQ (ICLR 2021) for quantisation, and Wang et al.,
    MiR (ICCV 2022) and Practise (CVPR 2023) for few-sample pruning; asymmetric inputs after He,
    Zhang, Sun (ICCV 2017).

    Held-back samples judge every epoch of every block, the best is kept, and a block that got no
    better is left as it was; so is one whose tuning fails or diverges, and the report names it. If
    the network's outputs on the held-back samples are not better in the end, all of it is undone.
    Training flags, gradients, ``requires_grad`` and the global random state stay as they are; batch
    norms use their running statistics throughout. Parameters that do not require gradients, or that
    are used in several blocks, keep their values.

    Args:
        pruned: Network after pruning; changed in place.
        original: Network before pruning; not changed.
        batches: Inputs to tune on, as for :func:`chanprune_ext.compensate`; all are kept in memory.
        epochs: Passes over the samples for every block.
        lr: Peak learning rate of Adam, in units of the root mean square of each filter: 0.01 moves
            a typical weight by 1 % a step. Cosine to zero. A tenth of it for the network's output.
        batch_size: Samples of a step.
        held_back: Share of the samples to judge by, in [0, 1). 0: the samples of the fit judge.
            Samples that ``pruned`` was compensated on judge in favour of what is there: where they
            are as few as the columns of a layer (one image a class), hold none of them back.
        augment: Makes another view of a batch of inputs, of the same structure. It is not applied
            to held-back samples.
        views: How many such views of each batch are tuned on besides the batch as it is.
        amp: Type of autocast while gradients are taken, such as ``torch.bfloat16``; those in
            float16 are scaled. Weights, errors that decide, and everything else stay in float32,
            also for half-precision networks.
        tune_blocks: Tune the blocks. False: the end of the network only, which takes a fraction of
            the time and is most of the gain where a classifier has lost many of its features.
        tune_outputs: Tune the end of the network on its output, by KL divergence where that is a
            matrix of logits. False: blocks only.
        output_blocks: With how many blocks that end begins, of those that enclose pruned channels.
        memory_limit: Most bytes of block inputs and targets to keep; the rest is computed anew when
            needed. None: half of what is free.
        logits: Take an output that is one matrix of several columns for logits, to tune and judge
            by KL divergence. False: by relative squared error, as it should be for a regression.
        seed: Of the order of batches, and of the global random state inside ``augment``.
        progress: Show a progress bar on a terminal.
        plan: The plan ``pruned`` was made by. None: the plan that ``pruned`` carries.

    Returns:
        What was done, block by block, and the output deviations before and after.

    Raises:
        InvalidArgumentError: an argument is out of range, the data can't be used, or weights or
            data are not finite.
        PlanMismatchError: ``pruned`` was not made from ``original`` by the plan.
        AnalysisError: the forward of ``original`` raised.
    """
    start = time.perf_counter()
    check_options(epochs, lr, batch_size, held_back, views, augment, amp, memory_limit, seed)
    check_parts(tune_blocks, tune_outputs, output_blocks)
    made_by = plan_of(pruned) if plan is None else plan
    kept = kept_of(pruned, made_by)
    if made_by is None:
        raise InvalidArgumentError(
            "pruned: parts of it were pruned on their own, and it carries no plan of the whole; "
            "reconstruct each part beside the original's, or prune the whole network, with "
            "ratio=0 and ratios={'part.*': 0.5}, say"
        )
    device = check_networks(pruned, original, kept)
    slow = in_software(device.type, amp)
    if slow is not None:
        warnings.warn(f"{slow}; leave amp out", UserWarning, stacklevel=2)
    items = read_batches(batches, original, device=device, inputs=inputs_of(pruned, made_by))
    ledger = Ledger()
    with _surroundings(pruned, original, device, seed):
        data = split_batches(items, original, held_back=held_back, batch_size=batch_size)
        del items
        fit = list(data.fit)
        if augment is not None:
            fit += [_view(batch, augment, original) for _ in range(views) for batch in data.fit]
        judges = data.held_back or data.fit
        session = _Session(pruned, original, made_by, fit, judges, device, logits)
        options = Options(Schedule(epochs, lr), amp, device, torch.Generator().manual_seed(seed))
        try:
            before = session.deviation()
            limit = free_memory(device) // 2 if memory_limit is None else int(memory_limit)
            end = output_blocks if tune_outputs else 0
            blocks = session.tune(options, limit, tune_blocks, end, ledger, progress)
            after = session.deviation()
            better = after.better_than(before)
            if not better:
                ledger.restore()
        except BaseException:
            ledger.restore()
            raise
    told = "held-back samples" if data.held_back else "samples tuned on"
    report = ReconstructionReport(
        kept="reconstructed" if better else "before",
        reason=f"the outputs on the {told} are {'closer' if better else 'no closer'}",
        samples=sum(sample_count(batch) for batch in fit),
        held_back=data.held_back_samples,
        before=before,
        after=after,
        blocks=tuple(blocks),
        seconds=time.perf_counter() - start,
    )
    _log.info("%s", report)
    return report


def _view(batch: Any, augment: Callable[[Any], Any], original: nn.Module) -> Any:
    """Another view of a batch; of another size or structure only if the network can take it."""
    view = augment(batch)
    shapes = [[list(t.shape) for t in tensors_in(inputs)] for inputs in (batch, view)]
    if shapes[0] != shapes[1]:
        try:
            run_model(original, view)
        except Exception as error:
            raise InvalidArgumentError(
                "augment: expected a view that the network takes as it takes the batch, of shapes "
                f"{shapes[0]}, but its forward failed on what came back, {shapes[1]}: {error}"
            ) from error
    return view


@contextlib.contextmanager
def _surroundings(
    pruned: nn.Module, original: nn.Module, device: torch.device, seed: int
) -> Iterator[None]:
    """Eval mode, submodules that run one by one, no autocast, a random state of our own."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            freed_memory_kept(),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            evaluating(pruned),
            evaluating(original),
        ):
            torch.manual_seed(seed)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


class _Session:
    """The networks, the data, and the blocks."""

    def __init__(
        self,
        pruned: nn.Module,
        original: nn.Module,
        plan: PruningPlan,
        fit: Sequence[Any],
        judges: Sequence[Any],
        device: torch.device,
        logits: bool,
    ) -> None:
        self._pruned = pruned
        self._original = original
        self._plan = plan
        self._fit = fit
        self._judges = judges
        self._device = device
        self._logits = logits
        self._reference = [output_tensors(forward(original, batch)) for batch in judges]
        few = first_samples(judges[0], _SURVEYED, original)
        self._few = sample_count(few)
        self._order = entry_order(original, few)
        self._trace = record_calls(original, few)
        self._blocks, self._left = find_blocks(original, plan.groups, self._order)
        self._surveys = survey(pruned, few, self._blocks), survey(original, few, self._blocks)
        self._parameters = dict(pruned.named_parameters())

    def deviation(self) -> Deviation:
        """How far the pruned network's outputs are off as it is now."""
        meter = DeviationMeter(logits=self._logits)
        for reference, batch in zip(self._reference, self._judges, strict=True):
            meter.add(reference, output_tensors(forward(self._pruned, batch)))
        return meter.deviation()

    def tune(
        self,
        options: Options,
        limit: int,
        every_block: bool,
        output_blocks: int,
        ledger: Ledger,
        progress: bool,
    ) -> list[BlockReport]:
        """Tunes all blocks in order, then the end of the network if it has any."""
        networks = self._pruned, self._original, self._blocks, self._surveys
        share = len(self._judges) / (len(self._judges) + len(self._fit))
        judge = Feed(*networks, self._judges, int(share * limit))
        fit = Feed(*networks, self._fit, limit - int(share * limit))
        reports: list[BlockReport] = []
        alone = self._blocks if every_block else []
        if output_blocks:  # what follows the last block around a group is tuned on the output only
            alone = alone[: self._end(1) + 1]
        names = [block.name for block in alone]
        with _Progress([*names, OUTPUT] if output_blocks else names, progress) as bar:
            for i, block in enumerate(alone):
                bar.next()
                fit.open(i)
                judge.open(i)
                reports.append(self._tuned(i, block, (fit, judge), options, ledger))
                _log.debug("%s", reports[-1])
            if output_blocks:
                bar.next()
                first = self._end(output_blocks)
                if len(alone) != first + 1:
                    fit.open(first, targets=False)
                    judge.open(first, targets=False)
                reports.append(self._end_tuned(first, (fit, judge), options, limit, ledger))
        reports += [BlockReport(path, (path,), left=why) for path, why in self._left.items()]
        return reports

    def _end(self, blocks: int) -> int:
        """Position of the block that an end with so many blocks around groups begins with."""
        enclosing = [i for i, block in enumerate(self._blocks) if block.encloses]
        if not enclosing:
            return len(self._blocks) - 1
        return max(enclosing[-blocks:][0], min(1, enclosing[-1]))

    def _tuned(
        self,
        index: int,
        block: Block,
        feeds: tuple[Feed, Feed],
        options: Options,
        ledger: Ledger,
    ) -> BlockReport:
        modules = [self._pruned.get_submodule(path) for path in block.modules]
        try:
            matching = self._matching(index)
            wanted = self._wanted(block.holds)
            return tune_block(block, modules, feeds, matching, wanted, options, ledger)
        except (UnmatchedError, DivergedError) as error:
            return BlockReport(block.name, block.modules, left=str(error))
        except Exception as error:  # noqa: BLE001 - one block must not cost the others
            _log.warning("block %s could not be tuned", block.name, exc_info=True)
            reason = f"{type(error).__name__}: {error}"
            return BlockReport(block.name, block.modules, left=reason)

    def _matching(self, index: int) -> Matching:
        pruned, original = (survey.outputs[index] for survey in self._surveys)
        shapes = self._plan.fingerprint["tensors"]
        block = self._blocks[index]
        rescaled = {r.entry for r in rescalings_of(self._pruned, self._plan)}
        kept = self._plan.kept
        return match_outputs(block, original, pruned, self._trace, kept, rescaled, shapes)

    def _wanted(self, inside: Callable[[str], bool]) -> Callable[[Tensor], bool]:
        """Whether a parameter may change: it requires gradients, and nothing outside uses it."""
        outside = {
            id(self._parameters[entry])
            for call in self._trace.calls
            if not inside(call.module)
            for entry in call.parameters.values()
            if entry in self._parameters
        }
        for name, parameter in self._pruned.named_parameters(remove_duplicate=False):
            if not inside(name.rpartition(".")[0]):
                outside.add(id(parameter))
        return lambda parameter: parameter.requires_grad and id(parameter) not in outside

    def _end_tuned(
        self,
        first: int,
        feeds: tuple[Feed, Feed],
        options: Options,
        limit: int,
        ledger: Ledger,
    ) -> BlockReport:
        reason = self._no_end(first, feeds, limit)
        if reason is not None:
            return BlockReport(OUTPUT, (), left=reason)
        try:
            earlier = self._blocks[:first]
            outputs = self._surveys[0].outputs[:first]
            end = End(self._pruned, self._blocks[first], earlier, outputs, self._few)
            start = self._order[self._blocks[first].modules[0]][0]
            paths = [path for path, entered in self._order.items() if path and entered[0] >= start]
            modules = {
                path: (self._pruned.get_submodule(path), end.model.get_submodule(path))
                for path in paths
                if list(self._pruned.get_submodule(path).parameters(recurse=False))
            }
            targets = [output_tensors(forward(self._original, batch)) for batch in self._fit]
            sets = (
                Batches(feeds[0], self._fit, targets),
                Batches(feeds[1], self._judges, self._reference),
            )
            wanted = self._wanted(lambda path: path in modules)
            return tune_output(end, modules, sets, wanted, options, ledger, logits=self._logits)
        except DivergedError as error:
            return BlockReport(OUTPUT, (), left=str(error))
        except Exception as error:  # noqa: BLE001 - one block must not cost the others
            _log.warning("the end of the network could not be tuned", exc_info=True)
            return BlockReport(OUTPUT, (), left=f"{type(error).__name__}: {error}")

    def _no_end(self, first: int, feeds: tuple[Feed, Feed], limit: int) -> str | None:
        if first < 1:
            return "the network is a single block"
        samples = sum(sample_count(batch) for batch in self._fit)
        judged = sum(sample_count(batch) for batch in self._judges)
        needed = sum(t.nbytes for ts in self._reference for t in ts) * samples // judged
        free = limit - sum(feed.bytes for feed in feeds)
        if needed > free:
            return f"the outputs of all samples take {needed:,} bytes, of which {free:,} are left"
        return None


class _Progress:
    """A bar over the blocks, on a terminal."""

    def __init__(self, names: Sequence[str], visible: bool) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._names = iter(names)
        self._bar = Progress(
            console=Console(stderr=True),
            transient=True,
            disable=not (visible and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task("reconstructing", total=len(names))
        self._started = False

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def next(self) -> None:
        """Goes on to the next block."""
        name = next(self._names)
        advance = 1 if self._started else 0
        self._bar.update(self._task, description=f"reconstructing {name}", advance=advance)
        self._started = True

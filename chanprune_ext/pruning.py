"""From a model to a plan, and to a pruned model: analyse, score, allocate, verify."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from chanprune_ext.allocation.measured_budget import plan_within
from chanprune_ext.allocation.named_channels import channel_lists
from chanprune_ext.allocation.removal import verified_removal
from chanprune_ext.allocation.selection import Budget, Goal, Selection, is_whole
from chanprune_ext.analysis import Analysis, analyse
from chanprune_ext.analysis.couplings import aliases_of, couplings_of
from chanprune_ext.analysis.stand_ins import substitute
from chanprune_ext.criteria import Criterion, score_groups
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.garbage import collector_paused
from chanprune_ext.group_summary import GroupSummary
from chanprune_ext.module_tree import structure_remembered
from chanprune_ext.plan import PruningPlan, structure_of
from chanprune_ext.plan_warnings import warn_of_branches, warn_of_unreached
from chanprune_ext.surgery import apply_plan
from chanprune_ext.verification import input_shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


__all__ = ["plan", "prune"]


def plan(
    model: nn.Module,
    example_inputs: Any,
    ratio: float | None = None,
    *,
    criterion: str | Criterion = "l1",
    scope: str = "local",
    ratios: Mapping[str, float] | None = None,
    threshold: float | None = None,
    budget: Budget | None = None,
    remove: Mapping[str, Iterable[int]] | None = None,
    round_to: int = 1,
    ignore: Sequence[str] | None = (),
    kinds: Sequence[str] | None = None,
    outputs: Callable[[Any], Any] | None = None,
    max_ratio: float = 0.9,
    normalise: str | None = None,
    seed: int = 0,
) -> PruningPlan:
    """Decide which channels of ``model`` to remove. The model is left untouched.

    Args:
        model: Any eager module with convolutions or linear layers.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs.
        ratio: Fraction of the channels to remove from every group, in [0, 1). Default 0.5, beside
            ``ratios`` too: groups that no glob names lose this much. ``ratio=0`` leaves those
            alone.
        criterion: ``"l1"``, ``"l2"``, ``"linf"``, ``"bn_scale"``, ``"fpgm"``, ``"random"``, or a
            function ``(model, groups, seed)`` returning one array of scores per group.
        scope: ``"local"`` removes the ratio from each group; ``"global"`` ranks all channels
            together, scores divided by their group's mean. Of equal scores every group loses the
            same share. ``"isomorphic"`` ranks together only groups of the same build (heads with
            heads, the inside of blocks with that of others), each build losing the ratio (Fang et
            al., Isomorphic Pruning for Vision Models, ECCV 2024).
        ratios: Glob on the names of the modules that make a group's channels -> ratio; a later
            glob overrides an earlier one. Beside a budget these groups lose just that, and the
            others what the budget still asks for.
        threshold: Remove every channel whose score is below this, instead of a ratio.
        budget: Meet a budget on MACs, parameters, measured latency and/or file size with one
            common ratio (or, with another scope than ``"local"``, a common threshold), instead of a
            ratio. What was reached is in the plan's ``options["reached"]``; for latency see
            :func:`chanprune_ext.allocation.measured_budget.plan_within`.

            Only one of ``ratio``, ``threshold``, ``budget`` and ``remove`` may be given; ``ignore``
            and ``max_ratio`` go with each of the first three, ``ratios`` with ``ratio`` and
            ``budget``.
        remove: Name of a module -> indices of its output channels: just these go, all that hangs
            together with them, and nothing else. It may be a norm that they pass through, or one
            parameter of a module. No criterion is asked then. Of a channel that only leaves
            together with others of its layer (a head, a pair of rotary positions) all of them go;
            ``kinds`` says which way where there are several.
        round_to: Make kept widths multiples of this where a group is wide enough. One that has no
            smaller multiple stays whole, and the plan's ``frozen`` says so.
        ignore: Globs on the names of modules whose channels must all stay.
        kinds: Prune only groups of these kinds: ``"heads"`` (whole attention heads), ``"head_dim"``
            (the width of every head), ``"residual"`` (channels that one path adds to another),
            ``"mlp"`` (inside a block, made by a linear layer), ``"hidden"`` (inside, made by a
            convolution); groups that a glob of ``ratios`` names are pruned as well. Default: all,
            of heads and their width the one with more to choose from.
        outputs: Picks, from what the model returns, what must keep its shape (``lambda out:
            out.logits``). Default: everything that is returned.
        normalise: What ranking across groups divides a group's scores by: their ``"mean"``,
            ``"max"``, ``"l2"`` norm, or ``"none"`` where scores of all groups are losses in one
            unit; these are weighed against the MACs or parameters they save where there is a
            budget. ``"lamp"``: the square of a score over the sum of its own and all larger ones'
            in the group, for norms (Lee et al., Layer-adaptive Sparsity for the Magnitude-based
            Pruning, ICLR 2021; there for single weights). Default: ``"none"`` for criteria that
            say so (``criterion.comparable``), else ``"mean"``.
        max_ratio: Most that ranking across groups, a threshold or a budget may take from one group.
        seed: Seed of criteria that draw numbers.

    Returns:
        A verified plan: the pruned network has been run on stand-in tensors.

    Raises:
        InvalidArgumentError: An argument is out of range, names no group or a channel that must
            stay, or is given beside one that makes it void.
        NothingToPruneError: No channel may be removed.
        AnalysisError: The model's forward raised.
        VerificationError: The pruned network would not run as predicted.
    """
    _check_alternatives(ratio, ratios, threshold, budget)
    if remove is not None:
        _check_alone(ratio=ratio, ratios=ratios, threshold=threshold, budget=budget, ignore=ignore)
        ratio = 0.0
    if not isinstance(criterion, str) and not callable(criterion):
        raise InvalidArgumentError(
            f"criterion must be the name of a criterion, such as 'l1', or a function (model, "
            f"groups, seed), got {criterion!r}"
        )
    if not is_whole(seed):
        raise InvalidArgumentError(f"seed must be an int, got {seed!r}")
    selection = Selection(
        ratio=0.5 if ratio is None else ratio,
        ratios={} if ratios is None else ratios,
        scope=scope,
        threshold=threshold,
        budget=budget,
        round_to=round_to,
        ignore=() if ignore is None else _several("ignore", ignore),
        kinds=None if kinds is None else _several("kinds", kinds),
        max_ratio=max_ratio,
        normalise=normalise or ("none" if getattr(criterion, "comparable", False) else "mean"),
        remove=None if remove is None else channel_lists(remove),
    )
    with _at_work(model):
        analysis = analyse(model, example_inputs, outputs)
    warn_of_branches(analysis)
    scores, name = [], "none: channels were named"
    if remove is None:
        scores = score_groups(model, analysis.groups, criterion, int(seed))
        name = criterion if isinstance(criterion, str) else _name_of(criterion)

    def plan_for(goals: tuple[Goal, ...]) -> PruningPlan:
        wanted = replace(selection, goals=goals)
        return plan_of_scores(
            analysis, model, example_inputs, scores, wanted, name, int(seed), outputs=outputs
        )

    if budget is not None and (budget.latency is not None or budget.file_size is not None):
        made = plan_within(budget, analysis, model, example_inputs, plan_for)
    else:
        made = plan_for(())
    warn_of_unreached(analysis, model, made)
    return made


def plan_of_scores(
    analysis: Analysis,
    model: nn.Module,
    example_inputs: Any,
    scores: Sequence[np.ndarray],
    selection: Selection,
    criterion: str,
    seed: int,
    *,
    outputs: Callable[[Any], Any] | None = None,
    whole: Iterable[int] = (),
) -> PruningPlan:
    """A verified plan for a model that has been analysed and scored.

    Args:
        analysis: Groups of the model.
        model: The model; left untouched.
        example_inputs: What it was analysed with.
        scores: One score per unit of each group, high = keep.
        selection: How much goes, and where.
        criterion: Name of what gave the scores.
        seed: What the criterion drew its numbers from.
        outputs: As for :func:`plan`.
        whole: Indices of groups that must stay whole.
    """
    names = [name for name, _ in model.named_parameters()]
    before = analysis.sizes(analysis.removed_labels({}))
    with _at_work(model):
        removal = verified_removal(analysis, model, example_inputs, scores, selection, names, whole)
    budget, removed = selection.budget, selection.remove
    return PruningPlan(
        kept={
            entry: {dim: torch.from_numpy(np.flatnonzero(mask)) for dim, mask in dims.items()}
            for entry, dims in removal.masks.items()
        },
        attributes=removal.attributes,
        rescalings=removal.rescalings,
        caches=tuple(sorted(analysis.trace.caches)),
        groups=group_summaries(analysis, removal.units),
        frozen=(*analysis.frozen, *removal.held),
        params_before=before.params(names),
        params_after=removal.sizes.params(names),
        macs_before=before.macs(),
        macs_after=removal.sizes.macs(),
        criterion=criterion,
        options={
            "ratio": selection.ratio,
            "ratios": dict(selection.ratios),
            "scope": selection.scope,
            "threshold": selection.threshold,
            "budget": None if budget is None else budget.fractions(),
            "remove": None if removed is None else {n: list(c) for n, c in removed.items()},
            "round_to": selection.round_to,
            "ignore": list(selection.ignore),
            "kinds": None if selection.kinds is None else list(selection.kinds),
            "max_ratio": selection.max_ratio,
            "normalise": selection.normalise,
            "seed": seed,
            "substrate": analysis.trace.substrate,
        },
        fingerprint=structure_of(model, removal.masks),
        inputs=input_shapes(example_inputs),
        deferred_couplings=functools.partial(couplings_of, analysis, aliases_of(model)),
        outputs=outputs,
        example_inputs=substitute(example_inputs, Tensor.detach),
    )


def _several(argument: str, value: Any) -> tuple[str, ...]:
    """One str or several of them, as a tuple."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable):
        raise InvalidArgumentError(f"{argument} must be a str or several of them, got {value!r}")
    return tuple(value)


def _check_alternatives(
    ratio: float | None,
    ratios: Mapping[str, float] | None,
    threshold: float | None,
    budget: Budget | None,
) -> None:
    """A threshold or a budget decides how much goes: a ratio beside it would be void."""
    decides = "threshold" if threshold is not None else "budget" if budget is not None else ""
    named = "ratios" if ratios and threshold is not None else ""
    given = "ratio" if ratio is not None else named
    if decides and given:
        raise InvalidArgumentError(
            f"give either {given} or {decides}, not both: {decides} alone decides how many "
            f"channels go; name layers that should keep theirs with ignore, and set the most that "
            f"one group may lose with max_ratio"
        )


def _check_alone(**others: Any) -> None:
    """Channels that are named are all that goes."""
    for name, value in others.items():
        if value is not None and value != () and value != {}:
            raise InvalidArgumentError(
                f"give either {name} or remove, not both: remove alone says which channels go"
            )


def prune(
    model: nn.Module,
    example_inputs: Any,
    ratio: float | None = None,
    *,
    inplace: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    verify: str | None = "replay",
    **options: Any,
) -> nn.Module:
    """Remove channels from ``model``: :func:`plan` and :meth:`PruningPlan.apply` in one call.

    Args:
        model: Any eager module; left untouched unless ``inplace``.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs.
        ratio: Fraction of the channels to remove from every group, in [0, 1). Default 0.5.
        inplace: Change ``model`` itself.
        optimizer: An optimizer over the model's parameters, to be carried over.
        verify: ``"replay"``, ``"numeric"`` or None, as for :meth:`PruningPlan.apply`.
        **options: Further arguments of :func:`plan`.

    Returns:
        A smaller module of the same class. Its plan is ``chanprune_ext.plan_of(module)``.

    Example:
        >>> pruned = chanprune_ext.prune(resnet50(), torch.randn(1, 3, 224, 224), ratio=0.5)
    """
    made = plan(model, example_inputs, ratio, **options)
    with _at_work(model):
        return apply_plan(
            made, model, inplace=inplace, optimizer=optimizer, verify=verify, replayed=True
        )


@contextlib.contextmanager
def _at_work(model: nn.Module) -> Iterator[None]:
    """While a model is looked at from all sides, and nobody else is to change it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(collector_paused())
        if isinstance(model, nn.Module):  # else the analysis says so
            stack.enter_context(structure_remembered(model))
        yield


def _name_of(criterion: Criterion) -> str:
    return str(getattr(criterion, "__name__", type(criterion).__name__))


def group_summaries(
    analysis: Analysis, removed: Mapping[int, np.ndarray]
) -> tuple[GroupSummary, ...]:
    """What a removal does to every group; ``removed`` maps group index -> bool (units,)."""
    summaries = []
    for group in analysis.groups:
        kept = (
            group.units - int(removed[group.index].sum()) if group.index in removed else group.units
        )
        summaries.append(
            GroupSummary(
                group.name,
                group.producers,
                group.consumers,
                group.units * group.multiplicity,
                kept * group.multiplicity,
                group.normalised,
                group.kind,
            )
        )
    return tuple(summaries)

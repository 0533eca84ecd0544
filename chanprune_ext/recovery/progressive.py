"""Pruning in several stages, each of them recovered before the next one cuts deeper."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..allocation.selection import Selection
from ..analysis import analyse
from ..compensation import compensate
from ..copying import copied
from ..criteria import score_groups
from ..errors import InvalidArgumentError
from ..plan import plans_of
from ..pruning import plan as make_plan
from ..pruning import plan_of_scores
from .feature_matching import composed_kept
from .fine_tuning import recover
from .recipe import Recipe

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from ..plan import PruningPlan
    from .result import RecoveryResult

__all__ = ["ProgressiveResult", "ProgressiveStage", "prune_progressively"]

SCHEDULES = ("linear", "cubic")


@dataclass(frozen=True)
class _Kept:
    """What all stages so far have kept of the original's indices."""

    kept: Mapping[str, Mapping[int, Tensor]]


@dataclass(frozen=True)
class ProgressiveStage:
    """One round of pruning, compensation and recovery.

    Attributes:
        done (float): share of the removal that is done after it, 0 to 1.
        params (int): parameters after it.
        macs (int): multiply-accumulates after it, on the example inputs.
        compensation (str | None): what compensation kept; None without calibration data.
        recovery (RecoveryResult): its training.
    """

    done: float
    params: int
    macs: int
    compensation: str | None
    recovery: RecoveryResult


@dataclass(frozen=True)
class ProgressiveResult:
    """A network pruned in stages.

    Attributes:
        model (nn.Module): the pruned network.
        stages (tuple[ProgressiveStage, ...]): in order.
    """

    model: nn.Module
    stages: tuple[ProgressiveStage, ...]

    def __repr__(self) -> str:
        left = f", {self.stages[-1].params:,} params left" if self.stages else ""
        return (
            f"<{type(self).__name__}: {type(self.model).__name__} pruned in {len(self.stages)} "
            f"stages{left}>"
        )

    def __str__(self) -> str:
        lines = [f"pruned in {len(self.stages)} stages"]
        for number, stage in enumerate(self.stages, start=1):
            measured = stage.recovery.last or "not measured"
            lines.append(
                f"  {number}: {stage.done:.0%} of the removal, params {stage.params:,}, "
                f"MACs {stage.macs:,}; {measured}"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The stages as plain numbers, strings, lists and dicts."""
        return {
            "stages": [
                {**asdict(stage), "recovery": stage.recovery.to_dict()} for stage in self.stages
            ]
        }


def prune_progressively(
    model: nn.Module,
    example_inputs: Any,
    ratio: float | None = None,
    *,
    train: Dataset[Any] | Iterable[Any],
    val: Dataset[Any] | Iterable[Any] | None = None,
    calibration: Any = None,
    stages: int = 3,
    schedule: str = "cubic",
    distil: bool = True,
    recipe: Recipe | None = None,
    recover_settings: Mapping[str, Any] | None = None,
    progress: bool = True,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    resume: str | None = None,
    checkpoint_every: int | None = None,
    **plan_options: Any,
) -> ProgressiveResult:
    """Prunes a copy of ``model`` in stages: prune, compensate, recover, and again.

    The widths to end with are those of ``plan(model, example_inputs, ratio, **plan_options)``.
    After stage ``i`` of ``n`` each group has lost the share ``f`` of what it will lose: ``i / n``
    (linear), or ``1 - (1 - i / n)^3`` (cubic: Zhu and Gupta 2017), which cuts most while there is
    most to spare. Which channels go is decided anew in every stage, on the recovered network.

    Args:
        model (nn.Module): trained classifier; left untouched. It is the teacher of every stage.
        example_inputs (Any): as for :func:`chanprune_ext.plan`.
        ratio (float, optional): likewise.
        train (Dataset or Iterable): as for :func:`recover`.
        val (Dataset or Iterable, optional): likewise.
        calibration (Any, optional): batches for :func:`chanprune_ext.compensate` after each cut.
            Default: None, no compensation.
        stages (int): rounds. Default: 3.
        schedule (str): ``"linear"`` or ``"cubic"``. Default: ``"cubic"``.
        distil (bool): learn from ``model``; otherwise from the labels alone. Default: True.
        recipe (Recipe, optional): settings of each stage's recovery; ``epochs`` are per stage.
        recover_settings (Mapping, optional): what differs from the recipe.
        progress (bool): draw progress bars. Default: True.
        checkpoint_dir (str or PathLike, optional): folder for the checkpoints of each stage's
            recovery, in ``stage-1`` and so on. Default: None, none.
        resume (str, optional): ``"auto"`` goes on where these checkpoints end: what is trained is
            not trained again, cuts and compensation are repeated. Default: None, start anew.
        checkpoint_every (int, optional): as for :func:`recover`.
        **plan_options: of :func:`chanprune_ext.plan`: ``ratios``, ``budget``, ``criterion``...

    Returns:
        ProgressiveResult: the pruned network, of exactly the size of the one-shot plan, and the
        history of each stage.

    Raises:
        InvalidArgumentError: an argument is outside its range.
        ChanpruneError: whatever :func:`plan`, :func:`compensate` and :func:`recover` raise.
    """
    if not isinstance(stages, int) or stages < 1:
        raise InvalidArgumentError(f"stages: expected a number from 1, got {stages!r}")
    if schedule not in SCHEDULES:
        raise InvalidArgumentError(f"schedule: expected 'linear' or 'cubic', got {schedule!r}")
    if resume not in (None, "auto"):
        raise InvalidArgumentError(f"resume: expected None or 'auto', got {resume!r}")
    if checkpoint_dir is None and resume is not None:
        raise InvalidArgumentError("resume: needs the folder of the checkpoints, checkpoint_dir")
    if plan_options.get("remove") is not None and stages > 1:
        raise InvalidArgumentError(
            "remove: stages choose their channels anew; remove these at once, with stages=1"
        )
    chosen = Recipe.of(recipe, recover_settings or {})
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    goal = make_plan(model, example_inputs, ratio, **plan_options)
    current, done = copied(model), []
    for stage in range(1, stages + 1):
        share = stage / stages if schedule == "linear" else 1 - (1 - stage / stages) ** 3
        made: PruningPlan | None = goal
        if stages > 1:
            made = _stage_plan(current, example_inputs, goal, share, plan_options)
        if made is None:
            continue  # rounded to whole channels, this stage has nothing to remove
        pruned = made.apply(current)
        kept = None
        if calibration is not None:
            whole = _Kept(composed_kept(plans_of(pruned)[len(plans_of(model)) :]))
            report = compensate(pruned, model, calibration, plan=whole, progress=progress)
            kept = report.kept
        result = recover(
            pruned,
            model if distil else None,
            train=train,
            val=val,
            recipe=chosen,
            progress=progress,
            checkpoint_dir=None if folder is None else folder / f"stage-{stage}",
            resume=resume,
            checkpoint_every=checkpoint_every,
        )
        current = pruned
        done.append(ProgressiveStage(share, made.params_after, made.macs_after, kept, result))
    return ProgressiveResult(current, tuple(done))


def _stage_plan(
    model: nn.Module,
    example_inputs: Any,
    goal: PruningPlan,
    share: float,
    options: Mapping[str, Any],
) -> PruningPlan | None:
    """The plan from the present widths to those after ``share`` of the removal; None if equal.

    Groups are told apart by their place: a name may stand for several, heads and their width.
    """
    outputs = options.get("outputs")
    analysis = analyse(model, example_inputs, outputs)
    if [g.name for g in analysis.groups] != [g.name for g in goal.groups]:
        raise InvalidArgumentError(
            "stages: what is left of this network after a stage has other groups of channels than "
            "before; prune it at once with stages=1"
        )
    ratios = {}
    for group, aim in zip(analysis.groups, goal.groups, strict=True):
        target = aim.width_before - int(share * (aim.width_before - aim.width_after) + 0.5)
        ratios[group.index] = max(0.0, 1 - target / (group.units * group.multiplicity))
    if not any(ratios.values()):
        return None
    scores = score_groups(
        model, analysis.groups, options.get("criterion", "l1"), goal.options["seed"]
    )
    made = plan_of_scores(
        analysis,
        model,
        example_inputs,
        scores,
        Selection.of_groups(ratios),
        goal.criterion,
        goal.options["seed"],
        outputs=outputs,
    )
    if share == 1 and (made.params_after, made.macs_after) != (goal.params_after, goal.macs_after):
        raise InvalidArgumentError(
            f"stages: the last one would end at {made.params_after:,} parameters and "
            f"{made.macs_after:,} MACs, the plan at {goal.params_after:,} and "
            f"{goal.macs_after:,}: the widths of this network are tied in a way that stages "
            "cannot follow; prune it at once with stages=1"
        )
    return made

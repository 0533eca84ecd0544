"""Training that makes a cut painless: what a plan removes is driven towards zero beforehand."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InvalidArgumentError
from ..plan import PruningPlan
from .fine_tuning import checkpoint_folder, train_in_place
from .recipe import Recipe

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable

    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from .result import RecoveryResult

__all__ = ["group_penalty", "sparsify"]

_TINY = 1e-12


def sparsify(
    model: nn.Module,
    plan: PruningPlan,
    teacher: nn.Module | None = None,
    *,
    train: Dataset[Any] | Iterable[Any],
    val: Dataset[Any] | Iterable[Any] | None = None,
    penalty: str = "growing",
    strength: float = 1.0,
    recipe: Recipe | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    keep_checkpoints: int = 2,
    log_dir: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> RecoveryResult:
    """Trains ``model`` in place before the cut, with a penalty on what ``plan`` removes.

    ``plan.apply(model)`` afterwards takes away what has little effect left. The plan still fits:
    training changes no shapes.

    Args:
        model (nn.Module): the network the plan was made for, not yet pruned.
        plan (PruningPlan): what will be removed.
        teacher (nn.Module, optional): as for :func:`recover`; a copy of the network as it came.
        train (Dataset or Iterable): as for :func:`recover`.
        val (Dataset or Iterable, optional): as for :func:`recover`.
        penalty (str): ``"growing"``, an L2 penalty whose strength grows along a line from 0 (GReg:
            Wang et al. 2021, ICLR); or ``"lasso"``, the norm of each removed slice, which has a
            constant pull down to zero (group lasso: Wen et al. 2016). Default: ``"growing"``.
        strength (float): factor of the penalty, at the end of the run for ``"growing"``.
            Default: 1.
        recipe (Recipe, optional): as for :func:`recover`; its weight decay acts besides.
        device (torch.device or str, optional): as for :func:`recover`.
        progress (bool): draw a progress bar. Default: True.
        checkpoint_dir (str or PathLike, optional): as for :func:`recover`.
        resume (str or PathLike, optional): likewise.
        checkpoint_every (int, optional): likewise.
        keep_checkpoints (int): likewise. Default: 2.
        log_dir (str or PathLike, optional): likewise.
        **settings: as for :func:`recover`.

    Returns:
        RecoveryResult: as of :func:`recover`.

    Raises:
        PlanMismatchError: the plan was made for another network.
        ChanpruneError: as for :func:`recover`, which this runs.
    """
    if penalty not in ("growing", "lasso"):
        raise InvalidArgumentError(f"penalty: expected 'growing' or 'lasso', got {penalty!r}")
    if not 0 < strength < float("inf"):
        raise InvalidArgumentError(f"strength: expected a positive number, got {strength!r}")
    if not isinstance(plan, PruningPlan):
        raise InvalidArgumentError(
            f"plan: expected a PruningPlan, got {type(plan).__name__}; make one with "
            "plan(model, example_inputs, ratio)"
        )
    plan.check(model)
    chosen = Recipe.of(recipe, settings)
    measure = group_penalty(model, plan, penalty)

    def weighted(done: float) -> Tensor:
        return strength * (done if penalty == "growing" else 1.0) * measure()

    return train_in_place(
        model,
        teacher,
        train,
        val,
        chosen,
        device,
        progress,
        weighted,
        checkpoint_folder(checkpoint_dir, resume, checkpoint_every, keep_checkpoints),
        log_dir,
        {"penalty": penalty, "strength": float(strength), "removes": _checksum(plan)},
    )


def _checksum(plan: PruningPlan) -> int:
    """Of what a plan removes, and where."""
    removed = {
        entry: {dim: index.tolist() for dim, index in sorted(dims.items())}
        for entry, dims in sorted(plan.pruned.items())
    }
    return zlib.crc32(str(removed).encode())


def group_penalty(
    model: nn.Module, plan: PruningPlan, penalty: str = "growing"
) -> Callable[[], Tensor]:
    """A function that computes the penalty on what a plan removes from a model's parameters.

    ``"growing"``: ``sum of squares / 2``. ``"lasso"``: sum over removed indices ``i`` of every
    pruned dim of every parameter of ``sqrt(n) |w_i|``, ``n`` elements in the slice ``w_i``. An
    element that goes along two dims counts twice.

    Args:
        model (nn.Module): the network the plan was made for.
        plan (PruningPlan): what will be removed.
        penalty (str): ``"growing"`` or ``"lasso"``.
    """
    parameters = dict(model.named_parameters())
    slices = [
        (parameters[entry], dim, index.to(parameters[entry].device))
        for entry, dims in plan.pruned.items()
        if entry in parameters and parameters[entry].requires_grad
        for dim, index in dims.items()
    ]
    if not slices:
        raise InvalidArgumentError("plan: removes nothing from a parameter that is trained")

    def measure() -> Tensor:
        terms = []
        for parameter, dim, index in slices:
            place = index.to(parameter.device)
            rows = parameter.index_select(dim, place).movedim(dim, 0).reshape(len(place), -1)
            if penalty == "growing":
                terms.append(rows.square().sum() / 2)
            else:
                norms = (rows.square().sum(1) + _TINY).sqrt()
                terms.append(rows.shape[1] ** 0.5 * norms.sum())
        return torch.stack([term.float() for term in terms]).sum()

    return measure

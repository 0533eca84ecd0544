"""Whether a checkpoint is of the run at hand, also where that has other processes now."""

from __future__ import annotations

import json
import math
import warnings
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from .recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .checkpoints import Checkpoint
    from .run import Run

__all__ = ["check_same", "regrouped_position"]

# What decides how many images an update sees; it may change together with the processes.
_GROUPING = {
    "recipe": ("batch_size", "gradient_accumulation_steps"),
    "train": ("batches an epoch", "images a batch"),
    "processes": ("number",),
}


def check_same(checkpoint: Checkpoint, ours: Mapping[str, Any], regrouped: bool) -> None:
    """Compares what a checkpoint says of its run with the run at hand.

    Args:
        checkpoint (Checkpoint): whose ``state["run"]`` is compared.
        ours (Mapping): the same of the run at hand.
        regrouped (bool): whether there are other processes now, so that batches may differ too.

    Raises:
        CheckpointError: they differ; the message names the first difference.
    """
    theirs = dict(checkpoint.state["run"])
    # A setting that was not there yet was what its default is.
    theirs["recipe"] = {**_plain(Recipe().to_dict(), ours["recipe"]), **theirs.get("recipe", {})}
    ours = json.loads(json.dumps(ours))
    for part, values in ours.items():
        others = theirs.get(part)
        if others is None:  # written by a version that did not note it
            continue
        for name in dict.fromkeys([*values, *others]):
            if name not in values and part == "recipe":
                continue
            if regrouped and name in _GROUPING.get(part, ()):
                continue
            one, other = values.get(name), others.get(name)
            if one != other:
                raise CheckpointError(
                    f"{checkpoint.path}: is of another run: {part}: {name} was {other!r} and is "
                    f"{one!r} now; go on with what the run began with, or start anew in another "
                    "checkpoint_dir"
                )


def regrouped_position(checkpoint: Checkpoint, ours: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """The place of a checkpoint in a run of other processes: after as many images.

    The order of the images is the same for any number of processes, and all together take them one
    batch after the other. Where the new ones can't stop at the same image, they go on a little
    before it.

    Raises:
        CheckpointError: it lies in the middle of an epoch, of data that do not say how many images
            a batch has.
    """
    state = checkpoint.state
    position = dict(state["position"])
    theirs = state["run"]
    before, now = _images_at_once(theirs), _images_at_once(ours)
    processes = theirs["processes"]["number"]
    steps = run.recipe.gradient_accumulation_steps
    if position["batches"]:
        if before is None or now is None:
            raise CheckpointError(
                f"{checkpoint.path}: was written in the middle of an epoch by {processes} "
                f"processes, there are {run.processes.number} now, and the data do not say how "
                f"many images a batch has; go on with {processes} processes, or from a checkpoint "
                "that was written at the end of an epoch"
            )
        if position["batches"] == theirs["train"]["batches an epoch"]:
            batches = run.steps
        else:
            batches = position["batches"] * before // now
            batches = min(batches - batches % steps, run.steps)
        position["batches"] = batches
    position["update"] = (position["epoch"] - 1) * run.updates_an_epoch + math.ceil(
        position["batches"] / steps
    )
    if run.processes.first:
        accumulated = theirs["recipe"].get("gradient_accumulation_steps", 1)
        sees = "an update sees as many images as before"
        if before is None or now is None or before * accumulated != now * steps:
            sees = (
                f"an update sees {_or_unknown(now, steps)} images, it saw "
                f"{_or_unknown(before, accumulated)}; batch_size and gradient_accumulation_steps "
                "may be changed to make up for it"
            )
        warnings.warn(
            f"{checkpoint.path}: was written by {processes} processes, there are "
            f"{run.processes.number} now; going on in epoch {position['epoch']} after as many "
            f"images, {sees}",
            UserWarning,
            2,
        )
    return position


def _plain(defaults: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in defaults.items() if name in wanted}


def _images_at_once(run: Mapping[str, Any]) -> int | None:
    """Images that all processes together take at once."""
    size = run["train"]["images a batch"]
    return None if size is None else int(size) * int(run["processes"]["number"])


def _or_unknown(images: int | None, steps: int) -> str:
    return "an unknown number of" if images is None else f"{images * steps:,}"

"""The folder of a whole job: what is done lies there, and is found by a job that goes on."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any, TypeVar

from chanprune_ext.atomic_files import make_folder, write_text
from chanprune_ext.errors import CheckpointError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["JobFolder", "read_json", "refuse_unfinished", "require_same"]

T = TypeVar("T")

RECORD = "job.json"
_CHECKPOINT_EVERY = 1000  # updates; an epoch of ImageNet takes many of them


class JobFolder:
    """Where a job keeps its results, and what it needs to go on after it was stopped.

    ``job.json`` says what the job depends on and which steps are done; ``checkpoints/`` holds those
    of its training and goes when the job is finished.

    Args:
        path: Made where it is missing.
        inputs: What the results depend on, as plain values. A job goes on with one of the same.
        resume: Go on with the job in the folder, or begin where there is none. None: nothing but
            results is kept, and those of an earlier job are replaced.

    Attributes:
        path: The folder.
        done: Steps that are done, each with what the report says of it.
        finished: Whether there is nothing left to do.

    Raises:
        InvalidArgumentError: There is an unfinished job that is not to be gone on with, or one
            with other inputs.
        CheckpointError: ``job.json`` is damaged.
        OutputError: The folder cannot be written.
    """

    def __init__(self, path: Path, inputs: Mapping[str, Any], resume: bool | None) -> None:
        self.path = make_folder(path)
        self.done: dict[str, str] = {}
        self.finished = False
        self._inputs = dict(inputs)
        self._keeps = resume is not None
        if not self._keeps:
            return
        if not resume:
            refuse_unfinished(path)
        earlier = read_record(path) if resume else None
        if earlier is None:
            self._drop_checkpoints()
        else:
            require_same(path / RECORD, earlier["inputs"], self._inputs)
            self.done, self.finished = earlier["done"], earlier["finished"]
        self._write()

    def did(self, step: str, note: str = "") -> None:
        """Notes that a step is done and its results written."""
        self.done[step] = note
        self._write()

    def finish(self) -> None:
        """Notes that all is done; checkpoints go."""
        self.finished = True
        self._write()
        self._drop_checkpoints()

    def recovery_options(self, step: str) -> dict[str, Any]:
        """Options of :func:`chanprune_ext.recover` by which a training goes on where it was."""
        if not self._keeps:
            return {}
        return {
            "checkpoint_dir": self.path / "checkpoints" / step,
            "checkpoint_every": _CHECKPOINT_EVERY,
            "resume": "auto",
        }

    def _write(self) -> None:
        if self._keeps:
            state = {"inputs": self._inputs, "done": self.done, "finished": self.finished}
            write_text(self.path / RECORD, json.dumps(state, indent=1))

    def _drop_checkpoints(self) -> None:
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)


def read_record(path: Path) -> dict[str, Any] | None:
    """What an earlier job wrote into a folder; None where there was none.

    Raises:
        CheckpointError: It is damaged.
    """
    keys = ("inputs", "done", "finished")
    return read_json(path / RECORD, lambda found: {key: found[key] for key in keys})


def read_json(file: Path, take: Callable[[Any], T]) -> T | None:
    """What ``take`` makes of an earlier job's file; None where there is no file.

    Raises:
        CheckpointError: It is damaged.
    """
    if not file.exists():
        return None
    try:
        return take(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: cannot be read: {error!r}; delete it to begin anew"
        ) from error


def refuse_unfinished(path: Path) -> None:
    """Stops a job that would begin anew in the folder of one that can go on.

    Raises:
        InvalidArgumentError: The folder holds such a job.
        CheckpointError: What it holds is damaged.
    """
    earlier = read_record(path)
    if earlier is not None and not earlier["finished"]:
        raise InvalidArgumentError(
            f"out: {path} holds a job that was begun and not finished; go on with it by the same "
            "command and --resume, or give another folder"
        )


def require_same(path: Path, earlier: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Holds what the results in a file depend on against what new ones would depend on.

    Raises:
        InvalidArgumentError: They differ; the message names the first difference.
    """
    for name, value in inputs.items():
        if earlier.get(name) != value:
            raise InvalidArgumentError(
                f"resume: {path} was begun with another {name}: {earlier.get(name)!r}, now "
                f"{value!r}; start as before, or give another folder"
            )

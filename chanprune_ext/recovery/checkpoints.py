"""A folder with the latest checkpoints of one recovery run.

A checkpoint is one safetensors file: all tensors of the run, and in its metadata everything else as
JSON. It is written under a temporary name and renamed, so that a crash at any moment leaves the one
before it; nothing in it is code, and nothing is unpickled.
"""

from __future__ import annotations

import json
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors.torch import save_file

from ..atomic_files import make_folder, write_atomically
from ..checkpoint import read_safetensors
from ..checksum import checksum
from ..errors import CheckpointError, InvalidArgumentError, OutputError
from ..quantities import format_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["Checkpoint", "CheckpointFolder", "read_checkpoint"]

FORMAT = "chanprune-recovery"
VERSION = 1
_NAME = re.compile(r"checkpoint-(\d+)\.safetensors")


class Checkpoint(NamedTuple):
    """What one file holds.

    Attributes:
        path (Path): the file.
        tensors (dict[str, Tensor]): on the CPU.
        state (dict[str, Any]): everything that is no tensor, as JSON gives it back.
    """

    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class CheckpointFolder:
    """Where a run writes its checkpoints, and where it finds the one to go on from.

    Args:
        folder (str or PathLike, optional): made where it is missing. None writes nothing, which
            goes with a file to ``resume`` from.
        resume (str or PathLike, optional): ``"auto"`` goes on from the newest checkpoint of the
            folder, and starts anew where there is none; a path is that of a checkpoint or of a
            folder of them; None starts anew, in a folder without checkpoints.
        every (int, optional): updates between two checkpoints. None writes them after each epoch.
        keep (int): how many stay; older ones are deleted once a newer one is safe.

    Raises:
        InvalidArgumentError: an argument is outside its range, or the folder holds checkpoints of a
            run that ``resume`` does not continue.
        OutputError: the folder can't be made.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        resume: str | os.PathLike[str] | None,
        every: int | None,
        keep: int,
    ) -> None:
        for name, value in (("checkpoint_every", every), ("keep_checkpoints", keep)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InvalidArgumentError(f"{name}: expected at least 1, got {value!r}")
        if folder is None and (resume is None or resume == "auto"):
            raise InvalidArgumentError(
                "checkpoint_dir: needed to know where checkpoints are, got None; give a folder"
            )
        self.every = every
        self._keep = keep
        self._folder = None if folder is None else make_folder(folder)
        self._source = None if resume is None else self._folder if resume == "auto" else resume
        self._optional = resume == "auto"
        if self._folder is None:
            return
        continued = self._source is not None and self._folder.resolve() in (
            Path(self._source).resolve(),
            Path(self._source).resolve().parent,
        )
        if _numbered(self._folder) and not continued:
            raise InvalidArgumentError(
                f"checkpoint_dir: {self._folder} holds checkpoints of an earlier run; go on from "
                "them with resume='auto', or give another folder"
            )
        for leftover in self._folder.glob(".checkpoint-*.tmp"):  # of a process that was killed
            with suppress(OSError):
                leftover.unlink()

    @property
    def writes(self) -> bool:
        """Whether there is a folder to write to."""
        return self._folder is not None

    def latest(self, copies: bool = True) -> Checkpoint | None:
        """Reads the checkpoint to go on from, the newest that is whole; None starts anew.

        ``copies`` is as for :func:`read_checkpoint`.

        Raises:
            CheckpointError: there is none where one was asked for, or none can be read.
        """
        if self._source is None:
            return None
        source = Path(self._source)
        if not source.is_dir():
            return read_checkpoint(source, copies)
        paths = [path for _, path in sorted(_numbered(source).items(), reverse=True)]
        for path in paths:
            try:
                return read_checkpoint(path, copies)
            except CheckpointError as error:
                if path is paths[-1]:
                    raise CheckpointError(
                        f"{error}; it is the oldest one in {source}, and no newer one can be read "
                        "either: delete them to start anew"
                    ) from error
                warnings.warn(f"{error}; going on from the one before it", UserWarning, 2)
        if self._optional:
            return None
        raise CheckpointError(f"resume: {source} holds no checkpoints; start without resume")

    def write(self, update: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Writes a checkpoint, then deletes those that are too many.

        Args:
            update (int): updates that are done, which the file is named after.
            tensors (Mapping[str, Tensor]): on any device; no two may share memory.
            state (Mapping): everything else, as plain numbers, strings, lists and dicts.

        Raises:
            OutputError: it can't be written; the checkpoints that were there are as they were.
        """
        assert self._folder is not None, "asked for by `writes`"
        placed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "state": json.dumps(state),
            "checksums": json.dumps({name: checksum(value) for name, value in placed.items()}),
        }
        older = _numbered(self._folder)
        path = self._folder / f"checkpoint-{update:09d}.safetensors"
        try:
            write_atomically(path, lambda file: save_file(placed, file, metadata))
        except OutputError as error:
            newest = f"{older[max(older)]} is intact" if older else "there is none before it"
            size = format_bytes(sum(value.nbytes for value in placed.values()))
            raise OutputError(
                f"{error}. {newest}; the folder needs room for {self._keep + 1} checkpoints of "
                f"{size}"
            ) from error
        # Numbers above this one are of a future that is being lived again.
        kept = sorted(number for number in older | {update: path} if number <= update)
        for number, old in older.items():
            if number not in kept[-self._keep :]:
                with suppress(OSError):
                    old.unlink()
        return path


def _numbered(folder: Path) -> dict[int, Path]:
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in found if match}


def read_checkpoint(path: Path, copies: bool = True) -> Checkpoint:
    """Reads one file.

    Args:
        path (Path): the file.
        copies (bool): whether the tensors have memory of their own. If not they are views of the
            file, which several processes of one machine share. Default: True.

    Raises:
        CheckpointError: it is missing, damaged, or no checkpoint.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is no checkpoint of a recovery run")
    if metadata.get("version") != str(VERSION):
        raise CheckpointError(
            f"{path}: has format version {metadata.get('version')}, this release reads {VERSION}"
        )
    try:
        state, checksums = json.loads(metadata["state"]), json.loads(metadata["checksums"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: its description is damaged: {error}") from error
    if checksums.keys() != tensors.keys():
        raise CheckpointError(f"{path}: its tensors are not those it was written with")
    for name, tensor in tensors.items():
        if checksum(tensor) != checksums[name]:
            raise CheckpointError(f"{path}: {name!r} is damaged, its checksum is another")
    # Copies: what was read is a view of the file, which may be deleted or replaced.
    if copies:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return Checkpoint(path, tensors, state)

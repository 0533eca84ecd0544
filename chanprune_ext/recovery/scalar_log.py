"""The course of a run as TensorBoard shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..atomic_files import make_folder
from ..errors import InvalidArgumentError

if TYPE_CHECKING:
    import os

    from .evaluation import Evaluation
    from .result import EpochRecord

__all__ = ["ScalarLog"]


class ScalarLog:
    """Writes scalars into an event file; one without a folder writes nothing.

    ``train/loss``, ``train/lr`` by update, both as the progress bar shows them; after each epoch,
    at the number of updates made until then, ``train/epoch_loss``, ``train/images_per_second``,
    ``train/data_wait``, ``val/top1``, ``val/top5`` and ``val/loss``.

    Args:
        folder (str or PathLike, optional): made where it is missing.
        update (int): updates that are done: what the folder holds of later ones is not shown.
        write (bool): whether this process is the one that writes. Default: True.

    Raises:
        InvalidArgumentError: tensorboard is not installed.
        OutputError: the folder can't be made.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, update: int = 0, *, write: bool = True
    ) -> None:
        self._writer: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InvalidArgumentError(
                "log_dir: needs tensorboard; pip install 'chanprune_ext[tensorboard]'"
            ) from error
        if not write:
            return
        self._writer = SummaryWriter(str(make_folder(folder)), purge_step=update + 1)

    def update(self, update: int, loss: float, lr: float) -> None:
        """One update, with the mean loss of the epoch so far."""
        self._write(update, {"train/loss": loss, "train/lr": lr})

    def validation(self, update: int, found: Evaluation | None) -> None:
        """What validation has found after so many updates, if there was one."""
        if found is not None:
            self._write(
                update, {"val/top1": found.top1, "val/top5": found.top5, "val/loss": found.loss}
            )

    def epoch(self, update: int, record: EpochRecord) -> None:
        """An epoch that ended with this update."""
        rate = record.images / record.seconds if record.seconds else 0.0
        values = {
            "train/epoch_loss": record.loss,
            "train/images_per_second": rate,
            "train/data_wait": record.data_wait,
        }
        self._write(update, values)
        self.validation(update, record.val)

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, update: int, values: dict[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, update)

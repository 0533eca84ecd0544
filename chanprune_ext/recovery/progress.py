"""Progress of a recovery run: a bar on a terminal, a line an epoch in a log."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from rich import get_console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from types import TracebackType

    from .result import EpochRecord

__all__ = ["RecoveryProgress"]


class RecoveryProgress:
    """One bar over all updates, with loss, learning rate and the latest validation beside it.

    Where the output is no terminal, a file or a pipe, one line after every epoch instead.

    Args:
        epochs (int): epochs of the run.
        updates (int): updates of the run.
        visible (bool): show anything at all.
        done (int): updates that an earlier run has made. Default: 0.
    """

    def __init__(self, epochs: int, updates: int, visible: bool, done: int = 0) -> None:
        self._epochs, self._visible = epochs, visible
        self._console = get_console()
        self._drawn = visible and (self._console.is_terminal or self._console.is_jupyter)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._drawn,
        )
        self._task = self._bar.add_task("recovering", total=updates, completed=done, state="")
        self._loss = self._score = ""
        self._said = False

    def __enter__(self) -> RecoveryProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def step(self, epoch: int, loss: float | None, lr: float) -> None:
        """Reports one update of epoch ``epoch`` (from 1); ``loss`` None keeps the one shown."""
        if loss is not None:
            self._loss = f"loss {loss:.4f} "
        self._bar.update(
            self._task,
            advance=1,
            description=f"epoch {epoch}/{self._epochs}",
            state=f"{self._loss}lr {lr:.2g}{self._score}",
        )

    def epoch(self, record: EpochRecord) -> None:
        """Shows an epoch's validation, if there is one."""
        if record.val is not None:
            self._score = f" val {100 * record.val.top1:.2f} %"
        if self._visible and not self._drawn:
            took = timedelta(seconds=round(record.seconds))
            self._print(
                f"epoch {record.epoch}/{self._epochs} loss {record.loss:.4f} lr {record.lr:.2g}"
                f"{self._score} {took}"
            )

    def say(self, line: str | None) -> None:
        """Writes a line, above the bar where that is drawn; only the first one of a run."""
        if line is not None and self._visible and not self._said:
            self._said = True
            self._print(line)

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)

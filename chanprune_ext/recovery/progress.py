"""Progress bar of a recovery run."""

from __future__ import annotations

from typing import TYPE_CHECKING

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

    from .evaluation import Evaluation

__all__ = ["RecoveryProgress"]


class RecoveryProgress:
    """One bar over all updates, with loss, learning rate and the latest validation beside it.

    Args:
        epochs (int): epochs of the run.
        updates (int): updates of the run.
        visible (bool): draw it at all.
        done (int): updates that an earlier run has made. Default: 0.
    """

    def __init__(self, epochs: int, updates: int, visible: bool, done: int = 0) -> None:
        self._epochs = epochs
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not visible,
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

    def validated(self, score: Evaluation | None) -> None:
        """Shows the latest validation, if there is one."""
        if score is not None:
            self._score = f" val {100 * score.top1:.2f} %"

    def say(self, line: str | None) -> None:
        """Writes a line above the bar where that is drawn; only the first one of a run."""
        if line is not None and not self._bar.disable and not self._said:
            self._said = True
            self._bar.console.print(line, highlight=False)

"""Ctrl-C that lets the update at hand finish."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Interruption", "RecoveryInterrupted"]


class RecoveryInterrupted(KeyboardInterrupt):
    """Ctrl-C ended a run after it had written a checkpoint.

    Attributes:
        checkpoint (Path): the checkpoint.
        update (int): updates that are done.
        updates (int): updates of the whole run.
    """

    def __init__(self, checkpoint: Path, update: int, updates: int) -> None:
        super().__init__(
            f"interrupted after update {update} of {updates}; {checkpoint} holds the run, and "
            "resume='auto' goes on from there"
        )
        self.checkpoint = checkpoint
        self.update = update
        self.updates = updates


class Interruption:
    """Context manager: the first Ctrl-C is noted, a second one interrupts at once.

    Outside the main thread, where Python allows no signal handlers, and where Ctrl-C is ignored,
    nothing changes.

    Attributes:
        asked (bool): whether Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.asked = False
        self._previous: Any = None

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _note(self, _number: int, _frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

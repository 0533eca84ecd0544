"""What a recovery run reports."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..atomic_files import write_text

if TYPE_CHECKING:
    import os

    from .evaluation import Evaluation
    from .recipe import Recipe

__all__ = ["EpochRecord", "RecoveryResult"]


@dataclass(frozen=True)
class EpochRecord:
    """One pass over the training data.

    Attributes:
        epoch (int): counted from 1.
        loss (float): mean training loss of the pass.
        lr (float): learning rate of its last update.
        val (Evaluation | None): on the validation data after the pass.
        seconds (float): wall time of the pass, without validation.
        images (int): images trained on, in all processes.
        data_wait (float): share of the time in which the device waited for data, 0 to 1.
    """

    epoch: int
    loss: float
    lr: float
    val: Evaluation | None
    seconds: float
    images: int
    data_wait: float = 0.0


@dataclass(frozen=True)
class RecoveryResult:
    """History of a run, and which of its weights the student holds now.

    Attributes:
        history (tuple[EpochRecord, ...]): one record an epoch.
        before (Evaluation | None): the student on the validation data before the first update.
        kept_epoch (int): the epoch whose weights the student holds; 0 means those it came with.
        recipe (Recipe): the settings of the run.
    """

    history: tuple[EpochRecord, ...]
    before: Evaluation | None
    kept_epoch: int
    recipe: Recipe

    @property
    def last(self) -> Evaluation | None:
        """Validation after the last epoch."""
        return self.history[-1].val if self.history else None

    @property
    def best_epoch(self) -> int | None:
        """Epoch with the highest validation accuracy, the earliest of several; 0 for the start."""
        if self.before is None:
            return None
        scores = [self.before.top1, *(record.val.top1 for record in self.history if record.val)]
        return scores.index(max(scores))

    @property
    def best(self) -> Evaluation | None:
        """The highest validation accuracy. Chosen by looking at it, hence a little optimistic."""
        epoch = self.best_epoch
        if epoch is None:
            return None
        return self.before if epoch == 0 else self.history[epoch - 1].val

    @property
    def seconds(self) -> float:
        """Wall time of all training passes."""
        return sum(record.seconds for record in self.history)

    def __repr__(self) -> str:
        epochs = len(self.history)
        return (
            f"<{type(self).__name__}: {epochs} epoch{'s' * (epochs != 1)}, "
            f"kept epoch {self.kept_epoch}, last: {self.last or 'not measured'}>"
        )

    def __str__(self) -> str:
        epochs = len(self.history)
        trained = f"{epochs} epoch{'s' * (epochs != 1)}, {self.seconds:.1f} s"
        lines = [f"recovery: {trained}, kept epoch {self.kept_epoch}"]
        if self.history:
            lines.append(f"  training loss: {self.history[-1].loss:.4g}")
        if self.before is not None:
            lines.append(f"  before: {self.before}")
            lines.append(f"  best, epoch {self.best_epoch}: {self.best}")
        if self.last is not None:
            lines.append(f"  last: {self.last}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything above as plain numbers, strings, lists and dicts, for a report in JSON.

        Numbers that are not finite, which JSON has none of, are None.
        """
        return {
            **_finite(asdict(self)),
            "recipe": self.recipe.to_dict(),
            "best_epoch": self.best_epoch,
            "seconds": self.seconds,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the result as JSON, whole or not at all; :meth:`Recipe.load` reads its recipe.

        Raises:
            OutputError: the file cannot be written.
        """
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")


def _finite(value: Any) -> Any:
    """The same with None for every number that is NaN or infinite."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

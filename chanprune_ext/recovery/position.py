"""How far a recovery run is."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Position"]


@dataclass
class Position:
    """How far a run is. Sums are over all processes, up to the last look at them.

    Attributes:
        update (int): updates made.
        epoch (int): the epoch at hand, from 1; one more than the run has when it is over.
        batches (int): batches of it that are done, in each process.
        loss_sum (float): their summed loss, per image.
        images (int): images in them.
        lr (float): learning rate of the last of them.
        seconds (float): time they took.
        data_seconds (float): part of it that was spent waiting for data, mean of the processes.
    """

    update: int = 0
    epoch: int = 1
    batches: int = 0
    loss_sum: float = 0.0
    images: int = 0
    lr: float = 0.0
    seconds: float = 0.0
    data_seconds: float = 0.0

    def next_epoch(self, epoch: int) -> None:
        """Goes to the start of an epoch."""
        self.epoch, self.batches, self.images = epoch, 0, 0
        self.loss_sum = self.lr = self.seconds = self.data_seconds = 0.0

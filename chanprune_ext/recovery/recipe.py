"""The settings of one recovery run, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import InvalidArgumentError

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """Settings of :func:`chanprune_ext.recovery.recover`, which documents each of them.

    Raises:
        InvalidArgumentError: a setting is outside its range; the message names it.
    """

    epochs: int
    lr: float
    optimizer: str
    momentum: float
    weight_decay: float
    warmup: float
    batch_size: int
    label_smoothing: float
    temperature: float
    distill_weight: float
    hard_weight: float
    max_grad_norm: float | None
    ema_decay: float | None
    keep: str
    precision: str
    channels_last: bool
    seed: int
    workers: int

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "temperature"):
            self._require(name, 0 < getattr(self, name) < math.inf, "a positive number")
        for name in ("weight_decay", "warmup", "distill_weight", "hard_weight", "workers"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "zero or a positive number")
        for name in ("momentum", "label_smoothing"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        self._require("warmup", self.warmup < self.epochs, f"fewer than epochs = {self.epochs}")
        self._require(
            "distill_weight, hard_weight",
            self.distill_weight + self.hard_weight > 0,
            "one of them above 0",
        )
        limit, decay = self.max_grad_norm, self.ema_decay
        self._require("max_grad_norm", limit is None or limit > 0, "None or a positive number")
        self._require("ema_decay", decay is None or 0 < decay < 1, "None or between 0 and 1")
        self._require("optimizer", self.optimizer in ("sgd", "adamw"), "'sgd' or 'adamw'")
        self._require("keep", self.keep in ("last", "best"), "'last' or 'best'")
        self._require("precision", self.precision in ("fp32", "bf16"), "'fp32' or 'bf16'")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            given = ", ".join(repr(getattr(self, part)) for part in name.split(", "))
            raise InvalidArgumentError(f"{name}: expected {expected}, got {given}")

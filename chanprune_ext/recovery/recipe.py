"""The settings of one recovery run: checked once, kept with the result, read back from JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic_files import write_text
from ..errors import CheckpointError, InvalidArgumentError
from ..precision import AUTOCAST_DTYPES

if TYPE_CHECKING:
    import os

__all__ = ["FEATURE_LOSSES", "LOSSES", "Recipe"]

DEFAULT_LR = {"sgd": 0.005, "adamw": 5e-4}
LABEL_LOSSES = ("hard",)
LOGIT_LOSSES = ("kd", "dkd", "dist")
FEATURE_LOSSES = ("features", "attention", "statistics")
LOSSES = (*LABEL_LOSSES, *LOGIT_LOSSES, *FEATURE_LOSSES)

_FORMAT = "chanprune-recipe"
_KINDS = {"int": (numbers.Integral, "an integer"), "float": (numbers.Real, "a number")}


@dataclass(frozen=True)
class Recipe:
    """Settings of :func:`chanprune_ext.recovery.recover`. All have defaults.

    Attributes:
        epochs (int): passes over the training data. Default: 10.
        lr (float, optional): highest learning rate. Default: 0.005 for SGD, 0.0005 for AdamW, safe
            for a network that starts close to its teacher.
        lr_scale (str, optional): ``"linear"`` multiplies the learning rate by the images of an
            update over ``lr_base_size`` (Goyal et al. 2017), ``"sqrt"`` by the root of that. The
            images of an update are those of all processes and of all accumulated batches.
            Default: None, ``lr`` as it is.
        lr_base_size (int): images an update that ``lr`` is meant for. Default: 256.
        optimizer (str): ``"sgd"`` (Nesterov momentum) or ``"adamw"``. Default: ``"sgd"``.
        momentum (float): of SGD. Default: 0.9.
        weight_decay (float): not applied to biases and normalisation layers. Default: 5e-4.
        warmup (float): epochs until the highest learning rate. Default: 0.3.
        batch_size (int): images that a process takes at once, if the training data are a dataset.
            Default: 128.
        gradient_accumulation_steps (int): batches an update; each process adds up their gradients.
            Default: 1.
        losses (Mapping[str, float], optional): what is made small, and its weight: ``"hard"``
            (cross-entropy of the labels), ``"kd"``, ``"dkd"``, ``"dist"`` (on the teacher's
            logits), ``"features"``, ``"attention"``, ``"statistics"`` (on its feature maps); see
            docs/recovery.md. All but ``"hard"`` need a teacher. Default: ``{"kd": 0.9, "hard":
            0.1}`` with a teacher, ``{"kd": 1.0}`` where the data have no labels, ``{"hard": 1.0}``
            without a teacher.
        label_smoothing (float): share of a label spread over all classes. Default: 0.
        temperature (float): T of the losses on logits. Default: 4.
        standardise (bool): compare logits of mean 0 and deviation 1 in ``"kd"`` and ``"dkd"``; goes
            with temperatures of about 2 and weights of about 9. Default: False.
        dkd_alpha, dkd_beta (float): weights of the target and non-target part of ``"dkd"``.
            Defaults: 1 and 2.
        taps (Sequence[str], optional): modules, or globs on them, whose outputs the losses on
            features compare. Default: the last block at each feature size, found from the trace.
        bn_weighted (bool): weigh the channels in ``"statistics"`` by the scale of the teacher's
            last batch norm there. Default: False.
        feature_epochs (float, optional): epochs over which the weights of the losses on features
            fall to zero, along a line. Default: None, constant.
        mixup, cutmix (float, optional): parameter of the Beta distribution that images of a batch
            are mixed by, for both networks. Default: None, not mixed.
        teacher_flip (bool): the losses on logits learn from the mean of what the teacher says of an
            image and of its mirror image, which is more often right than one of them; a second
            forward pass of the teacher. Not for images that left and right matter in, such as
            writing. Default: False.
        max_grad_norm (float, optional): gradients are scaled down to this L2 norm. Default: 5.
        ema_decay (float, optional): train as usual, but measure and keep a running average of
            weights and batch-norm statistics with this decay. Default: None, no average.
        swa_start (float, optional): share of the run after which the learning rate stays as it is
            and weights are averaged equally; measured and kept is the average. Default: None.
        bn_batches (int): batches of training images that batch-norm statistics are measured anew
            on after the last update. Default: 0, leave them.
        patience (int, optional): stop after this many epochs without a higher accuracy on the
            validation data. Default: None, never.
        keep (str): which weights the student ends with: ``"last"``, or ``"best"`` on the validation
            data, the start included. The last ones give an unbiased figure where these are also the
            images reported on. Default: ``"last"``.
        precision (str): ``"fp32"``, or ``"bf16"`` for mixed precision: about twice as fast on
            hardware with bfloat16 arithmetic; or ``"fp16"``, with gradients scaled against
            underflow, for hardware without. A processor that would compute it in software, many
            times slower than float32, brings a warning. Default: ``"fp32"``.
        teacher_precision (str, optional): likewise, of the teacher alone; a teacher whose weights
            are bfloat16 or float16 runs in that. Default: as the student.
        compile (bool): run the student through ``torch.compile``, the teacher too. Default: False.
        freeze_batch_norm (bool): batch norms go on with the running statistics they have and do not
            measure them anew; their scales and shifts are trained. For a network that is close to
            its teacher already: batch statistics of a few images would move it away first. Not
            together with ``sync_batch_norm``. Default: False.
        sync_batch_norm (bool): let batch norm average over all processes while training, for few
            images a GPU. Needs CUDA; nothing changes in a single process. Default: False.
        shard (bool): divide the student, its gradients and its optimizer over all processes, and
            the teacher too (FSDP2), for networks that one GPU can't hold; needs ``torchrun``. Not
            together with ``compile``, ``sync_batch_norm`` or ``precision="fp16"``. Default: False,
            every process holds everything.
        channels_last (bool): feed images in NHWC layout, which most convolutions run faster on.
            The model must not call ``view`` on feature maps. Default: False.
        seed (int): of the order of the images, their augmentation and dropout. Default: 0.
        workers (int): processes decoding images, if the training data are a dataset. Default: 0.

    Raises:
        InvalidArgumentError: a setting is outside its range; the message names it.
    """

    epochs: int = 10
    lr: float | None = None
    lr_scale: str | None = None
    lr_base_size: int = 256
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.3
    batch_size: int = 128
    gradient_accumulation_steps: int = 1
    losses: Mapping[str, float] | None = None
    label_smoothing: float = 0.0
    temperature: float = 4.0
    standardise: bool = False
    dkd_alpha: float = 1.0
    dkd_beta: float = 2.0
    taps: Sequence[str] | None = None
    bn_weighted: bool = False
    feature_epochs: float | None = None
    mixup: float | None = None
    cutmix: float | None = None
    teacher_flip: bool = False
    max_grad_norm: float | None = 5.0
    ema_decay: float | None = None
    swa_start: float | None = None
    bn_batches: int = 0
    patience: int | None = None
    keep: str = "last"
    precision: str = "fp32"
    teacher_precision: str | None = None
    compile: bool = False
    freeze_batch_norm: bool = False
    sync_batch_norm: bool = False
    shard: bool = False
    channels_last: bool = False
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        self._check_kinds()
        if self.losses is not None:
            self._check_losses()
            object.__setattr__(self, "losses", {k: float(v) for k, v in self.losses.items()})
        if self.taps is not None:
            taps = (self.taps,) if isinstance(self.taps, str) else self.taps
            named = isinstance(taps, Sequence) and all(isinstance(tap, str) for tap in taps)
            self._require("taps", named, "None or names of modules")
            object.__setattr__(self, "taps", tuple(taps))
        self._require("seed", -(2**63) <= self.seed < 2**63, "a number of 64 bits")
        for name in ("epochs", "batch_size", "lr_base_size", "gradient_accumulation_steps"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "mixup", "cutmix", "max_grad_norm", "feature_epochs", "patience"):
            value = getattr(self, name)
            self._require(name, value is None or 0 < value < math.inf, "None or a positive number")
        self._require("temperature", 0 < self.temperature < math.inf, "a positive number")
        for name in ("weight_decay", "warmup", "workers", "dkd_alpha", "dkd_beta", "bn_batches"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "zero or a positive number")
        for name in ("momentum", "label_smoothing"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        self._require("warmup", self.warmup < self.epochs, f"fewer than epochs = {self.epochs}")
        for name in ("ema_decay", "swa_start"):
            value = getattr(self, name)
            self._require(name, value is None or 0 < value < 1, "None or between 0 and 1")
        self._require(
            "ema_decay, swa_start",
            self.ema_decay is None or self.swa_start is None,
            "one of them at most",
        )
        self._require(
            "freeze_batch_norm, sync_batch_norm",
            not (self.freeze_batch_norm and self.sync_batch_norm),
            "one of them at most",
        )
        for name in ("compile", "sync_batch_norm"):
            both = self.shard and getattr(self, name)
            self._require(f"shard, {name}", not both, "one of them at most")
        half = self.shard and "fp16" in (self.precision, self.teacher_precision)
        self._require(
            "shard, precision, teacher_precision", not half, "'fp32' or 'bf16' together with shard"
        )
        on_logits = self.losses is None or any(map(self.losses.get, LOGIT_LOSSES))
        self._require(
            "losses, teacher_flip",
            on_logits or not self.teacher_flip,
            "a loss that teacher_flip=True is for: 'kd', 'dkd' or 'dist'",
        )
        self._require("optimizer", self.optimizer in ("sgd", "adamw"), "'sgd' or 'adamw'")
        self._require("keep", self.keep in ("last", "best"), "'last' or 'best'")
        self._require("precision", self.precision in AUTOCAST_DTYPES, "'fp32', 'bf16' or 'fp16'")
        self._require(
            "teacher_precision",
            self.teacher_precision in (None, *AUTOCAST_DTYPES),
            "None, 'fp32', 'bf16' or 'fp16'",
        )
        self._require(
            "lr_scale", self.lr_scale in (None, "linear", "sqrt"), "None, 'linear' or 'sqrt'"
        )

    @property
    def peak_lr(self) -> float:
        """The highest learning rate: ``lr``, or the optimizer's default."""
        return DEFAULT_LR[self.optimizer] if self.lr is None else self.lr

    def scaled_lr(self, images: int) -> float:
        """The highest learning rate where an update sees so many images: see ``lr_scale``."""
        if self.lr_scale is None:
            return self.peak_lr
        ratio = images / self.lr_base_size
        return self.peak_lr * (ratio if self.lr_scale == "linear" else math.sqrt(ratio))

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain numbers, strings, lists and dicts."""
        return {"format": _FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: the data are no recipe, or one of another version.
            InvalidArgumentError: a setting is outside its range.
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            raise CheckpointError(f"recipe: expected data of format {_FORMAT!r}")
        values = {name: value for name, value in data.items() if name != "format"}
        try:
            return cls(**values)
        except TypeError as error:
            raise CheckpointError(f"recipe: not readable by this version ({error})") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the recipe as JSON, whole or not at all.

        Raises:
            OutputError: the file cannot be written.
        """
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Reads a recipe written by :meth:`save`, or out of a result's JSON.

        Raises:
            CheckpointError: the file is missing, no JSON, or holds no recipe.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"recipe: '{path}' cannot be read: {error}") from error
        if isinstance(data, Mapping) and "recipe" in data:
            data = data["recipe"]
        return cls.from_dict(data)

    def changed(self, **settings: Any) -> Recipe:
        """A recipe with some settings replaced.

        Raises:
            InvalidArgumentError: there is no such setting, or its value is outside its range.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in settings:
            if name not in known:
                raise InvalidArgumentError(f"{name}: no such setting; there are {', '.join(known)}")
        return dataclasses.replace(self, **settings)

    @classmethod
    def of(cls, recipe: Recipe | None, settings: Mapping[str, Any]) -> Recipe:
        """A recipe to start from, or the defaults, with some settings replaced.

        Raises:
            InvalidArgumentError: it is no recipe, or as for :meth:`changed`.
        """
        if recipe is not None and not isinstance(recipe, Recipe):
            raise InvalidArgumentError(
                f"recipe: expected a Recipe, got {type(recipe).__name__}; make one with "
                "Recipe(epochs=10) or Recipe.load(path)"
            )
        return (recipe or cls()).changed(**settings)

    def _check_kinds(self) -> None:
        """Counts must be integers, of numpy too, and amounts numbers."""
        for field in dataclasses.fields(self):
            word, _, optional = str(field.type).partition(" | ")
            value = getattr(self, field.name)
            if word not in _KINDS or (optional and value is None):
                continue
            kind, expected = _KINDS[word]
            self._require(field.name, isinstance(value, kind), expected)
            if word == "int":
                object.__setattr__(self, field.name, int(value))

    def _check_losses(self) -> None:
        losses = self.losses
        if not isinstance(losses, Mapping) or not losses:
            raise InvalidArgumentError(
                f"losses: expected weights by name, such as {{'kd': 0.9, 'hard': 0.1}}, got "
                f"{losses!r}"
            )
        for name, weight in losses.items():
            if name not in LOSSES:
                raise InvalidArgumentError(
                    f"losses: expected names among {', '.join(LOSSES)}, got {name!r}"
                )
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not 0 <= weight < math.inf:
                raise InvalidArgumentError(
                    f"losses[{name!r}]: expected zero or a positive number, got {weight!r}"
                )
        if not any(losses.values()):
            raise InvalidArgumentError(f"losses: expected one weight above 0, got {dict(losses)}")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            given = ", ".join(repr(getattr(self, part)) for part in name.split(", "))
            raise InvalidArgumentError(f"{name}: expected {expected}, got {given}")

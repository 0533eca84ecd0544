"""The quantity a recovery run makes small: a weighted sum of losses on labels, logits, features."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from ..compensation.batches import sample_count
from ..errors import DataError, InvalidArgumentError
from ..ops import kd_kl_div
from ..ops.accumulation import widened
from ..precision import AUTOCAST_DTYPES, autocast, precision_of
from .evaluation import device_of
from .feature_losses import attention_transfer, channel_statistics, feature_mimic
from .feature_matching import Tap, find_taps
from .logit_losses import decoupled_kd, dist, standardised
from .mixed_inputs import InputMixer, mirror_images
from .outputs import check_count, check_labels, input_dtype, logits, moved
from .recipe import FEATURE_LOSSES
from .taps import FeatureTaps, plain_module

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .recipe import Recipe

__all__ = ["Objective"]


class Objective:
    """Context manager: computes the loss of one batch after the other.

    Hooks on the networks are there from the first batch that needs them until the context is left.

    Args:
        recipe (Recipe): which losses, with which weights and options.
        student (nn.Module): the plain network that is trained.
        teacher (nn.Module, optional): in evaluation mode.
        whole (tuple, optional): student and teacher before they were divided over processes, which
            is where taps are looked for. Default: None, they are not divided.

    Raises:
        InvalidArgumentError: the recipe needs a teacher and there is none, or its losses ignore the
            one there is.
    """

    def __init__(
        self,
        recipe: Recipe,
        student: nn.Module,
        teacher: nn.Module | None,
        whole: tuple[nn.Module, nn.Module | None] | None = None,
    ) -> None:
        self.recipe = recipe
        self.student = student
        self.teacher = teacher
        self._running_teacher: Any = teacher
        self._whole = whole or (student, teacher)
        self._mixer = InputMixer(recipe)
        self._dtype = input_dtype(student)
        self._teacher_dtype = None if teacher is None else input_dtype(teacher)
        self._stack = ExitStack()
        self._taps: tuple[Tap, ...] | None = None
        self._tapped: tuple[FeatureTaps, FeatureTaps] | None = None
        self._scales: dict[str, Tensor | None] = {}
        losses = recipe.losses
        if losses is not None and teacher is None:
            needing = [name for name, weight in losses.items() if weight and name != "hard"]
            if needing:
                raise InvalidArgumentError(
                    f"teacher: needed by the losses {', '.join(needing)}; pass the unpruned network"
                )
        if recipe.teacher_flip and teacher is None:
            raise InvalidArgumentError(
                "teacher_flip: there is no teacher to ask; pass the unpruned network"
            )
        if losses is not None and teacher is not None and not _teaches(losses):
            raise InvalidArgumentError(
                "losses: expected one that learns from the teacher, such as 'kd', got "
                f"{dict(losses)}; leave the teacher out to train on labels alone"
            )

    def compile_teacher(self) -> None:
        """Runs the teacher through ``torch.compile`` from now on."""
        if self.teacher is not None:
            self._running_teacher = torch.compile(self.teacher)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._untap()

    def _untap(self) -> None:
        self._stack.close()
        self._tapped = None

    def __call__(
        self, model: nn.Module, inputs: Any, labels: Tensor | None, epochs_done: float = 0.0
    ) -> tuple[Tensor, int]:
        """Runs both networks on one batch.

        Args:
            model (nn.Module): the student as it is trained, perhaps wrapped.
            inputs (Any): the batch, on the networks' device; each network gets it in its type.
            labels (Tensor[N], optional): int64 classes, any numbers where no loss looks at them.
            epochs_done (float): how far the run is, for losses that fade out.

        Returns:
            tuple[Tensor, int]: the mean loss of the batch, a scalar, and the number of samples.

        Raises:
            DataError: the batch has no labels and the losses need them, a label is no class, or
                there are not as many as logits.
            InvalidArgumentError: the networks do not fit together.
        """
        weights = self._weights(labels, epochs_done)
        size = len(labels) if labels is not None else sample_count(inputs)
        mixing = None
        if self._mixer:
            inputs, mixing = self._mixer(inputs)
        if any(name in weights for name in FEATURE_LOSSES):
            self._tap(inputs)
        elif self._tapped is not None:
            self._untap()  # faded out
        place = next(self.student.parameters()).device
        device, wanted = place.type, None
        if self.teacher is not None:
            precision = self.recipe.teacher_precision or self.recipe.precision
            precision = precision_of(_dtype_of(self.teacher)) or precision
            with torch.no_grad(), autocast(device, AUTOCAST_DTYPES[precision]):
                wanted = self._teacher_logits(moved(inputs, place, dtype=self._teacher_dtype))
        with autocast(device, AUTOCAST_DTYPES[self.recipe.precision]):
            scores = widened(logits(model, moved(inputs, place, dtype=self._dtype)))
        if wanted is not None and wanted.shape != scores.shape:
            raise InvalidArgumentError(
                f"teacher: expected logits {list(scores.shape)} like the student's, got "
                f"{list(wanted.shape)}"
            )
        if labels is not None:
            check_count(labels, scores)
            if any(name in weights for name in ("hard", "dkd")):
                check_labels(labels, scores.shape[1])
            labels = labels.to(scores.device, non_blocking=True)
        loss = self._logit_losses(scores, wanted, labels, mixing, weights)
        for term in self._feature_losses(weights):
            loss = term if loss is None else loss + term
        assert loss is not None, "a recipe has at least one loss"
        if _distributed(model) and _features_alone(weights):
            loss = loss + 0 * scores.sum()  # it waits for a gradient of every parameter
        return loss, size

    def _teacher_logits(self, inputs: Any) -> Tensor:
        """What the teacher says of the images, or of them and of their mirror images on average."""
        if not self.recipe.teacher_flip:
            return widened(logits(self._running_teacher, inputs))
        mirrored = mirror_images(inputs)
        # First the mirror images, so that the features tapped last are those of the images.
        flipped = widened(logits(self._running_teacher, mirrored))
        return (flipped + widened(logits(self._running_teacher, inputs))) / 2

    def _weights(self, labels: Tensor | None, epochs_done: float) -> dict[str, float]:
        """The weights that hold for a batch now; losses without weight are left out."""
        recipe = self.recipe
        if recipe.losses is not None:
            weights = {name: weight for name, weight in recipe.losses.items() if weight}
        elif self.teacher is None:
            weights = {"hard": 1.0}
        else:
            weights = {"kd": 1.0} if labels is None else {"kd": 0.9, "hard": 0.1}
        if labels is None and "hard" in weights:
            raise DataError(
                "batch: expected a pair (inputs, labels) for the loss 'hard', got inputs alone (a "
                "dict is all of them: give ({...}, labels)); without labels train towards a "
                "teacher, with losses={'kd': 1.0}, say"
            )
        if recipe.feature_epochs is not None:
            left = max(0.0, 1 - epochs_done / recipe.feature_epochs)
            for name in FEATURE_LOSSES:
                if name in weights:
                    weights[name] *= left
            # Something must be left to differentiate where features alone were asked for.
            if any(w for n, w in weights.items() if n not in FEATURE_LOSSES):
                weights = {name: weight for name, weight in weights.items() if weight}
        return weights

    def _logit_losses(
        self,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        mixing: Tensor | None,
        weights: Mapping[str, float],
    ) -> Tensor | None:
        recipe = self.recipe
        kd, hard = weights.get("kd", 0.0), weights.get("hard", 0.0)
        terms = []
        fused = bool(kd and hard) and mixing is None and not recipe.standardise
        if fused and teacher is not None:
            terms.append(
                kd_kl_div(
                    student,
                    teacher.to(student.dtype),
                    recipe.temperature,
                    labels=labels,
                    soft_weight=kd,
                    hard_weight=hard,
                    label_smoothing=recipe.label_smoothing,
                )
            )
        elif hard and labels is not None:
            terms.append(hard * self._hard(student, labels, mixing))
        if teacher is not None:
            terms += self._soft(student, teacher, labels, mixing, weights, without_kd=fused)
        return torch.stack(terms).sum() if len(terms) > 1 else terms[0] if terms else None

    def _hard(self, student: Tensor, labels: Tensor, mixing: Tensor | None) -> Tensor:
        target = labels
        if mixing is not None:
            target = mixing.to(student.dtype) @ F.one_hot(labels, student.shape[1]).to(student)
        return F.cross_entropy(student, target, label_smoothing=self.recipe.label_smoothing)

    def _soft(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        mixing: Tensor | None,
        weights: Mapping[str, float],
        *,
        without_kd: bool,
    ) -> list[Tensor]:
        recipe = self.recipe
        teacher = teacher.to(student.dtype)
        terms = []
        if "dist" in weights:
            terms.append(weights["dist"] * dist(student, teacher, recipe.temperature))
        # Of an image without a label of its own the teacher says what it is.
        target = teacher.argmax(1) if labels is None or mixing is not None else labels
        if recipe.standardise:
            student, teacher = standardised(student), standardised(teacher)
        if "kd" in weights and not without_kd:
            terms.append(weights["kd"] * kd_kl_div(student, teacher, recipe.temperature))
        if "dkd" in weights:
            found = decoupled_kd(
                student,
                teacher,
                target,
                recipe.temperature,
                alpha=recipe.dkd_alpha,
                beta=recipe.dkd_beta,
            )
            terms.append(weights["dkd"] * found)
        return terms

    def _tap(self, inputs: Any) -> None:
        """Puts hooks on both networks when features are needed first."""
        if self._tapped is not None or self.teacher is None:
            return
        student, teacher = self._whole
        assert teacher is not None, "there is one"
        inputs = moved(inputs, device_of(teacher), dtype=self._teacher_dtype)
        self._taps = find_taps(student, teacher, inputs, self.recipe.taps)
        names = [tap.name for tap in self._taps]
        self._tapped = (
            self._stack.enter_context(FeatureTaps(self.student, names)),
            self._stack.enter_context(FeatureTaps(self.teacher, names)),
        )
        if self.recipe.bn_weighted:
            modules = dict(plain_module(teacher).named_modules())
            self._scales = {
                tap.name: _batch_norm_scale(modules[tap.name], tap) for tap in self._taps
            }

    def _feature_losses(self, weights: Mapping[str, float]) -> list[Tensor]:
        """Each loss on features, as its mean over the taps times its weight."""
        if self._tapped is None or self._taps is None:
            return []
        ours, theirs = (tapped.take() for tapped in self._tapped)
        found: dict[str, list[Tensor]] = {name: [] for name in FEATURE_LOSSES if name in weights}
        for tap in self._taps:
            s, whole = ours[tap.name], theirs[tap.name]
            t = tap.matched(whole)
            if s.shape != t.shape:
                raise InvalidArgumentError(
                    f"taps: the student's '{tap.name}' returns {list(s.shape)}, of the teacher's "
                    f"{list(whole.shape)} the plan keeps {list(t.shape)}; choose other taps"
                )
            if "features" in found:
                found["features"].append(feature_mimic(s, t))
            if "attention" in found and s.ndim > 2:
                whole = tap.rescaled(whole)
                found["attention"].append(attention_transfer(s, whole, tap.channel_dim))
            if "statistics" in found:
                scale = self._scales.get(tap.name)
                found["statistics"].append(channel_statistics(s, t, tap.channel_dim, scale))
        for name, terms in found.items():
            if not terms:
                raise InvalidArgumentError(
                    f"losses: {name!r} needs features with positions, and none of the taps has; "
                    "choose others with taps=[...]"
                )
        return [weights[name] * torch.stack(terms).mean() for name, terms in found.items()]


def _distributed(model: nn.Module) -> bool:
    compiled = model._modules.get("_orig_mod")  # noqa: SLF001 - torch.compile has no public name
    model = compiled or model
    sharded = hasattr(model, "reshard")  # as FSDP2 adds to a module
    return sharded or isinstance(model, nn.parallel.DistributedDataParallel)


def _features_alone(weights: Mapping[str, float]) -> bool:
    """Whether no loss looks at the logits."""
    return not any(weight for name, weight in weights.items() if name not in FEATURE_LOSSES)


def _teaches(losses: Mapping[str, float]) -> bool:
    return any(weight for name, weight in losses.items() if name != "hard")


def _batch_norm_scale(module: nn.Module, tap: Tap) -> Tensor | None:
    """Absolute scales of the last batch norm inside, for the channels that are compared."""
    for inner in reversed(list(module.modules())):
        if isinstance(inner, nn.modules.batchnorm._BatchNorm) and inner.weight is not None:
            scale = inner.weight.detach().abs()
            if len(scale) != tap.width:
                return None  # of other channels than the module returns
            index = tap.kept.get(tap.channel_dim)
            return scale if index is None else scale[index.to(scale.device)]
    return None


def _dtype_of(model: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)

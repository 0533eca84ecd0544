"""Arguments of `kd_kl_div`: their checks, and the factor of each row that is made of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.ops.accumulation import accumulation_dtype
from chanprune_ext.ops.tensor_checks import check_is_tensor

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "REDUCTIONS",
    "Numbers",
    "Reduction",
    "check_arguments",
    "check_label_values",
    "flat_rows",
    "row_factors",
]

Reduction = Literal["none", "sum", "batchmean"]

REDUCTIONS: dict[Reduction, int] = {"none": 0, "sum": 1, "batchmean": 2}  # as the operator has them
# Temperature, soft weight, hard weight, label smoothing, ignored label.
Numbers = tuple[float, float, float, float, int]
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def flat_rows(logits: Tensor) -> Tensor:
    """Logits (..., C) as (rows, C)."""
    return logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])


def _is_integer(value: object) -> bool:
    return isinstance(value, int) or hasattr(value, "__index__")


def check_arguments(
    student: Tensor,
    teacher: Tensor,
    numbers: Numbers,
    labels: Tensor | None,
    reduction: str,
) -> None:
    """Raises `InvalidArgumentError`, naming the argument; reads no values of tensors."""
    temperature, soft_weight, hard_weight, label_smoothing, ignore_index = numbers
    factors = (soft_weight, hard_weight)
    for name, logits in (("student", student), ("teacher", teacher)):
        check_is_tensor(name, logits)
        if logits.dtype not in _FLOATS:
            raise InvalidArgumentError(
                f"{name} should hold float16, bfloat16, float32 or float64 logits, "
                f"got {logits.dtype}"
            )
    if student.dim() < 1 or student.shape[-1] < 1:
        raise InvalidArgumentError(
            f"student should be logits [..., classes] with at least one class, "
            f"got shape {tuple(student.shape)}"
        )
    if teacher.shape != student.shape or teacher.device != student.device:
        raise InvalidArgumentError(
            f"teacher should have the shape and device of student, {tuple(student.shape)} on "
            f"{student.device}, got {tuple(teacher.shape)} on {teacher.device}"
        )
    # Comparisons, which torch.compile can also trace for a number that it does not know.
    if not 0 < temperature < math.inf:
        raise InvalidArgumentError(
            f"temperature should be a finite number above 0, got {temperature}"
        )
    if not all(0 <= factor < math.inf for factor in factors):
        raise InvalidArgumentError(
            f"soft_weight and hard_weight should be finite and not negative, got {factors}"
        )
    if not 0 <= label_smoothing <= 1:
        raise InvalidArgumentError(f"label_smoothing should be in [0, 1], got {label_smoothing}")
    if not _is_integer(ignore_index):
        raise InvalidArgumentError(f"ignore_index should be an integer, got {ignore_index!r}")
    if reduction not in REDUCTIONS:
        raise InvalidArgumentError(
            f"reduction should be one of {', '.join(REDUCTIONS)}, got {reduction!r}"
        )
    if labels is None and factors[1] != 0:
        raise InvalidArgumentError(f"hard_weight={factors[1]} needs labels; pass labels=...")
    if labels is not None:
        _check_per_row("labels", labels, student, (torch.int64,), "int64 class indices")


def _check_per_row(
    name: str, values: Tensor, student: Tensor, dtypes: tuple[torch.dtype, ...], expected: str
) -> None:
    check_is_tensor(name, values)
    if (
        values.shape != student.shape[:-1]
        or values.dtype not in dtypes
        or values.device != student.device
    ):
        raise InvalidArgumentError(
            f"{name} should be {expected} of shape {tuple(student.shape[:-1])} on "
            f"{student.device}, got {values.dtype} {tuple(values.shape)} on {values.device}"
        )


def check_label_values(labels: Tensor | None, classes: int, ignore_index: int) -> None:
    """Raises for labels out of range; reads every value."""
    if labels is None:
        return
    wrong = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if bool(wrong.any()):
        raise InvalidArgumentError(
            f"labels should be in [0, {classes}) or ignore_index ({ignore_index}), "
            f"got {int(labels[wrong][0])}"
        )


def row_factors(
    student: Tensor, weights: Tensor | None, mask: Tensor | None, reduction: str
) -> Tensor | None:
    """One factor per row of the flat logits, the mask among them; None where all are 1.

    For "batchmean" the rows under the mask do not count, so that the mean is over the others. All
    of it stays on the device.
    """
    if weights is None and mask is None:
        return None
    dtype = accumulation_dtype(student)
    if weights is not None:
        _check_per_row("weights", weights, student, _FLOATS, "floating-point factors")
        if weights.requires_grad and torch.is_grad_enabled():
            raise InvalidArgumentError(
                "weights should not require gradients, which kd_kl_div does not compute for them; "
                "pass weights.detach()"
            )
        weights = weights.to(dtype)
    if mask is None:
        assert weights is not None
        return weights.reshape(-1)
    _check_per_row("mask", mask, student, (torch.bool,), "booleans")
    kept = mask.to(dtype) if weights is None else torch.where(mask, weights, 0)
    kept = kept.reshape(-1)
    if reduction == "batchmean":  # the operator divides by the number of all rows
        kept = kept * (kept.numel() / mask.sum().clamp(min=1))
    return kept

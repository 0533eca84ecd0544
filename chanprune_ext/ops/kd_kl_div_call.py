"""What comes before a call of the operator: its operands, and what serves where it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.ops._loader import CPU_MODULE, inside_transform, native_available
from chanprune_ext.ops.kd_kl_div_arguments import (
    REDUCTIONS,
    Numbers,
    Reduction,
    check_arguments,
    check_label_values,
    flat_rows,
    row_factors,
)
from chanprune_ext.ops.kd_kl_div_reference import kd_kl_div_reference

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "check_range",
    "name_the_culprit",
    "operands",
    "reference_loss",
    "reference_only",
]

_HAS_CPU = CPU_MODULE.loaded


def operands(
    student: Tensor,
    teacher: Tensor,
    numbers: Numbers,
    labels: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    reduction: Reduction,
) -> tuple[Tensor, tuple[Any, ...], bool]:
    """The student's logits, the operator's other arguments, and whether they are the plain case.

    There nothing has been checked: the kernel does that, faster than Python.

    Args:
        student: As for :func:`chanprune_ext.ops.kd_kl_div`.
        teacher: Likewise.
        numbers: The arguments that are numbers.
        labels: As for the function.
        weights: Likewise.
        mask: Likewise.
        reduction: Likewise.
    """
    plain = (
        isinstance(student, torch.Tensor)
        and isinstance(teacher, torch.Tensor)
        and (labels is None or isinstance(labels, torch.Tensor))
        and student.is_cpu
        and _HAS_CPU
        and student.dim() == 2
        and teacher.dtype is student.dtype
        and weights is None
        and mask is None
        and reduction in REDUCTIONS
        and not torch.compiler.is_compiling()
        and not inside_transform()
    )
    row_weights = None
    if not plain:
        check_arguments(student, teacher, numbers, labels, reduction)
        if teacher.dtype != student.dtype:
            dtype = torch.promote_types(student.dtype, teacher.dtype)
            student, teacher = student.to(dtype), teacher.to(dtype)
        row_weights = row_factors(student, weights, mask, reduction)
    if teacher.requires_grad and torch.is_grad_enabled():
        raise InvalidArgumentError(
            "teacher should not require gradients, which kd_kl_div does not compute for it; "
            "compute it under torch.no_grad() or pass teacher.detach()"
        )
    labels = labels if labels is None or plain else labels.reshape(-1)
    others = (flat_rows(teacher), labels, row_weights, *numbers, REDUCTIONS[reduction])
    return student, others, plain


def name_the_culprit(
    student: Tensor,
    teacher: Tensor,
    numbers: Numbers,
    labels: Tensor | None,
    reduction: str,
) -> None:
    """Raises what says more than the kernel did, if an argument is the reason."""
    check_arguments(student, teacher, numbers, labels, reduction)
    if student.is_cpu:
        check_label_values(labels, student.shape[-1], numbers[-1])


def check_range(student: Tensor, refusal: str) -> None:
    """Raises for logits of a type in which a gradient can't be kept before it is scaled."""
    if student.dtype == torch.float16:
        raise InvalidArgumentError(
            f"{refusal} for float16 logits, whose range an unscaled gradient can leave; leave it "
            "to the backward of kd_kl_div, or use bfloat16"
        )


def reference_only(student: Tensor) -> bool:
    """Whether the kernels cannot serve here: not built, or a torch.func transform is running."""
    if torch.compiler.is_compiling():
        return not native_available(student)
    return inside_transform() or not native_available(student)


def reference_loss(student: Tensor, call: tuple[Any, ...]) -> Tensor:
    """What the operator returns for these arguments, by differentiable torch operations."""
    teacher, labels, row_weights, temperature, soft_weight, hard_weight, *others = call
    label_smoothing, ignore_index, reduction = others
    if student.is_cpu and not torch.compiler.is_compiling() and not inside_transform():
        check_label_values(labels, student.shape[-1], ignore_index)
    return kd_kl_div_reference(
        flat_rows(student),
        teacher,
        temperature,
        labels=labels,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        weights=row_weights,
        reduction=next(name for name, number in REDUCTIONS.items() if number == reduction),
    )

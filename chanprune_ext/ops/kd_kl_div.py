"""Distillation loss from raw logits, forward and backward in one pass each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F

from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.ops._loader import CPU_MODULE, native_available

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Reduction", "kd_kl_div", "kd_kl_div_reference"]

Reduction = Literal["none", "sum", "batchmean"]

_REDUCTIONS: dict[str, int] = {"none": 0, "sum": 1, "batchmean": 2}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_STATISTICS = 5  # per row, see csrc/kd_kl_div_options.h
# Logits up to which the forward also makes the gradient: a second one while it is being scaled does
# not matter then, and one call into the kernels less does.
_SMALL = 1 << 15
_WIDE = (torch.float32, torch.float64)
_NO_GRADIENTS = (None,) * 8  # of teacher, labels and options
_OPS = torch.ops.chanprune


def _check(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    labels: Tensor | None,
    weights: tuple[float, float],
    label_smoothing: float,
    reduction: str,
) -> None:
    for name, logits in (("student", student), ("teacher", teacher)):
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
    if teacher.requires_grad and torch.is_grad_enabled():
        raise InvalidArgumentError(
            "teacher should not require gradients, which kd_kl_div does not compute for it; "
            "compute it under torch.no_grad() or pass teacher.detach()"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise InvalidArgumentError(
            f"temperature should be a finite number above 0, got {temperature}"
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise InvalidArgumentError(
            f"soft_weight and hard_weight should be finite and not negative, got {weights}"
        )
    if not 0 <= label_smoothing <= 1:
        raise InvalidArgumentError(f"label_smoothing should be in [0, 1], got {label_smoothing}")
    if reduction not in _REDUCTIONS:
        raise InvalidArgumentError(
            f"reduction should be one of {', '.join(_REDUCTIONS)}, got {reduction!r}"
        )
    if labels is None and weights[1] != 0:
        raise InvalidArgumentError(f"hard_weight={weights[1]} needs labels; pass labels=...")
    if labels is not None and (
        labels.shape != student.shape[:-1]
        or labels.dtype != torch.int64
        or labels.device != student.device
    ):
        raise InvalidArgumentError(
            f"labels should be int64 class indices of shape {tuple(student.shape[:-1])} on "
            f"{student.device}, got {labels.dtype} {tuple(labels.shape)} on {labels.device}"
        )


def _check_label_values(labels: Tensor | None, classes: int, ignore_index: int) -> None:
    """Raises for labels out of range; reads every value."""
    if labels is None:
        return
    wrong = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if bool(wrong.any()):
        raise InvalidArgumentError(
            f"labels should be in [0, {classes}) or ignore_index ({ignore_index}), "
            f"got {int(labels[wrong][0])}"
        )


def kd_kl_div(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 4.0,
    *,
    labels: Tensor | None = None,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """Knowledge-distillation loss (Hinton et al., 2015, https://arxiv.org/abs/1503.02531).

    For one row of logits s, t and temperature T::

        loss = soft_weight * T^2 * KL(softmax(t / T) || softmax(s / T))
             + hard_weight * cross_entropy(s, label, label_smoothing)

    The soft term equals ``F.kl_div(log_softmax(s/T), log_softmax(t/T), log_target=True) * T**2``;
    the T^2 keeps the size of its gradient independent of T. Half types are computed in float32. A
    class to which the teacher gives no probability (logit -inf) adds nothing; a student logit of
    -inf where the teacher's is finite makes the loss +inf. No host synchronisation on CUDA.

    Args:
        student (Tensor[..., C]): raw logits, float16, bfloat16, float32 or float64.
        teacher (Tensor[..., C]): raw logits without gradient; another float dtype is converted to
            the wider of the two.
        temperature: T > 0.
        labels (Tensor[...] | None): int64 classes for the hard term.
        soft_weight: factor of the soft term.
        hard_weight: factor of the hard term; not 0 only with `labels`.
        label_smoothing: in [0, 1], as in ``F.cross_entropy``.
        ignore_index: rows with this label have no hard term; they keep their soft term.
        reduction: "batchmean" (sum over rows / number of rows, ignored ones included), "sum" or
            "none". Without rows, "sum" and "batchmean" are 0.

    Returns:
        Tensor[] or, for "none", Tensor[...]: float64 for float64 logits, else float32.
        Differentiable once, with respect to `student`; torch.func transforms are not supported.

    Raises:
        InvalidArgumentError: an argument is not as described. On CUDA an out-of-range label is not
            looked for, which would wait for the device; the loss of its row is NaN.
    """
    weights = (float(soft_weight), float(hard_weight))
    _check(student, teacher, temperature, labels, weights, label_smoothing, reduction)
    if student.dtype != teacher.dtype:
        dtype = torch.promote_types(student.dtype, teacher.dtype)
        student, teacher = student.to(dtype), teacher.to(dtype)
    options = (float(temperature), *weights, float(label_smoothing), ignore_index)
    if not native_available(student.device):
        _check_label_values(labels, student.shape[-1], ignore_index)
        return kd_kl_div_reference(
            student,
            teacher,
            temperature,
            labels=labels,
            soft_weight=soft_weight,
            hard_weight=hard_weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
        )
    classes = student.shape[-1]
    flat_labels = labels
    flat_student, flat_teacher = student, teacher
    if student.dim() != 2:  # a reshape would be one more step to differentiate
        flat_student, flat_teacher = student.reshape(-1, classes), teacher.reshape(-1, classes)
        flat_labels = None if labels is None else labels.reshape(-1)
    arguments = (
        flat_student,
        flat_teacher,
        flat_labels,
        *options,
        _REDUCTIONS[reduction],
    )
    loss: Tensor
    if torch.compiler.is_compiling():
        loss = _OPS.kd_kl_div(*arguments)[0]
    else:
        try:
            if student.requires_grad and torch.is_grad_enabled():
                loss = _EagerLoss.apply(*arguments)
            else:
                loss = _OPS.kd_kl_div.default(*arguments)[0]
        except RuntimeError:
            if not student.is_cuda:
                _check_label_values(flat_labels, classes, ignore_index)
            raise
    return loss.reshape(student.shape[:-1]) if loss.dim() and student.dim() != 2 else loss


def kd_kl_div_reference(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 4.0,
    *,
    labels: Tensor | None = None,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """`kd_kl_div` in plain torch: fallback, test oracle and benchmark baseline."""
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    if dtype != torch.float64:
        dtype = torch.float32
    classes = student.shape[-1]
    s = student.reshape(-1, classes).to(dtype)
    t = teacher.reshape(-1, classes).to(dtype)
    losses = s[:, :0].sum(1)  # zeros that belong to the graph even if both weights are 0
    if soft_weight != 0:
        log_p = F.log_softmax(s / temperature, dim=1)
        log_q = F.log_softmax(t / temperature, dim=1)
        q = log_q.exp()
        terms = torch.where(q == 0, torch.zeros_like(q), q * (log_q - log_p))
        losses = losses + soft_weight * temperature**2 * terms.sum(1)
    if labels is not None and hard_weight != 0:
        losses = losses + hard_weight * F.cross_entropy(
            s,
            labels.reshape(-1),
            reduction="none",
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
    if reduction == "none":
        return losses.reshape(student.shape[:-1])
    total = losses.sum()
    return total / max(s.shape[0], 1) if reduction == "batchmean" else total


def _accumulation_dtype(student: Tensor) -> torch.dtype:
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def _fake(
    student: Tensor,
    teacher: Tensor,  # noqa: ARG001
    labels: Tensor | None,  # noqa: ARG001
    temperature: float,  # noqa: ARG001
    soft_weight: float,  # noqa: ARG001
    hard_weight: float,  # noqa: ARG001
    label_smoothing: float,  # noqa: ARG001
    ignore_index: int,  # noqa: ARG001
    reduction: int,
) -> tuple[Tensor, Tensor]:
    dtype = _accumulation_dtype(student)
    shape = (student.shape[0],) if reduction == _REDUCTIONS["none"] else ()
    return (
        student.new_empty(shape, dtype=dtype),
        student.new_empty((student.shape[0], _STATISTICS), dtype=dtype),
    )


def _fake_with_gradient(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    loss, _ = _fake(student, *arguments)
    return loss, student.new_empty(student.shape)


def _fake_backward(grad: Tensor, student: Tensor, *_: Any) -> Tensor:  # noqa: ARG001
    return student.new_empty(student.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, labels, *options = inputs
    if ctx.needs_input_grad[1]:
        raise InvalidArgumentError(
            "kd_kl_div computes no gradient for teacher; pass teacher.detach()"
        )
    _, statistics = output
    ctx.options = options
    ctx.mark_non_differentiable(statistics)
    saved = [student, teacher, statistics]
    ctx.save_for_backward(*(saved if labels is None else [*saved, labels]))


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    student, teacher, statistics, *labels = ctx.saved_tensors
    result = _OPS.kd_kl_div_backward(
        grad, student, teacher, statistics, labels[0] if labels else None, *ctx.options
    )
    return result, *_NO_GRADIENTS


class _EagerLoss(torch.autograd.Function):
    """The operator with its gradient, outside torch.compile.

    The same as calling the operator, whose registered gradient is generic Python code that costs
    more than the kernels do on small batches.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        student, teacher, labels, *options = inputs
        # A half gradient would be rounded before it is scaled, and could vanish.
        ctx.has_gradient = student.is_cpu and student.dtype in _WIDE and student.numel() <= _SMALL
        run = _OPS.kd_kl_div_with_gradient if ctx.has_gradient else _OPS.kd_kl_div
        loss: Tensor
        loss, kept = run.default(*inputs)
        ctx.save_for_backward(student, teacher, labels, kept)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        student, teacher, labels, kept = ctx.saved_tensors
        if ctx.has_gradient:
            if not torch.is_grad_enabled():
                result = kept * (grad if grad.dim() == 0 else grad.unsqueeze(1))
                return result, *_NO_GRADIENTS
            # With create_graph the result must know its formula, to refuse a second derivative.
            with torch.no_grad():
                _, kept = _OPS.kd_kl_div.default(student, teacher, labels, *ctx.options)
        result = _OPS.kd_kl_div_backward.default(grad, student, teacher, kept, labels, *ctx.options)
        return result, *_NO_GRADIENTS


def _refuse_double_backward(ctx: Any, grad: Tensor) -> None:
    raise NotImplementedError(
        "kd_kl_div can be differentiated once; for second derivatives use "
        "chanprune_ext.ops.kd_kl_div_reference"
    )


if CPU_MODULE.loaded:
    torch.library.register_fake("chanprune::kd_kl_div", _fake)
    torch.library.register_fake("chanprune::kd_kl_div_with_gradient", _fake_with_gradient)
    torch.library.register_fake("chanprune::kd_kl_div_backward", _fake_backward)
    torch.library.register_autograd("chanprune::kd_kl_div", _backward, setup_context=_setup_context)
    torch.library.register_autograd("chanprune::kd_kl_div_backward", _refuse_double_backward)

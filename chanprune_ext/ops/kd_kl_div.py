"""Distillation loss from raw logits, forward and backward in one pass each or in one together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch._C import _AutoDispatchBelowAutograd

from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.ops._loader import CPU_MODULE, inside_transform, native_available

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Reduction", "kd_kl_div", "kd_kl_div_reference"]

Reduction = Literal["none", "sum", "batchmean"]

_REDUCTIONS: dict[Reduction, int] = {"none": 0, "sum": 1, "batchmean": 2}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_STATISTICS = 5  # per row, see csrc/kd_kl_div_options.h
_WIDE = (torch.float32, torch.float64)
_OPS = torch.ops.chanprune
_HAS_CPU = CPU_MODULE.loaded


def _check(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    labels: Tensor | None,
    factors: tuple[float, float],
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
    if not (math.isfinite(temperature) and temperature > 0):
        raise InvalidArgumentError(
            f"temperature should be a finite number above 0, got {temperature}"
        )
    if not all(math.isfinite(factor) and factor >= 0 for factor in factors):
        raise InvalidArgumentError(
            f"soft_weight and hard_weight should be finite and not negative, got {factors}"
        )
    if not 0 <= label_smoothing <= 1:
        raise InvalidArgumentError(f"label_smoothing should be in [0, 1], got {label_smoothing}")
    if reduction not in _REDUCTIONS:
        raise InvalidArgumentError(
            f"reduction should be one of {', '.join(_REDUCTIONS)}, got {reduction!r}"
        )
    if labels is None and factors[1] != 0:
        raise InvalidArgumentError(f"hard_weight={factors[1]} needs labels; pass labels=...")
    if labels is not None:
        _check_per_row("labels", labels, student, (torch.int64,), "int64 class indices")


def _check_per_row(
    name: str, values: Tensor, student: Tensor, dtypes: tuple[torch.dtype, ...], expected: str
) -> None:
    if (
        values.shape != student.shape[:-1]
        or values.dtype not in dtypes
        or values.device != student.device
    ):
        raise InvalidArgumentError(
            f"{name} should be {expected} of shape {tuple(student.shape[:-1])} on "
            f"{student.device}, got {values.dtype} {tuple(values.shape)} on {values.device}"
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


def _row_weights(
    student: Tensor, weights: Tensor | None, mask: Tensor | None, reduction: str
) -> Tensor | None:
    """One factor per row of the flat logits, the mask among them; None where all are 1.

    For "batchmean" the rows under the mask do not count, so that the mean is over the others. All
    of it stays on the device.
    """
    if weights is None and mask is None:
        return None
    dtype = _accumulation_dtype(student)
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
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "batchmean",
    gradient_in_forward: bool | None = None,
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
        ignore_index: rows with this label have no hard term; they keep their soft term. To leave
            padded positions out altogether, pass ``mask=labels != ignore_index``.
        weights (Tensor[...] | None): floating-point factor of each row's loss; a row with factor 0
            is left out like one under the mask, but counts in "batchmean".
        mask (Tensor[...] | None): bool, False for rows to leave out: their loss and gradient are 0
            even where their logits are NaN, and "batchmean" does not count them.
        reduction: "batchmean" (sum over rows / number of rows: those the mask keeps, with an
            ignored label or without; not divided by the sum of `weights`), "sum" or "none".
            Without rows, "sum" and "batchmean" are 0.
        gradient_in_forward: whether the forward, while it has a row at hand, also makes its
            gradient, which the backward then only scales: less time, but the gradient's memory is
            taken earlier. Default: on the CPU for float32 and float64. With bfloat16 the gradient
            is rounded once more when scaled; float16 has not the range and is refused.

    Returns:
        Tensor[] or, for "none", Tensor[...]: float64 for float64 logits, else float32.
        Differentiable any number of times with respect to `student` (once where torch.compile
        traced it). Inside the transforms of torch.func (grad,
        vmap, jvp, ...) `kd_kl_div_reference` runs instead, which all of them understand.

    Raises:
        InvalidArgumentError: an argument is not as described. On CUDA an out-of-range label is not
            looked for, which would wait for the device; the loss of its row is NaN.
    """
    factors = (float(soft_weight), float(hard_weight))
    options = (float(temperature), *factors, float(label_smoothing), ignore_index)
    plain = (
        student.is_cpu
        and _HAS_CPU
        and student.dim() == 2
        and teacher.dtype is student.dtype
        and weights is None
        and mask is None
        and reduction in _REDUCTIONS
        and not torch.compiler.is_compiling()
        and not inside_transform()
    )
    row_weights = None
    if not plain:  # else the kernel checks, faster than Python, and the culprit is named if it must
        _check(student, teacher, temperature, labels, factors, label_smoothing, reduction)
        row_weights = _row_weights(student, weights, mask, reduction)
        if teacher.dtype != student.dtype:
            dtype = torch.promote_types(student.dtype, teacher.dtype)
            student, teacher = student.to(dtype), teacher.to(dtype)
    if teacher.requires_grad and torch.is_grad_enabled():
        raise InvalidArgumentError(
            "teacher should not require gradients, which kd_kl_div does not compute for it; "
            "compute it under torch.no_grad() or pass teacher.detach()"
        )
    if gradient_in_forward is None:
        gradient_in_forward = student.is_cpu and student.dtype in _WIDE
    elif gradient_in_forward and student.dtype == torch.float16:
        raise InvalidArgumentError(
            "gradient_in_forward should not be set for float16 logits, whose range an unscaled "
            "gradient can leave; leave it out, or use bfloat16"
        )
    if not plain and _reference_only(student):
        if student.is_cpu and not inside_transform():
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
            weights=weights,
            mask=mask,
            reduction=reduction,
        )
    call = (
        _flat(teacher),
        labels if labels is None or plain else labels.reshape(-1),
        row_weights,
        *options,
        _REDUCTIONS[reduction],
    )
    loss: Tensor
    try:
        if not plain and torch.compiler.is_compiling():
            loss = _OPS.kd_kl_div(_flat(student), *call)[0]
        elif student.requires_grad and torch.is_grad_enabled():
            loss = _EagerLoss.apply(student, call, gradient_in_forward)
        else:
            with _AutoDispatchBelowAutograd():  # past the registered gradient, which is Python
                loss = _OPS.kd_kl_div.default(_flat(student), *call)[0]
    except RuntimeError:
        _check(student, teacher, temperature, labels, factors, label_smoothing, reduction)
        if student.is_cpu:
            _check_label_values(labels, student.shape[-1], ignore_index)
        raise
    return loss if plain or not loss.dim() else loss.reshape(student.shape[:-1])


def _reference_only(student: Tensor) -> bool:
    """Whether the kernels cannot serve here: not built, or a torch.func transform is running."""
    if torch.compiler.is_compiling():
        return not native_available(student.device)
    return inside_transform() or not native_available(student.device)


def _flat(logits: Tensor) -> Tensor:
    return logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])


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
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """`kd_kl_div` in plain torch: fallback, test oracle and benchmark baseline."""
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    if dtype != torch.float64:
        dtype = torch.float32
    s, t = _flat(student).to(dtype), _flat(teacher).to(dtype)
    row_weights = _row_weights(s.view(student.shape), weights, mask, reduction)
    if row_weights is not None:  # rows left out must not reach the gradient with 0 * NaN
        left_out = (row_weights == 0).unsqueeze(1)
        s, t = s.masked_fill(left_out, 0), t.masked_fill(left_out, 0)
    losses = s[:, :0].sum(1)  # zeros that belong to the graph even if both factors are 0
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
    if row_weights is not None:
        losses = losses * row_weights
    if reduction == "none":
        return losses.reshape(student.shape[:-1])
    total = losses.sum()
    return total / max(s.shape[0], 1) if reduction == "batchmean" else total


def _accumulation_dtype(student: Tensor) -> torch.dtype:
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def _fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    dtype = _accumulation_dtype(student)
    shape = (student.shape[0],) if arguments[-1] == _REDUCTIONS["none"] else ()
    return (
        student.new_empty(shape, dtype=dtype),
        student.new_empty((student.shape[0], _STATISTICS), dtype=dtype),
    )


def _fake_with_gradient(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _fake(student, *arguments)[0], student.new_empty(student.shape)


def _fake_backward(grad: Tensor, student: Tensor, *_: Any) -> Tensor:  # noqa: ARG001
    return student.new_empty(student.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, labels, row_weights, *options = inputs
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
        raise InvalidArgumentError(
            "kd_kl_div computes no gradient for teacher or row_weights; detach() them"
        )
    _, statistics = output
    ctx.options = options
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(student, teacher, statistics, labels, row_weights)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    result = _OPS.kd_kl_div_backward(grad, *ctx.saved_tensors, *ctx.options)
    return result, *(None,) * 9


class _EagerLoss(torch.autograd.Function):
    """The operator with its gradient, outside torch.compile.

    The same as calling the operator, whose registered gradient is generic Python code that costs
    more than the kernels do on small batches; and it can be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, call: tuple[Any, ...], with_gradient: bool) -> Tensor:
        run = _OPS.kd_kl_div_with_gradient if with_gradient else _OPS.kd_kl_div
        loss: Tensor
        loss, kept = run.default(_flat(student), *call)
        teacher, labels, row_weights, *_ = call
        statistics = None if with_gradient else kept
        ctx.gradient = [kept] if with_gradient else []
        ctx.save_for_backward(student, teacher, statistics, labels, row_weights)
        ctx.options = call[3:]
        ctx.shape = None if student.dim() == 2 else student.shape
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (grad,) = grads
        if torch.is_grad_enabled():
            return _differentiable_gradient(ctx, grad), None, None
        if ctx.gradient:
            # Handed out once, so that it may be scaled in place: the next backward makes another.
            gradient = _scaled(ctx.gradient.pop(), grad)
            return gradient if ctx.shape is None else gradient.view(ctx.shape), None, None
        student, teacher, statistics, *others = ctx.saved_tensors
        inputs = (_flat(student), teacher)
        if statistics is None:
            _, gradient = _OPS.kd_kl_div_with_gradient.default(*inputs, *others, *ctx.options)
            gradient = _scaled(gradient, grad)
        else:
            gradient = _OPS.kd_kl_div_backward.default(
                grad, *inputs, statistics, *others, *ctx.options
            )
        return gradient.view_as(student), None, None


def _scaled(gradient: Tensor, grad: Tensor) -> Tensor:
    """The gradient for ones as upstream gradients, scaled in place by the true ones."""
    if grad.dim():
        return gradient.mul_(grad.unsqueeze(1))
    if grad.is_cpu and grad.item() == 1:  # on CUDA the question would cost more than the answer
        return gradient
    return gradient.mul_(grad)


def _differentiable_gradient(ctx: Any, grad: Tensor) -> Tensor:
    """The gradient as the reference computes it: with a graph, for derivatives of any order."""
    student, teacher, _, labels, row_weights = ctx.saved_tensors
    temperature, soft_weight, hard_weight, label_smoothing, ignore_index, reduction = ctx.options
    flat = _flat(student)
    losses = kd_kl_div_reference(
        flat,
        teacher,
        temperature,
        labels=labels,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        weights=row_weights,
        reduction=next(name for name, number in _REDUCTIONS.items() if number == reduction),
    )
    return torch.autograd.grad(losses, student, grad, create_graph=True)[0]


def _refuse_double_backward(ctx: Any, grad: Tensor) -> None:
    raise NotImplementedError(
        "the operator chanprune::kd_kl_div can be differentiated once; for second derivatives use "
        "chanprune_ext.ops.kd_kl_div outside torch.compile, or kd_kl_div_reference"
    )


if CPU_MODULE.loaded:
    torch.library.register_fake("chanprune::kd_kl_div", _fake)
    torch.library.register_fake("chanprune::kd_kl_div_with_gradient", _fake_with_gradient)
    torch.library.register_fake("chanprune::kd_kl_div_backward", _fake_backward)
    torch.library.register_autograd("chanprune::kd_kl_div", _backward, setup_context=_setup_context)
    torch.library.register_autograd("chanprune::kd_kl_div_backward", _refuse_double_backward)

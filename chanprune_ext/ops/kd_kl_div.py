"""Distillation loss from raw logits, forward and backward in one pass each or in one together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._C import _AutoDispatchBelowAutograd

from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.ops import kd_kl_div_registration as _registration  # noqa: F401
from chanprune_ext.ops._loader import inside_transform, works_in_place
from chanprune_ext.ops.kd_kl_div_arguments import Numbers, Reduction, flat_rows
from chanprune_ext.ops.kd_kl_div_call import (
    check_range,
    name_the_culprit,
    operands,
    reference_loss,
    reference_only,
)
from chanprune_ext.ops.kd_kl_div_reference import kd_kl_div_reference

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Reduction", "kd_kl_div", "kd_kl_div_reference", "kd_kl_div_with_gradient"]

_WIDE = (torch.float32, torch.float64)
_OPS = torch.ops.chanprune


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
        temperature: T > 0, a number: a tensor that is to be learnt gets no gradient.
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
        traced it). Inside the transforms of torch.func (grad, vmap, jvp, ...)
        `kd_kl_div_reference` runs instead, which all of them understand.

    Raises:
        InvalidArgumentError: an argument is not as described. On CUDA an out-of-range label is not
            looked for, which would wait for the device; the loss of its row is NaN.
    """
    numbers = _numbers(temperature, soft_weight, hard_weight, label_smoothing, ignore_index)
    student, call, plain = operands(student, teacher, numbers, labels, weights, mask, reduction)
    if gradient_in_forward is None:
        gradient_in_forward = student.is_cpu and student.dtype in _WIDE
    elif gradient_in_forward:
        check_range(student, "gradient_in_forward should not be set")
    loss: Tensor
    if not plain and reference_only(student):
        loss = reference_loss(student, call)
    else:
        try:
            if not plain and torch.compiler.is_compiling():
                loss = _OPS.kd_kl_div(flat_rows(student), *call)[0]
            elif student.requires_grad and torch.is_grad_enabled():
                loss = _EagerLoss.apply(student, call, gradient_in_forward)
            else:
                with _AutoDispatchBelowAutograd():  # past the registered gradient, which is Python
                    loss = _OPS.kd_kl_div.default(flat_rows(student), *call)[0]
        except RuntimeError:
            name_the_culprit(student, teacher, numbers, labels, reduction)
            raise
    return loss if plain or not loss.dim() else loss.reshape(student.shape[:-1])


def kd_kl_div_with_gradient(
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
) -> tuple[Tensor, Tensor]:
    """The loss of :func:`kd_kl_div` and its gradient, in one pass and without autograd.

    On small batches autograd takes most of the time of a loss. A training step that adds nothing to
    this loss can do without::

        loss, gradient = kd_kl_div_with_gradient(logits, teacher_logits, 4.0)
        logits.backward(gradient)

    Args:
        student (Tensor[..., C]): as for `kd_kl_div`; float16 is refused, whose range an unscaled
            gradient can leave. What it was computed from gets no gradient here.
        teacher (Tensor[..., C]): likewise, and so on.
        temperature: likewise.
        labels (Tensor[...] | None): likewise.
        soft_weight: likewise.
        hard_weight: likewise.
        label_smoothing: likewise.
        ignore_index: likewise.
        weights (Tensor[...] | None): likewise.
        mask (Tensor[...] | None): likewise.
        reduction: likewise; for "none" the gradient is that of the rows' sum.

    Returns:
        tuple[Tensor, Tensor]: the loss, as `kd_kl_div` returns it, and its gradient with respect to
        `student`, of its shape and dtype. Neither has a graph.

    Raises:
        InvalidArgumentError: as for `kd_kl_div`, or inside a transform of torch.func, where
            ``torch.func.grad_and_value`` of `kd_kl_div` does the same.
    """
    numbers = _numbers(temperature, soft_weight, hard_weight, label_smoothing, ignore_index)
    wide, call, plain = operands(student, teacher, numbers, labels, weights, mask, reduction)
    check_range(student, "kd_kl_div_with_gradient makes no gradients")
    if not plain and inside_transform():
        raise InvalidArgumentError(
            "kd_kl_div_with_gradient should not be called inside a transform of torch.func; there "
            "torch.func.grad_and_value of kd_kl_div gives both"
        )
    if not plain and reference_only(wide):
        leaf = wide.detach().requires_grad_()
        with torch.enable_grad():
            loss = reference_loss(leaf, call)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        loss = loss.detach()
    else:
        try:
            with torch.no_grad():
                loss, gradient = _OPS.kd_kl_div_with_gradient.default(flat_rows(wide), *call)
        except RuntimeError:
            name_the_culprit(student, teacher, numbers, labels, reduction)
            raise
    if plain:
        return loss, gradient
    return (
        loss if not loss.dim() else loss.reshape(student.shape[:-1]),
        gradient.to(student.dtype).view(student.shape),
    )


def _numbers(
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    label_smoothing: float,
    ignore_index: int,
) -> Numbers:
    return (
        float(temperature),
        float(soft_weight),
        float(hard_weight),
        float(label_smoothing),
        ignore_index,
    )


class _EagerLoss(torch.autograd.Function):
    """The operator with its gradient, outside torch.compile.

    The same as calling the operator, whose registered gradient is generic Python code that costs
    more than the kernels do on small batches; and it can be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, call: tuple[Any, ...], with_gradient: bool) -> Tensor:
        run = _OPS.kd_kl_div_with_gradient if with_gradient else _OPS.kd_kl_div
        loss: Tensor
        loss, kept = run.default(flat_rows(student), *call)
        teacher, labels, row_weights, *_ = call
        statistics = None if with_gradient else kept
        ctx.gradient = [kept] if with_gradient else []
        ctx.left_out = row_weights == 0 if with_gradient and row_weights is not None else None
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
            gradient = _scaled(ctx.gradient.pop(), grad, ctx.left_out)
            return gradient if ctx.shape is None else gradient.view(ctx.shape), None, None
        student, teacher, statistics, *others = ctx.saved_tensors
        inputs = (flat_rows(student), teacher)
        if statistics is None:
            _, gradient = _OPS.kd_kl_div_with_gradient.default(*inputs, *others, *ctx.options)
            gradient = _scaled(gradient, grad, ctx.left_out)
        else:
            gradient = _OPS.kd_kl_div_backward.default(
                grad, *inputs, statistics, *others, *ctx.options
            )
        return gradient.view_as(student), None, None


def _scaled(gradient: Tensor, grad: Tensor, left_out: Tensor | None) -> Tensor:
    """The gradient for ones as upstream gradients, scaled by the true ones, in place if it can."""
    in_place = works_in_place(grad)
    if in_place and grad.is_cpu and not grad.dim() and grad.item() == 1:
        return gradient  # on CUDA the question would cost more than the answer
    if left_out is not None:  # those rows keep 0 even where the upstream gradient is infinite
        grad = torch.where(left_out, 0, grad)
    if grad.dim():
        grad = grad.unsqueeze(-1)
    return gradient.mul_(grad) if in_place else (gradient * grad).to(gradient.dtype)


def _differentiable_gradient(ctx: Any, grad: Tensor) -> Tensor:
    """The gradient as the reference computes it: with a graph, for derivatives of any order."""
    student, teacher, _, labels, row_weights = ctx.saved_tensors
    losses = reference_loss(student, (teacher, labels, row_weights, *ctx.options))
    return torch.autograd.grad(losses, student, grad, create_graph=True)[0]

"""Fake kernels and the registered gradient of the distillation loss, for torch.compile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.ops._loader import CPU_MODULE
from chanprune_ext.ops.accumulation import accumulation_dtype
from chanprune_ext.ops.kd_kl_div_arguments import REDUCTIONS

if TYPE_CHECKING:
    from torch import Tensor

__all__: list[str] = []

_STATISTICS = 5  # per row, see csrc/kd_kl_div_options.h
_OPS = torch.ops.chanprune


def _fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(student)
    shape = (student.shape[0],) if arguments[-1] == REDUCTIONS["none"] else ()
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

"""Distillation loss, forward and backward.

Must move: both logit tensors read, the gradient written. (An implementation that keeps the forward
and the backward apart has to read the logits twice.)
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interleaved import Call, Job
from torch import Tensor

from chanprune_ext.ops import kd_kl_div, kd_kl_div_with_gradient

TEMPERATURE = 4.0
SHAPES = {
    "128x10": (128, 10, torch.float32),
    "128x100": (128, 100, torch.float32),
    "1024x1000": (1024, 1000, torch.float32),
    "64x32000": (64, 32000, torch.float32),
    "8192x128256": (8192, 128256, torch.bfloat16),  # CUDA only
}
VARIANTS = (
    "ours",
    "ours_backward",
    "ours_with_gradient",
    "eager",
    "compiled",
    "liger",
    "nothing",
    "sum",
)


class Nothing(torch.autograd.Function):
    """Makes no loss and no gradient: what any function costs that takes part in autograd."""

    @staticmethod
    def forward(ctx: Any, student: Tensor) -> Tensor:
        ctx.gradient = student.detach()
        return student.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        return ctx.gradient


def eager(student: Tensor, teacher: Tensor) -> Tensor:
    loss = F.kl_div(
        F.log_softmax(student / TEMPERATURE, 1),
        F.log_softmax(teacher / TEMPERATURE, 1),
        reduction="batchmean",
        log_target=True,
    )
    return loss * TEMPERATURE**2


compiled = torch.compile(eager, dynamic=False)


def _losses(student: Tensor, teacher: Tensor) -> dict[str, Call]:
    calls: dict[str, Call] = {
        "ours": lambda: kd_kl_div(student, teacher, TEMPERATURE, gradient_in_forward=True),
        "ours_backward": lambda: kd_kl_div(
            student, teacher, TEMPERATURE, gradient_in_forward=False
        ),
        "eager": lambda: eager(student, teacher),
        "compiled": lambda: compiled(student, teacher),
        "nothing": lambda: Nothing.apply(student),
        "sum": student.sum,  # the cheapest loss that torch's own native code has
    }
    if student.is_cuda and importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerKLDIVLoss

        divergence = LigerKLDIVLoss(reduction="batchmean", log_target=True)
        calls["liger"] = lambda: (
            divergence(
                F.log_softmax(student / TEMPERATURE, 1), F.log_softmax(teacher / TEMPERATURE, 1)
            )
            * TEMPERATURE**2
        )
    return calls


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_kd_kl_div(compare, device, shape, variant):
    rows, classes, dtype = SHAPES[shape]
    if rows * classes > 2**24 and device.type == "cpu":
        pytest.skip("too large for a CPU")

    def make() -> Job:
        generator = torch.Generator(device).manual_seed(0)
        logits = [
            torch.randn(rows, classes, generator=generator, device=device, dtype=dtype)
            for _ in range(2)
        ]
        student = logits[0].requires_grad_()
        calls: dict[str, Call] = {
            name: lambda loss=loss: torch.autograd.grad(loss(), student)
            for name, loss in _losses(student, logits[1]).items()
        }
        # The same two results, made without autograd.
        calls["ours_with_gradient"] = lambda: kd_kl_div_with_gradient(
            student, logits[1], TEMPERATURE
        )
        return Job(3 * student.numel() * student.element_size(), calls)

    compare(f"kd_kl_div {shape} {device}", variant, make)

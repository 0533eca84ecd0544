"""Distillation loss, forward and backward.

Must move: both logit tensors once for the loss; both once more and the gradient for the backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chanprune_ext.ops import kd_kl_div

if TYPE_CHECKING:
    from collections.abc import Callable

TEMPERATURE = 4.0


def ours(student: Tensor, teacher: Tensor) -> Tensor:
    return kd_kl_div(student, teacher, TEMPERATURE)


def eager(student: Tensor, teacher: Tensor) -> Tensor:
    loss = F.kl_div(
        F.log_softmax(student / TEMPERATURE, 1),
        F.log_softmax(teacher / TEMPERATURE, 1),
        reduction="batchmean",
        log_target=True,
    )
    return loss * TEMPERATURE**2


def compiled(student: Tensor, teacher: Tensor) -> Tensor:
    return _compiled(student, teacher)


_compiled = torch.compile(eager, dynamic=False)


@pytest.mark.parametrize("run", [ours, eager, compiled])
@pytest.mark.parametrize(
    "shape", [(128, 10), (128, 100), (1024, 1000), (64, 32000)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def bench_kd_kl_div(moved, benchmark, device, shape, run: Callable):
    benchmark.group = f"kd_kl_div {shape[0]}x{shape[1]} {device}"
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(shape, generator=generator).to(device).requires_grad_()
    teacher = torch.randn(shape, generator=generator).to(device)
    moved(
        5 * student.numel() * student.element_size(),
        lambda: torch.autograd.grad(run(student, teacher), student),
    )

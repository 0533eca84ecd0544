"""What the CUDA module does otherwise than the CPU's, seen under ``tools/emulate_cuda.py``."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import pytest
import torch

from chanprune_ext.ops import (
    channel_norms,
    kd_kl_div,
    kd_kl_div_with_gradient,
    slice_channels,
)
from chanprune_ext.ops._loader import CPU_MODULE

if TYPE_CHECKING:
    from collections.abc import Callable

_LAUNCHES = getattr(ctypes.CDLL(CPU_MODULE.path), "cuda_emulation_launches", None)
pytestmark = pytest.mark.skipif(_LAUNCHES is None, reason="needs tools/emulate_cuda.py")


def launches_of(call: Callable[[], object]) -> int:
    assert _LAUNCHES is not None
    _LAUNCHES.restype = ctypes.c_int64
    before = _LAUNCHES()
    call()
    return int(_LAUNCHES() - before)


@pytest.fixture(scope="module")
def weights() -> list[torch.Tensor]:
    torchvision = pytest.importorskip("torchvision")
    return [p for p in torchvision.models.resnet50().parameters() if p.dim() > 1]


@pytest.mark.parametrize("dim", [0, 1])
def test_a_whole_network_is_scored_in_two_launches(weights: list[torch.Tensor], dim: int) -> None:
    with torch.no_grad():
        assert launches_of(lambda: channel_norms(weights, [dim] * len(weights))) <= 2


def test_a_whole_network_is_sliced_in_one_launch(weights: list[torch.Tensor]) -> None:
    rows = [torch.arange(0, weight.shape[0], 2) for weight in weights]
    with torch.no_grad():
        assert launches_of(lambda: slice_channels(weights, rows, [None] * len(weights))) == 1


@pytest.mark.parametrize(
    ("gradient_in_forward", "forward", "backward"), [(True, 2, 0), (False, 2, 1)]
)
def test_launches_of_a_distillation_loss(
    gradient_in_forward: bool, forward: int, backward: int
) -> None:
    student, teacher = torch.randn(2, 40, 1500)
    student.requires_grad_()
    losses: list[torch.Tensor] = []
    made = launches_of(
        lambda: losses.append(kd_kl_div(student, teacher, gradient_in_forward=gradient_in_forward))
    )
    assert made == forward
    assert launches_of(losses[0].backward) == backward


@pytest.mark.parametrize("classes", [5, 1500])  # a row by a warp, by a block
@pytest.mark.parametrize("early", [True, False])
def test_labels_out_of_range_give_nan(classes: int, early: bool) -> None:
    student, teacher = torch.randn(2, 3, classes)
    student.requires_grad_()
    loss = kd_kl_div(
        student,
        teacher,
        labels=torch.tensor([0, classes, 1]),
        hard_weight=1.0,
        reduction="none",
        gradient_in_forward=early,
    )
    assert loss.isnan().tolist() == [False, True, False]
    loss.sum().backward()
    assert student.grad is not None
    assert student.grad.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("classes", [5, 1500])
def test_labels_out_of_range_give_nan_in_loss_and_gradient(classes: int) -> None:
    student, teacher = torch.randn(2, 3, classes)
    loss, gradient = kd_kl_div_with_gradient(
        student,
        teacher,
        labels=torch.tensor([0, classes, 1]),
        hard_weight=1.0,
        reduction="none",
    )
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(1).tolist() == [False, True, False]


def test_the_order_of_threads_changes_no_bit() -> None:
    # The emulation draws another order for every block of every call.
    weights = [torch.randn(64, 4000), torch.randn(3, 200, 1000), torch.randn(2, 100_000)]
    first, second = (channel_norms(weights, [0, 1, 0], p=2.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    student, teacher = torch.randn(2, 300, 2000)
    assert torch.equal(kd_kl_div(student, teacher), kd_kl_div(student, teacher))

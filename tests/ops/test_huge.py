"""Operators on tensors of more than 2^31 elements, where 32-bit indices would wrap around."""

from __future__ import annotations

import math

import pytest
import torch

from chanprune_ext.ops import channel_norms, kd_kl_div, slice_channels

pytestmark = pytest.mark.slow
BEYOND = 2**31


@pytest.fixture
def zeros(native_device):
    """Makes zeros on the device, or skips where so many copies of them do not fit."""

    def make(*shape, dtype, copies=1):
        needed = copies * math.prod(shape) * dtype.itemsize
        if native_device.type == "cuda":
            free = torch.cuda.mem_get_info()[0]
        else:
            free = pytest.importorskip("psutil").virtual_memory().available
        if free < needed:
            pytest.skip(f"needs {needed >> 30} GB of memory, {free >> 30} are free")
        return torch.zeros(shape, dtype=dtype, device=native_device)

    return make


def test_norms_of_long_rows(zeros):
    weight = zeros(2, BEYOND // 2 + 67, dtype=torch.bfloat16)
    weight[0, 5], weight[1, -1] = 3, -4
    (norms,) = channel_norms([weight], [0], p=2.0)
    assert norms.tolist() == [3, 4]


def test_norms_of_many_short_columns(zeros):
    weight = zeros(BEYOND // 7 + 100, 7, dtype=torch.bfloat16)
    weight[0, 2], weight[-1, 2], weight[-1, 6] = 1, -2, 5
    (norms,) = channel_norms([weight], [1])
    assert norms.tolist() == [0, 0, 3, 0, 0, 0, 5]


def test_slice_from_the_far_end(zeros):
    rows, columns = BEYOND // 2**15 + 3, 2**15 + 1
    tensor = zeros(rows, columns, dtype=torch.uint8)
    tensor[-1, -1], tensor[-2, 0], tensor[0, 0] = 7, 8, 9
    chosen = [torch.tensor(i, device=tensor.device) for i in ([0, rows - 2, rows - 1],)]
    kept = torch.tensor([0, columns - 1], device=tensor.device)
    (result,) = slice_channels([tensor], chosen, [kept])
    assert result.tolist() == [[9, 0], [8, 0], [0, 7]]


def test_slice_of_which_more_is_left(zeros):
    tensor = zeros(3, BEYOND // 2 + 5, dtype=torch.uint8, copies=2)
    tensor[2, -1], tensor[1, 3] = 7, 8
    (result,) = slice_channels([tensor], [torch.tensor([2, 1], device=tensor.device)], [None])
    assert result.shape == (2, BEYOND // 2 + 5)
    assert [int(result[0, -1]), int(result[1, 3]), int(result.count_nonzero())] == [7, 8, 2]


def test_loss_and_gradient_of_many_classes_and_rows(zeros):
    classes = 120_000
    logits = zeros(BEYOND // classes + 2, classes, dtype=torch.bfloat16, copies=2)
    logits[-1, -1] = 10
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    labels[-1] = classes - 1
    student = logits.detach().requires_grad_()
    loss = kd_kl_div(student, logits, labels=labels, hard_weight=1.0, reduction="none")
    certain = 1 / (1 + (classes - 1) * math.exp(-10))
    assert loss[:-1].allclose(loss.new_tensor(math.log(classes)))
    assert math.isclose(loss[-1].item(), -math.log(certain), rel_tol=1e-4)
    loss.sum().backward()
    assert student.grad is not None
    first, last = student.grad[0, :2].tolist(), student.grad[-1, -2:].tolist()
    assert first == pytest.approx([1 / classes - 1, 1 / classes], rel=1e-2)
    assert last == pytest.approx([certain * math.exp(-10), certain - 1], rel=1e-2)

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chanprune_ext.data import TensorImages
from chanprune_ext.errors import DataError, InvalidArgumentError
from chanprune_ext.recovery import evaluate


class Given(nn.Module):
    """Returns its input as logits, wrapped as asked."""

    def __init__(self, wrap: str = "tensor") -> None:
        super().__init__()
        self.wrap = wrap
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Any:
        x = self.drop(x if shift is None else x + shift)
        if self.wrap == "dict":
            return {"logits": x}
        return x if self.wrap == "tensor" else SimpleNamespace(logits=x)


@pytest.mark.parametrize("wrap", ["tensor", "dict", "attribute"])
def test_counts_by_hand(wrap: str) -> None:
    logits = torch.eye(8)[[0, 1, 2, 3]] * 5 - torch.arange(8.0) / 10
    labels = torch.tensor([0, 1, 3, 7])  # right, right, in the first five, not even that
    model = Given(wrap).train()
    found = evaluate(model, [(logits[:3], labels[:3]), (logits[3:], labels[3:])])
    assert (found.top1, found.top5, found.n) == (0.5, 0.75, 4)
    assert found.loss == pytest.approx(F.cross_entropy(logits, labels).item())
    assert found.standard_error == pytest.approx(math.sqrt(0.25 / 4))
    assert str(found).startswith("top-1 50.00 % (s.e. 25.00), top-5 75.00 %")
    assert model.training
    assert model.drop.training


def test_fewer_than_five_classes_count_all_of_them() -> None:
    assert evaluate(Given(), [(torch.eye(3), torch.tensor([1, 1, 1]))]).top5 == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_are_given_in_the_type_of_the_weights(dtype: torch.dtype) -> None:
    model, seen = nn.Linear(6, 3).to(dtype), torch.randn(8, 6)
    expected = evaluate(model, [(seen.to(dtype), torch.arange(8) % 3)])
    assert evaluate(model, [(seen, torch.arange(8) % 3)]) == expected
    words = nn.Sequential(nn.Embedding(5, 6), nn.Flatten(), nn.Linear(6, 3)).to(dtype)
    assert evaluate(words, [(torch.tensor([[4], [0]]), torch.tensor([0, 1]))]).n == 2


@pytest.mark.parametrize("inputs", ["tuple", "dict"])
def test_models_with_several_inputs(inputs: str) -> None:
    x, shift = torch.zeros(2, 3), torch.eye(3)[:2]
    batch = (x, shift) if inputs == "tuple" else {"x": x, "shift": shift}
    assert evaluate(Given(), [(batch, torch.tensor([0, 1]))]).top1 == 1


def test_datasets_are_measured_without_augmentation() -> None:
    pixels = torch.zeros(6, 1, 4, 4, dtype=torch.uint8)
    pixels[:3, :, :, 0] = 255  # a bright left edge, which mirroring would move
    labels = torch.tensor([1, 1, 1, 0, 0, 0])
    data = TensorImages(pixels, labels, "ab", (0.0,), (1.0,), augment=True)

    class LeftEdge(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            edge = x[:, 0, :, 0].mean(1)
            return torch.stack([1 - edge, edge], 1)

    assert evaluate(LeftEdge(), data, batch_size=4).top1 == 1
    assert data.augment


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data: expected at least one batch, got none"),
        (
            [(torch.zeros(2, 3), torch.tensor([0, 3]))],
            "expected 0 to 2 for a model with 3 outputs, got 3",
        ),
        ([(torch.zeros(2, 3), torch.tensor([0, -1]))], "got -1"),
        ([(torch.zeros(2, 3), torch.zeros(2))], r"labels: expected integers \[N\]"),
        ([(torch.zeros(2, 3), torch.zeros(2, 3).long())], r"got torch.int64 \[2, 3\]"),
        ([(torch.zeros(2, 3), torch.tensor([0]))], "got 1 labels and logits of 2 images"),
        ([torch.zeros(2, 3)], r"expected a pair \(images, labels\), got Tensor"),
        ([(torch.zeros(2, 3),)], "got tuple of 1"),
        ([("images", torch.tensor([1]))], "expected tensors in a batch, got str"),
    ],
)
def test_bad_data_are_explained(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(Given(), data)


def test_models_that_are_no_classifier_are_explained() -> None:
    labels = torch.tensor([0, 1])
    with pytest.raises(InvalidArgumentError, match=r"floating-point logits .*float32 \[2, 3, 4\]"):
        evaluate(Given(), [(torch.zeros(2, 3, 4), labels)])
    with pytest.raises(InvalidArgumentError, match="got list"):
        evaluate(_Lister(), [(torch.zeros(2, 3), labels)])


class _Lister(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]

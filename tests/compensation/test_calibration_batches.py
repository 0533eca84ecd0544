"""What calibration batches hold: labels or second inputs, masks, and what may be cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext.compensation.batches import ReadBatches, read_batches, split_batches
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.verification import input_shapes

CPU = torch.device("cpu")


class Optional(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x if mask is None else x * mask


class Flagged(nn.Module):
    def forward(self, x: Tensor, features: bool = False, mask: Tensor | None = None) -> Tensor:
        return x


X, SOFT, HARD = torch.randn(6, 4), torch.rand(6, 4), torch.arange(6)


@pytest.mark.parametrize(
    ("inputs", "batch", "expected"),
    [
        (X, (X, SOFT), X),
        ((X,), (X, SOFT), X),
        ((X, SOFT), (X, SOFT), (X, SOFT)),
        ((X, HARD), (X, HARD), (X, HARD)),
        ((X, HARD), ((X, HARD), HARD), (X, HARD)),
        ({"x": X}, ({"x": X}, SOFT), {"x": X}),
        (None, (X, SOFT), (X, SOFT)),
        (None, (X, HARD), X),
    ],
)
def test_a_plan_tells_a_label_from_a_second_input(inputs, batch, expected):
    spec = None if inputs is None else input_shapes(inputs)
    (read,) = read_batches([batch], Optional(), device=CPU, inputs=spec)
    torch.testing.assert_close(read, expected, rtol=0, atol=0)
    again = read_batches(ReadBatches([read]), Optional(), device=CPU)
    torch.testing.assert_close(again[0], expected, rtol=0, atol=0)


def test_a_tensor_in_the_place_of_a_flag_is_a_label():
    (read,) = read_batches([(X, SOFT)], Flagged(), device=CPU)
    assert torch.equal(read, X)


def test_a_plan_tells_compensation_what_a_label_is():
    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.layers(x if mask is None else x * mask)

    torch.manual_seed(0)
    model, x = Segmenter(), torch.randn(12, 3, 8, 8)
    pruned = cpx.prune(model, x[:1])
    dense = torch.randint(0, 2, (12, 8, 8))
    assert cpx.compensate(pruned, model, [(x, dense)], progress=False).kept == "least_squares"


def test_infinity_hides_in_masks_and_nowhere_else():
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    assert len(read_batches([(X, mask)], Optional(), device=CPU)[0]) == 2
    for batch in ((X, mask * float("nan")), (X / 0, mask), X / 0):
        with pytest.raises(InvalidArgumentError, match="batch 0 contains NaN or infinity"):
            read_batches([batch], Optional(), device=CPU)


@pytest.mark.parametrize("positions", [5, 8])
def test_a_mask_as_long_as_the_first_axis_is_not_cut(positions: int):
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.head(self.layer(x, src_mask=mask))

    torch.manual_seed(0)
    model = Encoder().eval()
    mask = torch.ones(positions, positions, dtype=torch.bool).triu(1)
    batches = [(torch.randn(positions, 8, 16), mask) for _ in range(10)]
    cut = split_batches(batches, model, held_back=0.2, batch_size=4)
    assert [batch[0].shape[0] for batch in cut.fit] == [positions] * 8
    pruned = cpx.plan(model, batches[0], criterion=cpx.elimination(batches)).apply(model)
    assert cpx.compensate(pruned, model, batches, progress=False).kept == "least_squares"

"""Packed sequences through recurrent layers, and tensors made in the widths of attributes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from models import randomised, relative_error, run, zeroed
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import chanprune_ext as cpx
from chanprune_ext.analysis import analyse
from chanprune_ext.errors import NothingToPruneError

if TYPE_CHECKING:
    from collections.abc import Callable

# How many steps a sequence has is a value.
pytestmark = pytest.mark.filterwarnings("ignore:the forward reads values of tensors")

TOKENS = torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(0))


class Packed(nn.Module):
    """Sequences of two lengths, packed in front of a recurrent layer, padded again behind it."""

    def __init__(self, kind: type[nn.RNNBase], batch_first: bool, **options: Any) -> None:
        super().__init__()
        self.embedding, self.widen = nn.Embedding(30, 8), nn.Linear(8, 10)
        self.recurrent = kind(10, 12, batch_first=batch_first, **options)
        self.head = nn.Linear(24 if self.recurrent.bidirectional else 12, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        first = self.recurrent.batch_first
        x = self.widen(self.embedding(tokens if first else tokens.T))
        lengths = torch.tensor([4, 7])
        packed = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False)
        padded, _ = pad_packed_sequence(self.recurrent(packed)[0], batch_first=first)
        return self.head(padded)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_channels_pass_through_packed_sequences(
    kind: type[nn.RNNBase], options: dict[str, Any], batch_first: bool
) -> None:
    torch.manual_seed(0)
    model = randomised(Packed(kind, batch_first, **options))
    plan = cpx.plan(model, TOKENS, 0.5)
    small = plan.apply(model, verify="numeric")
    assert (small.widen.out_features, small.recurrent.hidden_size) == (5, 6)
    assert relative_error(run(small, TOKENS), run(zeroed(model, plan), TOKENS)) < 1e-9


class OnlyRealTensors(Packed):
    """How many steps there are is a value: nothing without values can run this."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.widen(self.embedding(tokens[:, : int(tokens.max()) % 3 + 4]))
        out: Tensor = self.head(self.recurrent(x)[0])
        return out


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_of_real_tensors(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = randomised(OnlyRealTensors(kind, batch_first=True, **options)).float()
    assert analyse(model, TOKENS).trace.substrate == "real"
    plan = cpx.plan(model, TOKENS, 0.5)
    small = plan.apply(model, verify="numeric")
    assert (small.widen.out_features, small.recurrent.hidden_size) == (5, 6)
    assert relative_error(run(small, TOKENS), run(zeroed(model, plan), TOKENS)) < 1e-9


class Made(nn.Module):
    """What is added to the features has a width of its own."""

    def __init__(self, make: Callable[[Tensor, int], Tensor], by_attribute: bool) -> None:
        super().__init__()
        self.features, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.make, self.by_attribute, self.width = make, by_attribute, 16

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.head(x + self.make(x, self.width if self.by_attribute else 16))


MADE: dict[str, Callable[[Tensor, int], Tensor]] = {
    "new_full": lambda x, n: x.new_full((x.shape[0], n), 0.5),
    "new_full by name": lambda x, n: x.new_full(size=(x.shape[0], n), fill_value=0.5),
    "full": lambda x, n: torch.full((x.shape[0], n), 0.5, dtype=x.dtype),
    "count in a tensor": lambda x, n: torch.ones(torch.tensor(4), n, dtype=x.dtype),
    "counts in a tuple": lambda x, n: torch.ones((torch.tensor(4), n), dtype=x.dtype),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_width_of_a_new_tensor(make: Callable[[Tensor, int], Tensor]) -> None:
    x = torch.randn(4, 6)
    model = randomised(Made(make, by_attribute=True))
    small = cpx.plan(model, x, 0.5).apply(model)
    assert small.width == small.features.out_features == 8
    with pytest.raises(NothingToPruneError, match="size 16"):
        cpx.plan(Made(make, by_attribute=False), x, 0.5)

"""Configurations found for pruned models without transformers: all that has ``to_dict`` will do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext.hugging_face import narrow_config


class Config:
    def __init__(self) -> None:
        self.width = 16

    def to_dict(self) -> dict[str, int]:
        return dict(vars(self))


class Configured(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.body = nn.Sequential(nn.Linear(6, config.width), nn.ReLU(), nn.Linear(config.width, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_a_narrow_configuration_of_a_model_with_a_pruned_part() -> None:
    model = Configured(Config())
    model.body = cpx.prune(model.body, torch.randn(2, 6), 0.5)
    assert narrow_config(model).width == 8


class Part:
    """A configuration that checks its numbers, and leaves one open."""

    def __init__(self) -> None:
        self.heads, self.inner = 4, None

    def __setattr__(self, name: str, value: object) -> None:
        if name == "words" and not isinstance(value, str):
            raise RuntimeError("words are no numbers")
        super().__setattr__(name, value)

    def to_dict(self) -> dict[str, object]:
        return {"words": None, **vars(self)}


class Whole:
    def __init__(self) -> None:
        self.text, self.width = Part(), 24

    def to_dict(self) -> dict[str, object]:
        return {"text": self.text.to_dict(), "width": self.width}


class Attending(nn.Module):
    """Attention whose heads are as wide as the configuration says, or else as width and number."""

    def __init__(self, config: Part, width: int) -> None:
        super().__init__()
        self.config, self.heads = config, config.heads
        self.head_dim = getattr(config, "head_dim", None) or width // config.heads
        inner = config.inner or 2 * width
        self.qkv = nn.Linear(width, 3 * self.heads * self.head_dim)
        self.out = nn.Linear(self.heads * self.head_dim, width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).movedim(-3, 0)
        q, k, v = (part.transpose(-3, -2) for part in parts)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2)
        x = x + self.out(y)
        return x + self.down(self.up(x).relu())


class Composed(nn.Module):
    def __init__(self, config: Whole) -> None:
        super().__init__()
        self.config = config
        self.text = Attending(config.text, config.width)
        self.head = nn.Linear(config.width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.text(x))


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (("heads",), (24, 2, 6, None)),
        (("mlp",), (24, 4, None, 24)),
        (("heads", "mlp"), (24, 2, 6, 24)),
    ],
)
def test_numbers_within_a_configuration_and_those_it_leaves_open(
    kinds: tuple[str, ...], expected: tuple[int | None, ...]
) -> None:
    model, x = Composed(Whole()).eval(), torch.randn(2, 5, 24)
    small = cpx.prune(model, x, 0.5, kinds=kinds)
    config = narrow_config(small)
    text = config.text
    assert (config.width, text.heads, getattr(text, "head_dim", None), text.inner) == expected
    again = Composed(config).eval()
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), small(x))
    # The configuration of the model it was pruned from is as it was.
    assert (model.config.width, model.config.text.heads) == (24, 4)

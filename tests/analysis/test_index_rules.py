"""Reading and writing by index: indexed dims stay whole, other channels pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from between import assert_needed, assert_passes, assert_stays, between
from models import randomised, relative_error, run, zeroed
from torch import Tensor, nn

import chanprune_ext as cpx

if TYPE_CHECKING:
    from collections.abc import Callable


def at(x: Tensor, *places: int) -> Tensor:
    return torch.tensor(places, device=x.device)


def checkers(x: Tensor) -> Tensor:
    """A mask (4, 6) of positions."""
    return (torch.arange(24, device=x.device) % 3 > 0).view(4, 6)


def changed(x: Tensor, index: object, value: object) -> Tensor:
    x = x.clone()
    x[index] = value
    return x


def through_a_view(m: nn.Module, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, 1:].permute(2, 0, 3, 1)[at(x, 0, 2)] = m.parts.vector
    return x


def rows(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [H, N, W, C]."""
    return x.permute(2, 0, 3, 1)


def rows_masked(x: Tensor) -> Tensor:
    """A mask of all of :func:`rows`, the same in all channels."""
    return checkers(x)[:, None, :, None].expand(4, 2, 6, x.shape[1])


def unrows(x: Tensor) -> Tensor:
    return x.permute(1, 3, 0, 2)


PASSES: dict[str, Callable[..., Tensor]] = {
    "mask of two dims behind channels": lambda m, x: x[:, :, checkers(x)][..., None],
    "mask of three dims before channels": lambda m, x: (
        x.permute(0, 2, 3, 1)[checkers(x).expand(2, 4, 6)].view(2, -1, 1, x.shape[1])
    ).permute(0, 3, 1, 2),
    "mask of the batch": lambda m, x: x[torch.ones(2, dtype=torch.bool, device=x.device)],
    "indices on both sides of channels": lambda m, x: x[
        at(x, 1, 0)[:, None], :, at(x, 0, 2)[None]
    ].permute(0, 2, 1, 3),
    "mask and index side by side": lambda m, x: x[
        :, :, torch.tensor([True, False, True, True], device=x.device), at(x, 0, 1, 5)
    ][..., None],
    "select from the end": lambda m, x: x.select(-1, 2)[..., None],
    "index_select from the end": lambda m, x: x.index_select(-2, at(x, 0, 3)),
    "index after a new dim": lambda m, x: x[None, :, :, at(x, 0, 3)][0],
    "index of two dims": lambda m, x: x[:, :, at(x, 0, 3, 1, 2).view(2, 2)].flatten(2, 3),
    "read only for its shape": lambda m, x: x + x.new_zeros(x[:, 0].shape)[:, None],
    "filled like a position": lambda m, x: x + torch.full_like(x[:, 0], 0.5)[:, None],
    "masked rows from others": lambda m, x: unrows(
        rows(x).masked_scatter(checkers(x)[:, None, :, None], rows(x).sin())
    ),
    "masked rows in place": lambda m, x: unrows(
        rows(x).clone().masked_scatter_(rows_masked(x), rows(x).sin().flatten(0, 2))
    ),
    "mask of all dims, alike in channels": lambda m, x: (
        rows(x)[rows_masked(x)].view(2, -1, 1, x.shape[1]).permute(0, 3, 1, 2)
    ),
    "number to positions": lambda m, x: changed(x, (slice(None), slice(None), [0, 2]), 0.5),
    "number where negative": lambda m, x: changed(x, x < 0, 0.1),
    "number where masked": lambda m, x: changed(
        x.permute(0, 2, 3, 1), checkers(x).expand(2, 4, 6), 0.25
    ).permute(0, 3, 1, 2),
    "vector to rows": lambda m, x: unrows(rows(x).index_put((at(x, 0, 2),), m.parts.vector)),
    "vector added to rows": lambda m, x: unrows(
        rows(x).index_put((at(x, 0, 0),), m.parts.vector, accumulate=True)
    ),
    "vector to rows of a view": through_a_view,
    "other rows to rows": lambda m, x: unrows(
        rows(x).index_put((at(x, 0, 2),), rows(x).sin()[at(x, 3, 1)])
    ),
    "gather positions": lambda m, x: x.gather(3, x.argsort(3)),
    "gather one position": lambda m, x: x.gather(2, x.argmax(2, keepdim=True)),
    "gather by expanded index": lambda m, x: x.flatten(2).gather(
        2, at(x, 0, 5, 7).view(1, 1, 3).expand(2, x.shape[1], 3)
    )[..., None],
    "take along a dim": lambda m, x: torch.take_along_dim(x, at(x, 0, 2).view(1, 1, 2, 1), 2),
    "scatter": lambda m, x: x.scatter(2, x.argsort(2)[:, :, :2], x.sin()),
    "scatter a number": lambda m, x: x.scatter(3, x.argmax(3, keepdim=True), 0.5),
    "scatter_add": lambda m, x: torch.zeros_like(x).scatter_add(2, x.argsort(2), x),
    "scatter_reduce": lambda m, x: x.scatter_reduce(2, x.argsort(2), x.cos(), "amax"),
    "index_add": lambda m, x: torch.zeros_like(x).index_add(2, at(x, 0, 0, 1, 1), x),
    "index_add_": lambda m, x: torch.zeros_like(x).index_add_(-1, at(x, *range(6)), x),
    "index_copy": lambda m, x: x.index_copy(2, at(x, 0, 1), x[:, :, 2:].sin()),
    "index_fill": lambda m, x: x.index_fill(2, at(x, 0, 1), 0.3),
}

POSITION = "a fixed position of these channels is read"
WRITTEN = "a fixed position of these channels is written"
STAYS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "mask of channels and rows": (
        lambda m, x: x[:, torch.ones(8, 4, dtype=torch.bool, device=x.device)].view(2, 8, 4, 6),
        POSITION,
    ),
    "index of channels and columns": (
        lambda m, x: x[:, at(x, *range(8)), :, at(x, *[0, 1] * 4)].transpose(0, 1)[..., None],
        POSITION,
    ),
    "mask of its own in each channel": (
        lambda m, x: x[(rows_masked(x).clone() & True).permute(1, 3, 0, 2)].view(2, 8, 4, 4),
        POSITION,
    ),
    "masked by value": (lambda m, x: x.masked_scatter(x > 0, x.sin()), WRITTEN),
    "masked rows of fewer channels": (
        lambda m, x: unrows(rows(x).masked_scatter(rows_masked(x)[..., :1], x)),
        WRITTEN,
    ),
    "mask over the batch computed from channels": (
        lambda m, x: x[x.mean((2, 3)) > -1e9].view(2, 8, 4, 6),
        POSITION,
    ),
    "one number to many channels": (
        lambda m, x: unrows(rows(x).index_put((at(x, 0, 2),), m.parts.one)),
        "one value is written to many channels",
    ),
    "written in channels": (
        lambda m, x: x.transpose(0, 1).index_put((at(x, 0, 2),), x.sum(1)).transpose(0, 1),
        POSITION,
    ),
    "gather along channels": (lambda m, x: x.gather(1, torch.zeros_like(x).long()), POSITION),
    "gather of fewer channels": (
        lambda m, x: x.gather(2, at(x, 0).view(1, 1, 1, 1).expand(2, 4, 1, 6)),
        POSITION,
    ),
    "scatter along channels": (lambda m, x: x.scatter(1, (x > 0).long(), x.sin()), WRITTEN),
    "scatter into fewer channels": (
        lambda m, x: x.scatter(2, torch.zeros_like(x[:, :, :1]).long()[:, :4], x.sin()),
        WRITTEN,
    ),
    "index_add along channels": (
        lambda m, x: torch.zeros_like(x).index_add(1, at(x, *range(8)), x),
        WRITTEN,
    ),
    "index_fill of channels": (lambda m, x: x.index_fill(-3, at(x, 0, 1), 0.3), WRITTEN),
}

# How torch writes one number to positions given by a list.
FILLS = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 15)
NEEDED = {
    "mask of two dims behind channels": "aten::index",
    "vector to rows": "aten::index_put",
    "vector to rows of a view": "aten::index_put_",
    "masked rows from others": "aten::masked_scatter",
    "masked rows in place": "aten::masked_scatter_",
    "gather positions": "aten::gather",
    "scatter": "aten::scatter",
    "scatter_add": "aten::scatter_add",
    "index_add": "aten::index_add",
    "index_add_": "aten::index_add_",
    "index_copy": "aten::index_copy",
    "index_fill": "aten::index_fill",
    "number to positions": "aten::index_fill_" if FILLS else "aten::index_put_",
}


@pytest.mark.parametrize("name", PASSES)
def test_passes(name: str) -> None:
    assert_passes(PASSES[name])


@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str) -> None:
    assert_stays(*STAYS[name])


@pytest.mark.parametrize("name", NEEDED)
def test_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_needed(PASSES[name], NEEDED[name], monkeypatch)


def test_a_vector_written_to_rows_goes_with_the_channels() -> None:
    model, images = between(PASSES["vector to rows"])
    plan = cpx.plan(model, images, 0.5)
    assert torch.equal(plan.kept["parts.vector"][0], plan.kept["a.weight"][0])


class Bags(nn.Module):
    """Three bags of nine tokens, weighted by a parameter or not."""

    def __init__(self, mode: str, weighted: bool = False, stored: bool = False) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 16, mode=mode)
        self.weights = nn.Parameter(torch.rand(9)) if weighted else None
        ids = torch.randint(0, 20, (9,))
        self.register_buffer("ids", ids if stored else None)
        self.register_buffer("starts", torch.tensor([0, 2, 5]))
        self.fc, self.out = nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids if self.ids is None else self.ids
        y = self.bag(ids, self.starts, per_sample_weights=self.weights)
        return self.out(self.fc(y).relu())


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("sum", {}),
        ("mean", {}),
        ("max", {}),
        ("sum", {"weighted": True}),
        ("sum", {"weighted": True, "stored": True}),
    ],
)
def test_embedding_bags(mode: str, options: dict[str, bool]) -> None:
    """Columns go; tokens, their weights and where bags start stay."""
    torch.manual_seed(0)
    model, ids = randomised(Bags(mode, **options)), torch.randint(0, 20, (9,))
    plan = cpx.plan(model, ids, 0.5)
    assert plan.kept["bag.weight"].keys() == {1}
    assert plan.kept["bag.weight"][1].shape == (8,)
    assert plan.kept.keys().isdisjoint({"weights", "ids", "starts"})
    assert {f.why for f in plan.frozen if f.entry == "bag.weight"} <= {
        "an embedding table is indexed by token id"
    }
    error = relative_error(run(plan.apply(model), ids), run(zeroed(model, plan), ids))
    assert error < 1e-9

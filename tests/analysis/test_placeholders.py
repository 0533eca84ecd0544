"""Features of images put in the place of tokens, as language models that see do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from between import between
from models import randomised, relative_error, run, zeroed
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext.analysis import analyse
from chanprune_ext.errors import NothingToPruneError

WIDTH, MARK = 16, 7
Put: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def checked(same: object) -> None:
    if not same:
        raise ValueError("not as many features as marks")


def counted(x: Tensor, marks: Tensor, features: Tensor) -> Tensor:
    checked(marks.sum() * x.shape[-1] == features.numel())
    return x.masked_scatter(marks.unsqueeze(-1), features)


def counted_the_other_way(x: Tensor, marks: Tensor, features: Tensor) -> Tensor:
    checked(features.numel() == x.shape[-1] * marks.sum())
    checked((features.numel() != x.shape[-1] * marks.sum()).logical_not())
    return x.masked_scatter(marks.unsqueeze(-1), features)


def at_least(x: Tensor, marks: Tensor, features: Tensor) -> Tensor:
    checked(torch.le(marks.sum() * x.shape[-1], features.numel()))
    return x.masked_scatter(marks[..., None].expand(-1, -1, x.shape[-1]), features)


def picked(x: Tensor, marks: Tensor, features: Tensor) -> Tensor:
    mask = marks.unsqueeze(-1).expand_as(x).to(x.device)
    checked(x[mask].numel() == features.numel())
    return x.masked_scatter(mask, features)


def in_place(x: Tensor, marks: Tensor, features: Tensor) -> Tensor:
    x = x.clone()
    x.masked_scatter_(marks.unsqueeze(-1).expand_as(x), features[None])
    return x


def expanded_for_nothing(x: Tensor, marks: Tensor, features: Tensor) -> Tensor:
    marks.logical_not().unsqueeze(-1).expand_as(x)
    return x.masked_scatter(marks.unsqueeze(-1), features)


def assigned(x: Tensor, marks: Tensor, features: Tensor) -> Tensor:
    x = x.clone()
    x[marks] = features
    return x


class Seeing(nn.Module):
    """Tokens, some of which are marks for patches of an image."""

    def __init__(self, put: Put) -> None:
        super().__init__()
        self.put = put
        self.embed, self.see = nn.Embedding(20, WIDTH), nn.Linear(12, WIDTH)
        self.fc, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, ids: Tensor, patches: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        if patches is not None:
            x = self.put(x, ids == MARK, self.see(patches))
        out: Tensor = self.out(x + self.fc(x).tanh())
        return out


def inputs(marks: int = 3) -> tuple[Tensor, Tensor]:
    ids = torch.randint(8, 20, (2, 6))
    ids.view(-1)[torch.randperm(12)[:marks]] = MARK
    return ids, torch.randn(marks, 12)


PUTS: list[Put] = [
    *(counted, counted_the_other_way, at_least, picked, in_place, expanded_for_nothing, assigned)
]


@pytest.mark.filterwarnings("ignore:the forward reads values")
@pytest.mark.parametrize("put", PUTS, ids=lambda f: f.__name__)
def test_tokens_and_features_lose_the_same_channels(put: Put) -> None:
    torch.manual_seed(0)
    model = randomised(Seeing(put))
    plan = cpx.plan(model, inputs(), 0.5)
    kept = plan.kept["embed.weight"][1]
    assert kept.shape == (WIDTH // 2,)
    assert torch.equal(plan.kept["see.weight"][0], kept)
    small = plan.apply(model)
    for marks in (3, 5, 0):  # as many as are found need not be as many as were
        other = inputs(marks)
        expected = run(zeroed(model, plan), other)
        assert relative_error(run(small, other), expected) < 1e-12
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        small(inputs(3)[0], torch.randn(2, 12))


def counts_are_output(x: Tensor, marks: Tensor, features: Tensor) -> Tensor:
    return counted(x, marks, features) * (marks.sum() * x.shape[-1])


def counts_are_read(x: Tensor, marks: Tensor, features: Tensor) -> Tensor:
    return counted(x, marks, features) * int(marks.sum() * x.shape[-1])


def counts_of_others(x: Tensor, marks: Tensor, features: Tensor) -> Tensor:
    checked(marks.sum() * x.shape[-1] > 3)
    return counted(x, marks, features)


class Through(torch.autograd.Function):
    """Hands on its input, under another name."""

    @staticmethod
    def forward(ctx: object, count: Tensor) -> Tensor:
        return count + 0


def counts_pass_a_function(x: Tensor, marks: Tensor, features: Tensor) -> Tensor:
    count = marks.sum() * x.shape[-1]
    checked(count == features.numel())
    return counted(x, marks, features) * Through.apply(count.detach())


@pytest.mark.filterwarnings("ignore:the forward reads values")
@pytest.mark.parametrize(
    "put", [counts_are_output, counts_are_read, counts_of_others, counts_pass_a_function]
)
def test_a_size_that_is_computed_with_stays(put: Put) -> None:
    model = Seeing(put).eval()
    told = [f for f in analyse(model, inputs()).frozen if f.entry == "embed.weight"]
    assert "their number is used in a computation" in {f.why for f in told}
    with pytest.raises(NothingToPruneError):
        cpx.plan(model, inputs(), 0.5)


class Product(nn.Module):
    """Returns a count times a width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        return self.b(y), (x > 0).sum() * y.shape[-1]


def test_a_returned_multiple_keeps_its_size() -> None:
    with pytest.raises(NothingToPruneError, match="their number is used in a computation"):
        cpx.plan(Product(), torch.randn(4, 3), 0.5)


def by_value(x: Tensor, marks: Tensor, features: Tensor) -> Tensor:
    return x.masked_scatter((x > 0) & marks.unsqueeze(-1), features)


def flattened(x: Tensor, marks: Tensor, features: Tensor) -> Tensor:
    return x.masked_scatter(marks.unsqueeze(-1), features.flatten())


@pytest.mark.parametrize("put", [by_value, flattened])
def test_what_is_not_put_row_by_row_stays(put: Put) -> None:
    model = Seeing(put).eval()
    told = [f for f in analyse(model, inputs()).frozen if f.entry == "see.weight"]
    assert {f.why for f in told} == {"a fixed position of these channels is written"}
    with pytest.raises(NothingToPruneError):
        cpx.plan(model, inputs(), 0.5)


def test_a_part_that_is_not_reached_is_told() -> None:
    model = Seeing(counted).eval()
    ids, patches = inputs()
    with pytest.warns(UserWarning, match=r"does not reach see, left as wide") as caught:
        plan = cpx.plan(model, ids, 0.5)
    assert [w.filename for w in caught] == [__file__]
    with pytest.warns(UserWarning, match="does not reach see") as caught:
        small = cpx.prune(model, ids, 0.5)
    assert [w.filename for w in caught] == [__file__]
    assert plan.kept["embed.weight"][1].shape == (WIDTH // 2,)
    assert small(ids).shape == (2, 6, 5)
    with pytest.raises(ValueError, match="not as many"):
        small(ids, patches)


def test_parts_of_other_widths_are_not_told() -> None:
    model = nn.ModuleDict({"net": between(lambda _, x: x.relu())[0], "never": nn.Linear(3, 5)})

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.parts["net"](x)
            return out

    assert cpx.plan(Outer(), torch.randn(2, 3, 4, 6), 0.5).groups


def test_the_largest_part_is_told_and_a_few_of_many() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)
            self.tower = nn.ModuleDict({"in": nn.Linear(8, 8), "deep": nn.Sequential(self.b)})
            self.others = nn.ModuleList(nn.Sequential(nn.Linear(8, 4)) for _ in range(4))
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x))
            return out

    with pytest.warns(UserWarning, match=r"does not reach scale, tower\.in, others, left"):
        cpx.plan(Outer(), torch.randn(2, 3), 0.5)

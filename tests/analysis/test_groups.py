"""Coupling groups: who is in them, in which order, and what they cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models import network
from torch import Tensor, nn
from toys import TOYS

from chanprune_ext.analysis import Analysis, CouplingGroup, analyse


def analysed(name: str) -> Analysis:
    torch.manual_seed(0)
    return analyse(TOYS[name].make(), TOYS[name].inputs())


def members(group: CouplingGroup) -> dict[tuple[str, int], tuple[str, Any]]:
    return {(m.entry, m.dim): (m.role, m.indices.tolist()) for m in group.members}


def column(n: int, start: int = 0) -> list[list[int]]:
    return [[i] for i in range(start, start + n)]


def test_residual() -> None:
    stream, inner = analysed("Residual").groups
    assert stream.producers == ("stem.0", "b")
    assert stream.consumers == ("a.0", "head.fc")
    assert stream.units == 16
    assert members(stream) == {
        ("stem.0.weight", 0): ("out", column(16)),
        ("b.weight", 0): ("out", column(16)),
        ("a.0.weight", 1): ("in", column(16)),
        ("head.fc.weight", 1): ("in", column(16)),
        **{
            (f"stem.1.{name}", 0): ("with", column(16))
            for name in ("weight", "bias", "running_mean", "running_var")
        },
        ("b.bias", 0): ("with", column(16)),
    }
    assert inner.producers == ("a.0",)
    assert inner.consumers == ("b",)


def test_concatenation_shifts_indices() -> None:
    groups = {g.name: g for g in analysed("ConcatenatedBranches").groups}
    # The first branch is read twice: at 0 and behind the second.
    assert members(groups["a.0"])["c.0.weight", 1] == ("in", [[i, i + 20] for i in range(8)])
    assert members(groups["b.0"])["c.0.weight", 1] == ("in", column(12, 8))


def test_flatten_gives_a_unit_many_indices() -> None:
    groups = analysed("FlattenGrid").groups
    role, indices = members(groups[0])["fc1.weight", 1]
    assert role == "in"
    assert indices == [list(range(49 * c, 49 * c + 49)) for c in range(8)]
    last = analysed("FlattenLastChannels").groups
    assert members(last[0])["fc1.weight", 1][1] == [list(range(c, 512, 8)) for c in range(8)]


def test_depthwise_multiplier() -> None:
    group = analysed("DepthwiseMultiplier").groups[0]
    assert group.producers == ("a.0", "dw.0")
    assert group.multiplicity == 1
    assert members(group)["dw.0.weight", 0][1] == [[2 * c, 2 * c + 1] for c in range(16)]
    assert members(group)["pw.0.weight", 1][1] == [[2 * c, 2 * c + 1] for c in range(16)]


def test_grouped_convolution_has_two_factors() -> None:
    """Whole groups of the convolution, or one position in each of them."""
    analysis = analysed("GroupedConvolution")
    by_units = {(g.name, g.units) for g in analysis.groups}
    assert ("a.0", 6) in by_units
    assert ("g.0", 4) in by_units
    inside = next(g for g in analysis.groups if g.name == "a.0" and g.units == 6)
    assert inside.multiplicity == 4
    assert members(inside)["a.0.weight", 0][1] == [[c, c + 6, c + 12, c + 18] for c in range(6)]
    assert members(inside)["g.0.weight", 1][1] == column(6)
    assert analysis.trace.equations


def test_square_factors_are_told_apart() -> None:
    """As many groups as channels in one of them: the two are still different things."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 5, 1))
    analysis = analyse(net, torch.randn(1, 3, 4, 4))
    assert sorted((g.units, g.multiplicity) for g in analysis.groups) == [(4, 4), (4, 4)]
    blocks, strides = (members(g)["0.weight", 0][1] for g in analysis.groups)
    if blocks[0] != [0, 1, 2, 3]:
        blocks, strides = strides, blocks
    assert blocks == [[4 * g + i for i in range(4)] for g in range(4)]
    assert strides == [[4 * g + i for g in range(4)] for i in range(4)]
    assert analysis.conflicts == {(0, 1)}
    flags = {g.normalised for g in analysis.groups}
    assert flags == {True, False}, "only positions inside a group share its statistic"


def test_groups_are_in_order_of_execution() -> None:
    model, inputs = network("resnet18")
    names = [g.name for g in analyse(model, inputs).groups]
    assert names == [
        "conv1",
        *("layer1.0.conv1", "layer1.1.conv1"),
        *("layer2.0.conv1", "layer2.0.conv2", "layer2.1.conv1"),
        *("layer3.0.conv1", "layer3.0.conv2", "layer3.1.conv1"),
        *("layer4.0.conv1", "layer4.0.conv2", "layer4.1.conv1"),
    ]


def test_units_are_in_order_of_channels() -> None:
    for name in ("Residual", "SliceByAttribute", "DepthwiseMultiplier", "ChunkUnequalUse"):
        for group in analysed(name).groups:
            first = next(m for m in group.members if m.role == "out")
            assert (np.diff(first.indices[:, 0]) > 0).all()


def test_padded_channels_belong_to_those_they_meet() -> None:
    groups = analysed("ZeroPadShortcut").groups
    owners = {g.name: members(g) for g in groups if ("b.weight", 0) in members(g)}
    through = owners["a.0"]
    assert through["b.weight", 0][1] == column(8, 4)
    (padded,) = (m for n, m in owners.items() if n == "b")
    assert [i for (i,) in padded["b.weight", 0][1]] == [0, 1, 2, 3, 12, 13, 14, 15]


def test_frozen_channels_are_told_by_reason() -> None:
    analysis = analysed("SliceByLiteral")
    told = [(f.entry, f.channels, f.why, f.source.split(":")[0]) for f in analysis.frozen]
    assert told == [
        ("a.0.weight", 6, "slice at 6", "toys.py"),
        ("head.fc.weight", 5, "the model's output", "model output"),
    ]
    assert str(analysis.frozen[0]).startswith(
        "6 channels of 'a.0.weight' are kept: slice at 6 (toys"
    )


def test_frozen_channels_of_a_module_name_it() -> None:
    analysis = analysed("LocalResponseNorm")
    (told,) = [f for f in analysis.frozen if f.entry == "a.weight"]
    assert told.module == "norm"
    assert "in 'norm'" in str(told)


def test_an_attribute_tied_to_something_fixed_freezes_what_else_it_sizes() -> None:
    analysis = analysed("ScaledByAttribute")
    assert [f.channels for f in analysis.frozen if f.entry == "a.0.weight"] == [16]
    assert "a.0" not in {g.name for g in analysis.groups}


def test_masks_and_sizes_under_a_removal() -> None:
    analysis = analysed("Residual")
    stream = analysis.groups[0]
    gone = np.zeros(16, dtype=bool)
    gone[[1, 5]] = True
    labels = analysis.removed_labels({stream.index: gone})
    masks = analysis.kept_masks(labels)
    assert set(masks) == {m.entry for m in stream.members}
    assert np.flatnonzero(~masks["a.0.weight"][1]).tolist() == [1, 5]
    whole, less = analysis.sizes(analysis.removed_labels({})), analysis.sizes(labels)
    shapes = analysis.trace.shapes
    names = [n for n in shapes if "running" not in n and "tracked" not in n]
    assert whole.params(names) == sum(int(np.prod(shapes[n])) for n in names)
    removed = 2 * (27 + 2 + 24 * 9 + 24 * 9 + 1 + 5)
    assert whole.params(names) - less.params(names) == removed
    assert whole.macs() - less.macs() == 2 * 2 * (64 * (27 + 24 * 9 * 2) + 5)
    assert analysis.kept_masks(analysis.removed_labels({})) == {}


def test_a_model_without_groups() -> None:
    class Only(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    analysis = analyse(Only(), torch.randn(2))
    assert analysis.groups == ()
    assert analysis.frozen == ()
    assert analysis.kept_masks(analysis.removed_labels({})) == {}


@pytest.mark.parametrize("name", ["resnet56", "shufflenet_v2_x1_0", "densenet121"])
def test_every_index_belongs_to_one_group_or_is_frozen(name: str) -> None:
    model, inputs = network(name)
    analysis = analyse(model, inputs)
    seen: dict[tuple[str, int], np.ndarray] = {}
    for group in analysis.groups:
        for member in group.members:
            counts = seen.setdefault(
                (member.entry, member.dim),
                np.zeros(analysis.trace.shapes[member.entry][member.dim], dtype=int),
            )
            np.add.at(counts, member.indices.ravel(), 1)
    assert all(counts.max() == 1 for counts in seen.values())
    produced = sum(
        int(seen[k].sum()) for k, r in analysis.trace.roles.items() if r == "out" and k in seen
    )
    frozen = sum(f.channels for f in analysis.frozen)
    every = sum(
        analysis.trace.shapes[e][d] for (e, d), r in analysis.trace.roles.items() if r == "out"
    )
    assert produced + frozen == every


class _Feedforward(nn.Module):
    """A layer with a way round it; the activation is a sum of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x)
        y = 0.5 * y * (1 + (y + 0.044715 * y**3).tanh())
        out: Tensor = self.out(x + self.c(y))
        return out


class _Experts(nn.Module):
    """Matrices and biases of two experts, each in one tensor, chosen by a number."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.bias = nn.Parameter(torch.randn(2, 6, 16)), nn.Parameter(torch.randn(2, 16))
        self.down = nn.Parameter(torch.randn(2, 8, 2))

    def forward(self, x: Tensor) -> Tensor:
        which = torch.tensor([1, 0], device=x.device)
        y = torch.bmm(x[:, None], self.up[which])[:, 0] + self.bias[which]
        y = y[:, ::2] * y[:, 1::2].sigmoid()
        return torch.bmm(y[:, None], self.down.index_select(0, which))[:, 0]


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.read, self.steps = nn.Linear(6, 8), kind(8, 4, batch_first=True)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.steps(self.read(x))[0])
        return out


@pytest.mark.parametrize(
    ("model", "inputs", "kinds"),
    [
        (_Feedforward(), torch.randn(3, 6), {"a": "residual", "b": "mlp"}),
        (_Experts(), torch.randn(2, 6), {"up": "mlp"}),
        (_Recurrent(nn.LSTM), torch.randn(2, 5, 6), {"read": "mlp", "steps": "mlp"}),
        (_Recurrent(nn.GRU), torch.randn(2, 5, 6), {"read": "mlp", "steps": "mlp"}),
        (_Recurrent(nn.RNN), torch.randn(2, 5, 6), {"read": "mlp", "steps": "mlp"}),
        (
            nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 1)),
            torch.randn(2, 2, 8),
            {"0": "hidden"},
        ),
        (
            nn.Sequential(nn.ConvTranspose1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 1)),
            torch.randn(2, 2, 8),
            {"0": "hidden"},
        ),
    ],
)
def test_kinds(model: nn.Module, inputs: Tensor, kinds: dict[str, str]) -> None:
    assert {group.name: group.kind for group in analyse(model.eval(), inputs).groups} == kinds

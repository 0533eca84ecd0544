"""``plan.explain``: who is coupled to a layer, through which line, and what keeps its channels."""

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from models import network, randomised
from torch import Tensor, nn
from toys import TOYS

import chanprune_ext as cpx
from chanprune_ext.analysis import Frozen
from chanprune_ext.errors import ChanpruneError, CheckpointError, InvalidArgumentError
from chanprune_ext.inspection import inspect_model

if TYPE_CHECKING:
    from chanprune_ext.explanation import ExplainedGroup, ExplainedMember, Explanation

IMAGES = torch.zeros(2, 3, 8, 8)


def place(cls: type[nn.Module], snippet: str) -> str:
    """``file.py:line`` of the one line of a class's forward that contains ``snippet``."""
    lines, first = inspect.getsourcelines(cls.forward)
    (found,) = [first + k for k, line in enumerate(lines) if snippet in line]
    return f"{Path(__file__).name}:{found}"


def explained(model: nn.Module, name: str, inputs: Any = IMAGES) -> Explanation:
    torch.manual_seed(0)
    return cpx.plan(model, inputs, 0.5).explain(name)


def modules(group: ExplainedGroup, role: str) -> set[str]:
    return {m.module for m in group.members if m.role == role}


def member(group: ExplainedGroup, entry: str) -> ExplainedMember:
    (found,) = [m for m in group.members if m.entry == entry]
    return found


def met(group: ExplainedGroup, entry: str) -> tuple[list[str], str]:
    """Source lines through which a member is coupled, and the module it meets there."""
    found = member(group, entry)
    assert found.partner is not None
    return [event.source for event in found.via], found.partner.module


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 6, 1)
        self.outer = nn.Conv2d(6, 8, 1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(x)))
        y = self.outer(self.relu(self.inner(x)))
        x = x + y
        return self.fc(x.mean((2, 3)))


# -- who is coupled ------------------------------------------------------------------------------


def test_a_residual_sum() -> None:
    found = explained(Net(), "outer")
    (group,) = found.groups
    assert group.role == "out"
    assert (group.summary.name, group.summary.width_before, group.summary.width_after) == (
        *("stem", 8),
        4,
    )
    assert modules(group, "out") == {"stem", "outer"}
    assert modules(group, "in") == {"inner", "fc"}
    assert modules(group, "with") == {"stem", "bn", "outer"}  # two biases, and the batch norm
    assert {m.entry for m in group.members if m.asked} == {"outer.weight", "outer.bias"}
    assert met(group, "stem.weight") == ([place(Net, "x + y")], "outer")
    assert met(group, "bn.running_var") == ([place(Net, "self.bn(")], "stem")
    assert met(group, "inner.weight") == ([place(Net, "self.inner(")], "stem")
    assert met(group, "fc.weight") == ([place(Net, "self.fc(")], "stem")
    (event,) = member(group, "stem.weight").via
    assert (event.op, event.module) == ("aten::add", "")

    (read,) = found.reads
    assert (read.summary.name, read.summary.width_after) == ("inner", 3)
    assert met(read, "inner.weight") == ([place(Net, "self.inner(")], "outer")
    assert found.stuck == ()


def test_what_is_printed() -> None:
    text = str(explained(Net(), "outer"))
    assert text.splitlines() == [
        "outer",
        "  makes group 'stem': 8 -> 4 channels",
        "    made by",
        "      outer (weight dim 0, bias dim 0)",
        f"      stem (weight dim 0, bias dim 0) -- add ({place(Net, 'x + y')}) -- outer",
        "    going along",
        (
            "      bn (weight dim 0, bias dim 0, running_mean dim 0, running_var dim 0) -- "
            f"batch_norm in 'bn' ({place(Net, 'self.bn(')}) -- stem"
        ),
        "    read by",
        (
            f"      inner (weight dim 1) -- convolution in 'inner' ({place(Net, 'self.inner(')}) "
            "-- stem"
        ),
        f"      fc (weight dim 1) -- linear in 'fc' ({place(Net, 'self.fc(')}) -- stem",
        (
            "  reads group 'inner': 6 -> 3 channels, made by inner; outer -- convolution in "
            f"'outer' ({place(Net, 'self.outer(')}) -- inner"
        ),
    ]
    text = str(explained(Net(), "fc"))
    assert "keeps 4 channels (fc.weight dim 0, fc.bias dim 0) that must stay: the model's" in text


def test_a_layer_that_goes_along() -> None:
    found = explained(Net(), "bn")
    (group,) = found.groups
    assert group.role == "with"
    assert met(group, "stem.weight") == ([place(Net, "self.bn(")], "bn")
    assert "goes along with group 'stem'" in str(found)


def test_a_concatenation_is_read_in_parts() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 6, 1)
            self.c = nn.Conv2d(22, 4, 1)
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            return self.head(self.c(torch.cat([a, b, a], 1)))

    found = explained(Branches(), "c")
    assert [group.summary.name for group in found.reads] == ["a", "b"]
    assert [member(group, "c.weight").channels for group in found.reads] == [16, 6]
    assert all(modules(group, "in") == {"c"} for group in found.reads)
    (group,) = explained(Branches(), "a").groups
    assert met(group, "c.weight") == ([place(Branches, "self.c(")], "a")
    assert modules(group, "out") == {"a"}


def test_a_layer_beside_many_groups_is_told_briefly() -> None:
    """Batch norms of a dense block go along with every group before them."""
    plan = cpx.plan(network("densenet121")[0], torch.zeros(1, 3, 64, 64), 0.5)
    found = plan.explain("features.denseblock1.denselayer6.norm1")
    assert [group.role for group in found.groups] == ["with"] * 6
    lines = str(found).splitlines()
    assert len(lines) == 7
    assert lines[1].startswith(
        "  goes along with group 'features.conv0': 64 -> 32 channels, made by"
    )
    assert "-- batch_norm in 'features.denseblock1.denselayer6.norm1' (densenet.py:" in lines[1]


def test_a_coupling_through_tensors_that_are_no_parameters() -> None:
    """The two convolutions never meet: each is added to the same zeros."""

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
            self.c, self.d = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            a, b = self.a(x), self.b(x)
            zeros = torch.zeros(x.shape[0], a.shape[1], 8, 8)
            a = zeros + a
            b = b + zeros
            return self.c(a), self.d(b)

    (group,) = explained(Between(), "a").groups
    assert modules(group, "out") == {"a", "b"}
    assert met(group, "b.weight") == (
        [place(Between, "b + zeros"), place(Between, "zeros + a")],
        "a",
    )


def test_a_reshape_that_makes_factors() -> None:
    class Shuffle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 12, 1)
            self.b = nn.Conv2d(3, 12, 1)
            self.c = nn.Conv2d(12, 2, 1)
            self.pieces = 3

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x).unflatten(1, (self.pieces, -1))
            a = a.transpose(1, 2).flatten(1, 2)
            return self.c(a + self.b(x))

    found = explained(Shuffle(), "a")
    # Groups of four, or the same place in every group: two ways to take the same channels.
    assert sorted((group.units, group.rivals) for group in found.groups) == [(3, (4,)), (4, (3,))]
    for group in found.groups:
        sources, partner = met(group, "b.weight")
        assert sources == [place(Shuffle, "a + self.b"), place(Shuffle, "unflatten")]
        assert partner == "a"
    assert "the same channels could go in 3 units: one way is taken" in str(found)


class Chain(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(blocks))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x).relu() + x
        return self.head(x)


def test_a_long_chain_shows_the_nearest_coupling_of_each() -> None:
    """One line for each of 50 blocks, to its neighbour; not one for each pair."""
    (group,) = explained(Chain(50), "blocks.20").groups
    names = ["stem", *(f"blocks.{k}" for k in range(50))]
    assert modules(group, "out") == set(names)
    for k, name in enumerate(names):
        if name != "blocks.20":
            sources, partner = met(group, f"{name}.weight") if k < 1 else met_as_maker(group, name)
            assert sources == [place(Chain, "block(x)")]
            assert partner == names[k + 1 if k < 21 else k - 1]
    # Two lines a block (it makes and it reads), and the headings.
    assert len(str(explained(Chain(50), "blocks.20")).splitlines()) < 110


def met_as_maker(group: ExplainedGroup, module: str) -> tuple[list[str], str]:
    (found,) = [
        m
        for m in group.members
        if m.module == module and m.entry.endswith("weight") and m.role == "out"
    ]
    assert found.partner is not None
    return [event.source for event in found.via], found.partner.module


@pytest.mark.parametrize("name", TOYS)
def test_every_member_is_reached_and_agrees_with_the_plan(name: str) -> None:
    """No coupling is missing from the graph, and the groups cover all that a plan removes."""
    torch.manual_seed(0)
    toy = TOYS[name]
    model = randomised(toy.make())
    try:
        plan = cpx.plan(model, toy.inputs(), 0.5)
    except ChanpruneError:
        pytest.skip("nothing to prune here")
    covered: set[tuple[str, int]] = set()
    for entry in plan.fingerprint["tensors"]:
        found = plan.explain(entry)
        for group in (*found.groups, *found.reads):
            assert any(m.asked for m in group.members)
            covered.update((m.entry, m.dim) for m in group.members if m.asked)
            for each in group.members:
                assert each.asked == (each.entry == entry)
                walked = each
                while walked.partner is not None:
                    assert walked.via
                    walked = walked.partner
                assert walked.asked
                if group.summary.width_after < group.summary.width_before:
                    assert each.dim in plan.kept[each.entry]
    assert {(entry, dim) for entry, dims in plan.kept.items() for dim in dims} <= covered


# -- what must stay ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, toy in TOYS.items() if toy.kept_whole])
def test_what_froze_a_layer(name: str) -> None:
    torch.manual_seed(0)
    toy = TOYS[name]
    model = randomised(toy.make())
    try:
        found: Any = cpx.plan(model, toy.inputs(), 0.5)
    except ChanpruneError:
        found = inspect_model(model, toy.inputs())
    for entry in toy.kept_whole:
        about = found.explain(entry)
        stuck = [s for s in about.stuck if s.role == "out"]
        held = [g for g in about.groups if g.held is not None]
        assert toy.reason in str(about)
        assert model.get_parameter(entry).shape[0] == sum(s.channels for s in stuck) + sum(
            member(g, entry).channels for g in held
        )


def test_a_literal_is_named_with_its_line() -> None:
    class Literal(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(self.stem(x))
            y = y.view(x.shape[0], 6, 64)
            return self.fc(F.pad(y.mean(2), (0, 2)))

    found = explained(Literal(), "inner")
    assert found.groups == ()
    assert {(s.entry, s.channels) for s in found.stuck} == {("inner.weight", 6), ("inner.bias", 6)}
    assert all(s.why is not None for s in found.stuck)
    assert f"size 6 -- view ({place(Literal, 'y.view')})" in str(found)


def test_channels_that_stay_in_part() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(5, 2, 1)
            self.k = 5

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            a = self.a(x)
            return self.b(a[:, : self.k]), a[:, self.k :]

    found = explained(Sliced(), "a")
    (group,) = found.groups
    assert member(group, "a.weight").channels == group.summary.width_before == 5
    assert {(s.entry, s.dim, s.channels) for s in found.stuck} == {
        ("a.weight", 0, 3),
        ("a.bias", 0, 3),
        ("a.weight", 1, 3),
    }
    assert "keeps 3 channels (a.weight dim 0, a.bias dim 0) that must stay: the model's out" in str(
        found
    )


def test_a_group_that_a_plan_holds_back() -> None:
    plan = cpx.plan(Net(), IMAGES, ratios={"inner": 0.5}, ratio=0.0)
    why = Frozen("stem.weight", 8, "no whole number fits", "view", "", "model.py:7")
    held = replace(plan, frozen=(*plan.frozen, why))
    (group,) = held.explain("outer").groups
    assert group.held == why
    assert "kept whole by this plan: no whole number fits -- view (model.py:7)" in str(
        held.explain("bn")
    )
    assert held.explain("inner").groups[0].held is None
    assert plan.explain("outer").groups[0].held is None


def test_channels_that_only_go_together() -> None:
    class Mirrored(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, width, 1), nn.Conv2d(3, 4, 1)
            self.c = nn.Conv2d(width + 4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            return self.c(torch.cat([a + a.flip(1), self.b(x)], 1))

    for width, title in ((8, "8 channels in 4 units"), (2, "2 channels, which only go all at")):
        found = inspect_model(Mirrored(width), IMAGES).explain("a")
        (group,) = found.groups
        assert group.units == width // 2
        assert title in str(found)


# -- names ---------------------------------------------------------------------------------------


def test_any_part_of_the_model_has_an_explanation() -> None:
    plan = cpx.plan(network("resnet18")[0], torch.zeros(1, 3, 64, 64), 0.5)
    block = plan.explain("layer3.1")
    assert {group.summary.name for group in block.groups} == {"layer3.0.conv2", "layer3.1.conv1"}
    assert {m.entry for m in block.groups[0].members if m.asked} <= set(block.entries)
    entry = plan.explain("layer3.1.conv2.weight")
    assert entry.entries == ("layer3.1.conv2.weight",)
    assert plan.explain("layer3.1.bn2.running_mean").groups[0].role == "with"
    assert [group.summary.name for group in entry.reads] == ["layer3.1.conv1"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layer3.1.con2", "no module or parameter of the model; did you mean 'layer3.1.conv2'"),
        ("downsample.0", "did you mean 'layer2.0.downsample.0', 'layer3.0.downsample.0'"),
        ("layer3.1.conv2.weights", "did you mean 'layer3.1.conv2.weight'"),
        ("", "name '' is no module"),
        ("zzz", "name 'zzz' is no module or parameter of the model$"),
        ("layer3.1.relu", "is a ReLU without parameters, so it has no channels of its own"),
        (3, "name must be that of a module or parameter .str., got int"),
    ],
)
def test_names_that_say_nothing(name: Any, message: str) -> None:
    plan = cpx.plan(network("resnet18")[0], torch.zeros(1, 3, 64, 64), 0.5)
    with pytest.raises(InvalidArgumentError, match=message):
        plan.explain(name)


class Tied(nn.Module):
    """An embedding and the output layer of one weight, and one convolution under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 12)
        self.again = self.up
        self.down = nn.Linear(12, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(F.relu(self.up(x)))
        x = x + self.down(F.relu(self.again(x)))
        return self.out(x)


def test_shared_weights_are_found_under_all_their_names() -> None:
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    plan = cpx.plan(Tied(), tokens, 0.5)
    tied, first = plan.explain("out"), plan.explain("embed")
    assert tied.entries == first.entries == ("embed.weight",)
    assert tied.aliases == {"out.weight": "embed.weight"}
    assert "out.weight is embed.weight, shared" in str(tied)
    assert str(tied).splitlines()[2:] == str(first).splitlines()[1:]
    again = plan.explain("again")
    assert again.entries == ("up.bias", "up.weight")
    assert [g.summary.name for g in again.groups] == [
        g.summary.name for g in plan.explain("up").groups
    ]
    assert plan.explain("again.bias").entries == ("up.bias",)


# -- plans that were saved, and models without a plan ----------------------------------------------


@pytest.mark.parametrize("name", ["Residual", "ChannelShuffle", "LinearAttention", "TwoInputs"])
def test_a_saved_plan_tells_the_same(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = randomised(TOYS[name].make()), TOYS[name].inputs()
    plan = cpx.plan(model, inputs, 0.5)
    plan.save(tmp_path / "plan.json")
    again = cpx.PruningPlan.load(tmp_path / "plan.json")
    cpx.save(plan.apply(model), tmp_path / "model.safetensors")
    loaded = cpx.plan_of(cpx.load(tmp_path / "model.safetensors", copy.deepcopy(model)))
    assert loaded is not None
    for entry in plan.fingerprint["tensors"]:
        assert str(again.explain(entry)) == str(plan.explain(entry)) == str(loaded.explain(entry))


def test_a_pruned_model_and_its_copy_know_what_was_coupled() -> None:
    pruned = cpx.prune(Net(), IMAGES, 0.5)
    for model in (pruned, copy.deepcopy(pruned)):
        plan = cpx.plan_of(model)
        assert plan is not None
        assert "add" in str(plan.explain("outer"))


def test_a_plan_saved_without_couplings_still_works() -> None:
    model = Net()
    data = cpx.plan(model, IMAGES, 0.5).to_dict()
    del data["couplings"]
    old = cpx.PruningPlan.from_dict(data)
    old.apply(model)
    with pytest.raises(InvalidArgumentError, match="saved by a version that did not keep"):
        old.explain("outer")


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("edges", [[0, 99, 0]]),
        ("edges", [[0, -1, 0]]),
        ("edges", [[0, 1, 99]]),
        ("edges", [[0, 1]]),
        ("members", [["stem.weight", 0, "out", 7, 8]]),
        ("members", [["stem.weight", 0]]),
        ("units", [8]),
        ("stuck", [["fc.weight", 0, "out", 4, 99]]),
        ("events", 3),
        ("rivals", [1]),
        ("aliases", None),
    ],
)
def test_damaged_couplings_are_refused(part: str, value: Any) -> None:
    data = json.loads(json.dumps(cpx.plan(Net(), IMAGES, 0.5).to_dict()))
    data["couplings"][part] = value
    with pytest.raises(CheckpointError, match="not a pruning plan"):
        cpx.PruningPlan.from_dict(data)


def test_a_whole_model() -> None:
    found = inspect_model(Net(), IMAGES)
    assert [(g.name, g.width_before, g.width_after) for g in found.groups] == [
        ("stem", 8, 8),
        ("inner", 6, 6),
    ]
    assert (found.channels, found.stuck) == (8 + 6 + 8 + 4, 4)
    assert "makes group 'stem': 8 channels\n" in str(found.explain("outer"))
    facts = json.loads(json.dumps(found.to_dict()))
    assert [g["units"] for g in facts["groups"]] == [8, 6]
    assert [f["entry"] for f in facts["frozen"]] == ["fc.weight"]


def test_a_model_that_cannot_be_pruned_is_explained_too() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    found = inspect_model(model, torch.zeros(2, 3))
    assert found.groups == ()
    assert "keeps 4 channels (0.weight dim 0, 0.bias dim 0)" in str(found.explain("0"))
    assert "the model's output" in str(found.explain("0"))

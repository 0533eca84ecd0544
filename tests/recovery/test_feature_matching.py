"""Features are compared channel by channel: the student's with those that the teacher kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import network, randomised, zeroed
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import chanprune_ext as cpx
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.models import resnet20
from chanprune_ext.plan import plans_of
from chanprune_ext.recovery.feature_matching import composed_kept, find_taps
from chanprune_ext.recovery.taps import FeatureTaps, plain_module


def vit() -> nn.Module:
    torch.manual_seed(0)
    return randomised(VisionTransformer(32, 8, 5, 4, 32, 64, num_classes=7))


class OptionB(nn.Module):
    """Two residual stages, the second behind a projection shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = Projected(8, 8, 1)
        self.two = Projected(8, 12, 2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(self.stem(x).relu())).mean((2, 3)))


class Projected(nn.Module):
    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1), nn.BatchNorm2d(b)
        self.short = nn.Conv2d(a, b, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.short(x))


def case(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "vit":
        return vit(), torch.randn(2, 3, 32, 32)
    if name == "option_b":
        return randomised(OptionB()), torch.randn(2, 3, 16, 16)
    return network(name)


@pytest.mark.parametrize("name", ["resnet56", "option_b", "mobilenet_v2", "densenet121"])
def test_every_tap_of_a_pruned_network_equals_its_teachers_channels(name: str) -> None:
    """The oracle: the zeroed teacher's features at the kept channels are the student's features."""
    model, x = case(name)
    model = model.double()
    x = x.double()
    pruned = cpx.prune(model, x, 0.5)
    plan = cpx.plan_of(pruned)
    assert plan is not None
    names = {m for m, _ in model.named_modules() if m.endswith(("bn1", "bn2", "conv2", "norm1"))}
    taps = find_taps(pruned, model, x, sorted(names) or None) + find_taps(pruned, model, x)
    teacher = zeroed(model, plan)
    with FeatureTaps(pruned, [t.name for t in taps]) as s, torch.no_grad():
        pruned(x)
        with FeatureTaps(teacher, [t.name for t in taps]) as t:
            teacher(x)
            ours, theirs = s.take(), t.take()
    shrunk = 0
    for tap in taps:
        expected = tap.matched(theirs[tap.name])
        shrunk += bool(tap.kept)
        torch.testing.assert_close(ours[tap.name], expected, rtol=1e-9, atol=1e-9)
        assert theirs[tap.name].shape[tap.channel_dim] == tap.width
    assert shrunk >= len(taps) // 2
    if name == "densenet121":
        assert [t.name for t in taps[-4:]] == [f"features.denseblock{i}" for i in (1, 2, 3, 4)]


def test_taps_of_a_transformer_follow_its_embedding() -> None:
    model, x = case("vit")
    pruned = cpx.prune(model, x, 0.5)
    taps = find_taps(pruned, model, x)
    assert [t.name for t in taps] == [f"encoder.layers.encoder_layer_{i}" for i in (0, 1, 2, 4)]
    plan = cpx.plan_of(pruned)
    assert plan is not None
    kept = plan.kept["encoder.layers.encoder_layer_2.mlp.3.weight"][0]
    for tap in taps:
        assert tap.channel_dim == 2
        assert list(tap.kept) == [2]
        assert torch.equal(tap.kept[2], kept)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet56", ["layer1.8", "layer2.8", "layer3.8"]),
        ("resnet50", ["layer1.2", "layer2.3", "layer3.5", "layer4.2"]),
        ("mobilenet_v2", [f"features.{i}" for i in (3, 6, 10, 13, 16)]),
        ("option_b", ["one", "two"]),
    ],
)
def test_default_taps_are_the_ends_of_stages(name: str, expected: list[str]) -> None:
    model, x = case(name)
    taps = find_taps(cpx.prune(model, x, 0.5), model, x)
    assert [t.name for t in taps] == expected


def test_a_network_without_joins_is_tapped_at_its_layers() -> None:
    layers: list[nn.Module] = []
    for a, b in ((3, 6), (6, 8), (8, 8)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.Conv2d(b, b, 3, padding=1)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 5))
    x = torch.randn(2, 3, 8, 8)
    taps = find_taps(cpx.prune(model, x, 0.5), model, x)
    # The second convolution of each stage; not the classifier, whose outputs have losses already.
    assert [t.name for t in taps] == ["2", "7", "12"]


def test_globs_choose_taps_in_execution_order() -> None:
    model, x = case("resnet56")
    taps = find_taps(cpx.prune(model, x, 0.5), model, x, ["layer3.?", "layer1.0.bn1"])
    assert [t.name for t in taps] == ["layer1.0.bn1", *(f"layer3.{i}" for i in range(9))]


def test_taps_through_two_prunings() -> None:
    torch.manual_seed(0)
    model, x = resnet20(width=8).eval(), torch.randn(2, 3, 32, 32)
    once = cpx.prune(model, x, 0.25)
    twice = cpx.prune(once, x, 0.5)
    first, second = cpx.plan_of(once), cpx.plan_of(twice)
    assert first is not None
    assert second is not None
    kept = composed_kept([first, second])["layer1.0.conv1.weight"][0]
    assert torch.equal(
        model.layer1[0].conv1.weight[kept][
            :, composed_kept([first, second])["layer1.0.conv1.weight"][1]
        ],
        twice.layer1[0].conv1.weight,
    )
    (tap,) = find_taps(twice, model, x, ["layer1.0.bn1"])
    assert torch.equal(tap.kept[1], kept)
    (tap,) = find_taps(twice, once, x, ["layer1.0.bn1"])
    assert torch.equal(tap.kept[1], second.kept["layer1.0.conv1.weight"][0])
    (tap,) = find_taps(model, model, x, ["layer1.0"])
    assert tap.kept == {}


class Scaled(nn.Module):
    """A number that follows the head width, met inside a module of its own."""

    def forward(self, q: Tensor) -> Tensor:
        return q / (q.shape[-1] ** 0.5)


class Attention(nn.Module):
    """Attention with modules in front of its scale and behind it.

    Queries and keys come from one layer, of which only the queries are multiplied.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 12)
        self.qk, self.v = nn.Linear(12, 32), nn.Linear(12, 16)
        self.split, self.scaled = nn.Unflatten(-1, (2, 2, -1)), Scaled()
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        q, k = self.split(self.qk(x)).transpose(1, 3).unbind(2)
        v = self.v(x).unflatten(-1, (2, -1)).transpose(1, 2)
        y = (self.scaled(q) @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


def _composed(pruned: nn.Module) -> Any:
    """What all plans together have removed, for the oracle."""
    gone: dict[str, dict[int, Tensor]] = {}
    shapes = plans_of(pruned)[0].fingerprint["tensors"]
    for entry, dims in composed_kept(plans_of(pruned)).items():
        for dim, kept in dims.items():
            mask = torch.ones(shapes[entry][dim], dtype=torch.bool)
            mask[kept] = False
            gone.setdefault(entry, {})[dim] = mask.nonzero().flatten()
    return SimpleNamespace(pruned=gone)


@pytest.mark.parametrize("cuts", [(0.5,), (0.25, 0.4)])
def test_features_that_the_plan_has_multiplied_are_multiplied_in_the_teacher(
    cuts: tuple[float, ...],
) -> None:
    """Head dims went, and a weight in front of the constant that follows them makes up for it."""
    torch.manual_seed(0)
    model = randomised(Attention()).double()
    x = torch.randn(4, 7, 6, dtype=torch.float64)
    pruned: nn.Module = model
    for cut in cuts:
        pruned = cpx.prune(pruned, x[:2], cut, kinds=("head_dim",))
        plan = cpx.plan_of(pruned)
        assert plan is not None
        assert plan.rescalings
    teacher = zeroed(model, _composed(pruned))
    names = ["stem", "qk", "split", "scaled", "v", "out"]
    taps = {tap.name: tap for tap in find_taps(pruned, model, x[:2], names)}
    with FeatureTaps(pruned, names) as s, FeatureTaps(teacher, names) as t, torch.no_grad():
        pruned(x)
        teacher(x)
        ours, theirs = s.take(), t.take()
    for name, tap in taps.items():
        torch.testing.assert_close(ours[name], tap.matched(theirs[name]), rtol=1e-9, atol=1e-9)
        multiplied = not torch.equal(tap.rescaled(theirs[name]), theirs[name])
        assert multiplied == (name in ("qk", "split")), name


def test_networks_of_different_plans_are_refused() -> None:
    torch.manual_seed(0)
    model, x = resnet20(width=8).eval(), torch.randn(2, 3, 32, 32)
    with pytest.raises(InvalidArgumentError, match="pruned by another plan than the student"):
        find_taps(cpx.prune(model, x, 0.5), cpx.prune(model, x, 0.25), x)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["layer9.*"], r"'layer9.\*' matches no module of the teacher; there are conv1"),
        (["layer1.0.shortcut"], "matches no module whose output can be followed"),
    ],
)
def test_taps_that_are_not_there(names: list[str], message: str) -> None:
    model, x = case("resnet56")
    with pytest.raises(InvalidArgumentError, match=message):
        find_taps(model, model, x, names)


def test_hooks_go_whatever_happens() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())

    def hooks() -> int:
        return sum(len(m._forward_hooks) for m in model.modules())

    def interrupted() -> None:
        with taps:
            model(torch.zeros(1, 2))
            assert hooks() == 2
            raise KeyboardInterrupt

    taps = FeatureTaps(model, ["0", "1"])
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert hooks() == 0
    assert not taps._outputs
    with pytest.raises(InvalidArgumentError, match="no module '7'"):
        FeatureTaps(model, ["0", "7"])
    with FeatureTaps(model, ["0"]) as waiting:
        with pytest.raises(InvalidArgumentError, match="'0' has not returned"):
            waiting.take()
        y = model(torch.zeros(1, 2))
        assert waiting.take()["0"].shape == y.shape
        assert not waiting._outputs


def test_taps_see_through_wrappers() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    assert plain_module(nn.DataParallel(model)) is model
    compiled = torch.compile(model, backend="eager")
    assert plain_module(compiled) is model
    with FeatureTaps(compiled, ["0"]) as taps:
        for _ in range(2):
            x = torch.randn(4, 2)
            compiled(x)
            torch.testing.assert_close(taps.take()["0"], model[0](x))
    model.requires_grad_(True)
    with FeatureTaps(compiled, ["0"]) as taps:
        compiled(torch.randn(4, 2))
        taps.take()["0"].sum().backward()
    assert model[0].weight.grad is not None

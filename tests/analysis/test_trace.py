"""The traced forward: what it costs, where it runs, and that it leaves no mark."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import NETWORKS, network, randomised, relative_error, run, zeroed
from torch import Tensor, nn
from toys import TOYS

import chanprune_ext as cpx
from chanprune_ext.analysis import analyse
from chanprune_ext.analysis.replay import replay
from chanprune_ext.analysis.stand_ins import call_substituted
from chanprune_ext.analysis.trace import trace_model
from chanprune_ext.errors import AnalysisError, VerificationError

IMAGES = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.b = nn.Conv2d(8, 6, 1, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.up(self.b(self.a(x))).mean((2, 3)))


def test_multiply_accumulates() -> None:
    """Convolutions and matrix products, written out by hand."""
    analysis = analyse(Net(), IMAGES)
    sizes = analysis.sizes(analysis.removed_labels({}))
    a = 2 * 36 * 9 * 3 * 8
    b = 2 * 36 * 6 * (8 // 2)
    up = 2 * 36 * 4 * 6 * 4
    assert sizes.macs() == a + b + up + 2 * 4 * 5


@pytest.mark.parametrize(
    ("name", "macs", "params"),
    # Published figures at 224 px, 1000 classes: torchvision's weight metadata (GFLOPS, M).
    [
        ("resnet18", 1.814e9, 11_689_512),
        ("resnet50", 4.089e9, 25_557_032),
        ("mobilenet_v2", 0.301e9, 3_504_872),
        ("densenet121", 2.834e9, 7_978_856),
        ("efficientnet_b0", 0.386e9, 5_288_548),
        ("shufflenet_v2_x1_0", 0.145e9, 2_278_604),
    ],
)
def test_published_costs(name: str, macs: float, params: int) -> None:
    import torchvision

    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    analysis = analyse(model, torch.empty(1, 3, 224, 224, device="meta"))
    sizes = analysis.sizes(analysis.removed_labels({}))
    assert sizes.macs() == pytest.approx(macs, rel=0.005)
    assert sizes.params([n for n, _ in model.named_parameters()]) == params


def test_roles_and_order() -> None:
    trace = trace_model(Net(), IMAGES)
    assert trace.order == ["a.weight", "b.weight", "up.weight", "fc.weight"]
    assert trace.roles["a.weight", 0] == "out"
    assert trace.roles["a.weight", 1] == "in"
    assert trace.roles["up.weight", 0] == "in"
    assert trace.roles["up.weight", 1] == "out"
    assert trace.substrate == "meta"
    assert not trace.unknown


def test_a_kernel_computed_from_a_weight_keeps_its_roles() -> None:
    for toy, entry in (
        ("WeightStandardisation", "a.weight"),
        ("ScaledWeight", "weight"),
        ("WeightNormParametrised", "a.parametrizations.weight.original1"),
    ):
        torch.manual_seed(0)
        trace = trace_model(TOYS[toy].make(), IMAGES)
        assert trace.roles[entry, 0] == "out", toy
        assert trace.roles[entry, 1] == "in", toy


class ShapeFromValues(Net):
    """Keeps the images whose mean is positive: a shape that depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[x.mean((1, 2, 3)) > -1e9])


class MixesDevices(Net):
    """A tensor in a list, which stays on the CPU, where no meta run can use it."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = [torch.rand(1, 3, 1, 1)]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scales[0])


@pytest.mark.parametrize(
    ("make", "substrate"), [(ShapeFromValues, "real"), (MixesDevices, "fake"), (Net, "meta")]
)
def test_the_cheapest_substrate_that_works(make: Any, substrate: str) -> None:
    torch.manual_seed(0)
    model = randomised(make())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    analysis = analyse(model, IMAGES)
    assert analysis.trace.substrate == substrate
    assert analysis.groups[0].name == "a"
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_running_statistics_stay_on_real_tensors() -> None:
    """The second, training-mode forward of a model with unused parts moves no buffer."""

    class Both(ShapeFromValues):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.aux = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Any:
            y = super().forward(self.norm(x))
            return (y, self.aux(x.mean((2, 3)))) if self.training else y

    model = Both()
    analyse(model, IMAGES)
    assert model.norm.num_batches_tracked == 0
    assert (model.norm.running_mean == 0).all()


def test_parts_that_only_run_in_training() -> None:
    torch.manual_seed(0)
    model = randomised(TOYS["AuxiliaryHead"].make())
    analysis = analyse(model, IMAGES)
    (group,) = [g for g in analysis.groups if g.name == "a.0"]
    assert "aux.fc" in group.consumers
    assert {f.entry for f in analysis.frozen} == {"head.fc.weight", "aux.fc.weight"}
    assert not model.training


def test_unused_parts_that_cannot_train_are_an_error() -> None:
    class Broken(Net):
        def __init__(self) -> None:
            super().__init__()
            self.aux = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise RuntimeError("needs labels")
            return super().forward(x)

    with pytest.raises(AnalysisError, match=r"'aux.weight'.*needs labels"):
        analyse(Broken(), IMAGES)


class Remembers(nn.Module):
    """A forward that writes on itself in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.register_buffer("mean", torch.zeros(4))
        self.count = 0
        self.width = 0
        self.cache: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.cache = self.a(x)
        self.count += 1
        self.width = self.cache.shape[1]
        self.added = self.cache.sum()
        self.mean = self.cache.mean((0, 2, 3))
        return self.cache


def test_the_forward_leaves_nothing_on_the_modules() -> None:
    model = Remembers()
    before = {k: v for k, v in model.__dict__.items() if not isinstance(v, dict)}
    buffer = model.mean
    analyse(model, IMAGES)
    assert {k: v for k, v in model.__dict__.items() if not isinstance(v, dict)} == before
    assert model.mean is buffer


class Caches(nn.Module):
    """A forward that fills containers of its modules, and leaves hooks and what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.by_device: dict[str, Tensor] = {}
        self.ordered: OrderedDict[int, Tensor] = OrderedDict()
        self.steps: list[Tensor] = []
        self.seen: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.b.register_forward_pre_hook(lambda module, inputs: inputs[0] * 1)
        self.b.last = x
        y = self.a(x)
        if str(x.device) not in self.by_device:
            self.by_device[str(x.device)] = y.mean((0, 2, 3))
        self.ordered[len(self.ordered)] = y
        self.steps.append(y)
        self.seen.add(y.shape[1])
        return self.b(y + self.by_device[str(x.device)][:, None, None])


@pytest.mark.parametrize("substrate", ["meta", "real"])
def test_what_a_forward_puts_into_containers_is_forgotten(substrate: str) -> None:
    torch.manual_seed(0)
    model = Caches()
    model.steps.append(torch.ones(1))
    kept = [model.by_device, model.ordered, model.steps, model.seen]
    stand_ins = {
        n: p.detach().to("meta" if substrate == "meta" else "cpu")
        for n, p in model.named_parameters()
    }
    call_substituted(model, stand_ins, IMAGES.to("meta" if substrate == "meta" else "cpu"))
    analyse(model, IMAGES)
    pruned = cpx.prune(model, IMAGES, 0.5)
    for net in (model, pruned):
        assert net.by_device == {}
        assert net.ordered == {}
        assert len(net.steps) == 1
        assert net.seen == set()
        assert not net.b._forward_pre_hooks
        assert not hasattr(net.b, "last")
    now = [model.by_device, model.ordered, model.steps, model.seen]
    assert all(a is b for a, b in zip(now, kept, strict=True))
    assert pruned(IMAGES).shape == model(IMAGES).shape


def test_a_cache_filled_before_planning_does_not_come_along() -> None:
    """The bias of four heads that an earlier run has stored does not fit two."""
    torch.manual_seed(0)
    model = randomised(TOYS["CachedBias"].make())
    with torch.no_grad():
        model(IMAGES)
        pruned = cpx.prune(model, IMAGES, 0.5, kinds=("heads",))
        assert pruned.heads == 2
        assert pruned(IMAGES).shape == model(IMAGES).shape


def test_one_channel_read_only_for_its_shape_keeps_nothing() -> None:
    """A value that is cut out and never computed with restricts no channel, in neither mode."""
    torch.manual_seed(0)
    for toy, kept in (("AsksOneChannel", 0), ("ChannelUsedInTraining", 16)):
        analysis = analyse(TOYS[toy].make().eval(), IMAGES)
        told = [f for f in analysis.frozen if f.entry == "a.0.weight"]
        assert sum(f.channels for f in told) == kept


class Detector(nn.Module):
    """Keeps the boxes whose score is high: how many depends on values, and so on the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.score, self.box = nn.Conv2d(12, 1, 1), nn.Conv2d(12, 4, 1)
        self.head, self.out = nn.Linear(12, 20), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.b(self.a(x).relu()).relu()
        chosen = self.score(y).sigmoid().flatten() > 0.5
        features = y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])[chosen]
        boxes = self.box(y).permute(0, 2, 3, 1).reshape(-1, 4)[chosen]
        classes = self.out(self.head(features).relu())
        if len(classes) > 40:
            classes = classes.sigmoid()
        return boxes, classes


@pytest.mark.parametrize("seed", range(4))
def test_shapes_that_depend_on_values(seed: int) -> None:
    """The number of boxes may differ from the traced one, the channels may not."""
    torch.manual_seed(seed)
    model = randomised(Detector(), seed)
    plan = cpx.plan(model, IMAGES, 0.5)
    assert plan.options["substrate"] == "real"
    pruned = plan.apply(model)
    assert [pruned.a.out_channels, pruned.b.out_channels, pruned.head.out_features] == [8, 6, 10]
    error = relative_error(run(pruned, IMAGES), run(zeroed(model, plan), IMAGES))
    assert error < 1e-9


class Pooled(Detector):
    """Fills a tensor that is made to the number of boxes, as pooling of regions does."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        boxes, classes = super().forward(x)
        result = torch.zeros((len(classes), classes.shape[1]), dtype=x.dtype)
        result[:] = classes
        return boxes, result


def test_a_tensor_made_to_the_number_of_boxes() -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    model = randomised(Pooled(), 3)
    plan = cpx.plan(model, images, 0.5)
    assert "takes another path" not in str(plan)
    assert "was predicted" not in str(plan)
    error = relative_error(run(plan.apply(model), images), run(zeroed(model, plan), images))
    assert error < 1e-9


def test_a_wrong_width_is_found_though_shapes_depend_on_values() -> None:
    """What follows values in one dimension does not hide a channel count that was not predicted."""
    model = randomised(Detector())
    analysis = analyse(model, IMAGES)
    index = next(g.index for g in analysis.groups if g.name == "b")
    gone = np.zeros(analysis.groups[index].units, dtype=bool)
    gone[:6] = True
    labels = analysis.removed_labels({index: gone})
    masks = analysis.kept_masks(labels)
    replay(analysis, model, IMAGES, masks, {}, analysis.sizes(labels))
    with pytest.raises(VerificationError):
        replay(analysis, model, IMAGES, masks, {}, analysis.sizes(analysis.removed_labels({})))
    wrong = {k: v for k, v in masks.items() if k != "head.weight"}
    with pytest.raises(VerificationError, match="does not run"):
        replay(analysis, model, IMAGES, wrong, {}, analysis.sizes(labels))


def test_an_error_leaves_the_model_whole() -> None:
    model = Net().train()
    with pytest.raises(AnalysisError):
        analyse(model, torch.randn(2, 4, 8, 8))
    assert model.training
    assert all(not p.is_meta for p in model.parameters())
    assert type(model.b.groups) is int
    assert not torch.nn.modules.module._global_forward_hooks


@pytest.mark.parametrize("toy", ["SharedModuleUnderTwoPaths", "TiedParameter", "SharedModule"])
def test_shared_tensors_are_replaced_everywhere_and_put_back(toy: str) -> None:
    """torch.func.functional_call would leave the stand-ins behind in the first of these."""
    torch.manual_seed(0)
    model = TOYS[toy].make().eval()
    before = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    with torch.no_grad():
        assert (call_substituted(model, zeros, IMAGES) == 0).all()
        assert (model(IMAGES) != 0).any()
    assert {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)} == before


def test_lists_of_weights_are_replaced() -> None:
    lstm = nn.LSTM(3, 4)
    zeros = {n: torch.zeros_like(p) for n, p in lstm.named_parameters()}
    with torch.no_grad():
        output, _ = call_substituted(lstm, zeros, torch.randn(2, 1, 3))
    assert (output == 0).all()
    assert lstm._flat_weights[0] is lstm.weight_ih_l0


@pytest.mark.parametrize("name", list(NETWORKS))
def test_no_operation_of_a_real_network_is_unknown(name: str) -> None:
    model, inputs = network(name)
    assert analyse(model, inputs).trace.unknown == []


def test_zeros_are_followed() -> None:
    """Which tensors of a forward are zero where their producer is."""
    seen: dict[str, bool] = {}

    class Follow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.norm, self.plain = nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)
            self.scale = nn.Parameter(torch.rand(4, 1, 1))
            self.table = nn.Parameter(torch.rand(5, 8))
            self.register_buffer("mean", torch.rand(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            changed = a.clone()
            view = changed[:, :, :2]
            view.add_(1)
            for name, tensor in {
                "convolution": a,
                "batch norm": self.norm(a),
                "batch norm without weights": self.plain(a),
                "sum": a + b,
                "sum with a sigmoid": a + b.sigmoid(),
                "product with a sigmoid": a * b.sigmoid(),
                "sum with a number": a + 1,
                "quotient": a / 2,
                "quotient by what is not zero": a / (b.exp() + 1),
                "exponential": a.exp(),
                "clamped around zero": a.clamp(-1, 1),
                "clamped above zero": a.clamp(0.1),
                "scaled by a parameter": self.plain(a) * self.scale,
                "shifted by a buffer": a - self.mean,
                "maximum pool": F.max_pool2d(a, 2),
                "concatenated with a sigmoid": torch.cat([a, b.sigmoid()], 1),
                "padded": F.pad(a, (1, 1)),
                "padded with ones": F.pad(a, (1, 1), value=1.0),
                "changed through a view": changed,
                "linear over positions": F.linear(a, self.table),
                "softmax over positions": a.softmax(3),
            }.items():
                # A sum over channels is told as a statistic unless they are zero.
                seen[name] = tracers[-1].zeros(tensor)[1]
            return a

    tracers: list[Any] = []
    from chanprune_ext.analysis import trace as module

    original = module.Tracer
    try:
        module.Tracer = lambda *a, **k: tracers.append(original(*a, **k)) or tracers[-1]  # type: ignore[misc,assignment]
        trace_model(Follow(), IMAGES)
    finally:
        module.Tracer = original  # type: ignore[misc]
    assert {name for name, zero in seen.items() if zero} == {
        *("convolution", "batch norm", "sum", "product with a sigmoid", "quotient"),
        *("quotient by what is not zero", "clamped around zero", "scaled by a parameter"),
        *("maximum pool", "padded", "linear over positions"),
    }


def test_labels_are_seeded_per_parameter_dimension() -> None:
    trace = trace_model(Net(), IMAGES)
    for name, dims in trace.parameters.items():
        assert tuple(s.shape[1] for s in dims) == trace.shapes[name]
        assert all(s.dtype == np.int64 for s in dims)
    assert "a.weight" in trace.parameters


def test_torch_logs_nothing_of_a_forward_that_raised(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("torch._subclasses.fake_tensor")
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    before = log.level
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(AnalysisError):
        cpx.plan(model, torch.zeros(1, 3, 9, 9))
    assert not caplog.records
    assert log.level == before
    log.error("still heard")
    assert [record.message for record in caplog.records] == ["still heard"]


class Several(nn.Module):
    """Returns hidden features beside its result, in tuples, lists and dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        a = self.a(x)
        b = self.b(a)
        return {"logits": self.c(b), "seen": ({"first": a}, [None, b])}


def test_outputs_are_told_by_their_names() -> None:
    told = {f.entry: f.source for f in analyse(Several(), torch.randn(2, 3)).frozen}
    assert told == {
        "a.weight": "seen[0].first",
        "b.weight": "seen[1][1]",
        "c.weight": "logits",
    }
    wanted = analyse(Several(), torch.randn(2, 3), lambda out: out["seen"]).frozen
    assert {f.entry: f.source for f in wanted} == {"a.weight": "[0].first", "b.weight": "[1][1]"}
    alone = analyse(Several(), torch.randn(2, 3), lambda out: out["logits"]).frozen
    assert {f.entry: f.source for f in alone} == {"c.weight": "model output"}

"""Plans: what they tell, how they are saved, and every way of asking for the impossible."""

from __future__ import annotations

import copy
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from models import randomised, relative_error, run
from torch import Tensor, nn
from toys import TOYS

import chanprune_ext as cpx
from chanprune_ext.errors import (
    AnalysisError,
    ChanpruneError,
    CheckpointError,
    InvalidArgumentError,
    NothingToPruneError,
    OutputError,
    PlanMismatchError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.b = nn.Conv2d(width, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(F.relu(self.bn(self.a(x))))).mean((2, 3)))


IMAGES = torch.randn(2, 3, 8, 8)


def net(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return randomised(Net(width))


# -- what a plan tells ---------------------------------------------------------------------------


def test_kept_and_pruned_complete_each_other() -> None:
    model = net()
    plan = cpx.plan(model, IMAGES, 0.5)
    shapes = {n: t.shape for n, t in model.state_dict().items()}
    assert plan.kept.keys() == plan.pruned.keys()
    for entry, dims in plan.kept.items():
        for dim, kept in dims.items():
            assert kept.dtype == torch.int64
            both = torch.cat([kept, plan.pruned[entry][dim]])
            assert torch.equal(both.sort().values, torch.arange(shapes[entry][dim]))
            assert torch.equal(kept, kept.sort().values)
    assert plan.kept["a.weight"][0].tolist() == plan.kept["bn.running_var"][0].tolist()
    assert plan.kept["a.weight"][0].tolist() == plan.kept["b.weight"][1].tolist()
    assert set(plan.kept) == {
        *("a.weight", "a.bias", "b.weight", "b.bias", "fc.weight"),
        *("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"),
    }


def test_groups_params_and_macs() -> None:
    model = net()
    plan = cpx.plan(model, IMAGES, 0.5)
    first, second = plan.groups
    assert (first.name, first.producers, first.consumers) == ("a", ("a",), ("b",))
    assert (first.width_before, first.width_after) == (8, 4)
    assert (second.name, second.consumers) == ("b", ("fc",))
    assert (second.width_before, second.width_after) == (6, 3)
    assert plan.params_before == sum(p.numel() for p in model.parameters())
    assert plan.params_after == sum(p.numel() for p in plan.apply(model).parameters())
    assert plan.macs_before == 2 * (64 * 9 * (3 * 8 + 8 * 6) + 6 * 4)
    assert plan.macs_after == 2 * (64 * 9 * (3 * 4 + 4 * 3) + 3 * 4)
    assert [(f.entry, f.channels, f.why) for f in plan.frozen] == [
        ("fc.weight", 4, "the model's output")
    ]


def test_table() -> None:
    text = str(cpx.plan(net(), IMAGES, 0.5))
    assert re.search(r"^a\s+hidden\s+8\s+4$", text, re.MULTILINE)
    assert "params: 706 -> 247 (x0.350)" in text
    assert "4 channels of 'fc.weight' are kept: the model's output" in text


def test_a_plan_does_not_touch_the_model_or_the_inputs() -> None:
    class Greedy(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(0.5))

    torch.manual_seed(0)
    model, images = randomised(Greedy()).train(), IMAGES.clone()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    plan = cpx.plan(model, images, 0.5)
    plan.apply(model, verify="numeric")
    assert torch.equal(images, IMAGES)
    assert model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_plans_are_the_same_every_time() -> None:
    first, second = (cpx.plan(net(), IMAGES, 0.5, criterion="random", seed=3) for _ in range(2))
    assert first.to_dict() == second.to_dict()
    other = cpx.plan(net(), IMAGES, 0.5, criterion="random", seed=4)
    assert other.to_dict()["kept"] != first.to_dict()["kept"]


# -- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", ["Residual", "SplitByAttribute", "UnflattenLayer", "TwoInputs"])
def test_a_saved_plan_does_the_same(toy: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = randomised(TOYS[toy].make()), TOYS[toy].inputs()
    plan = cpx.plan(model, inputs, 0.5, round_to=2)
    plan.save(tmp_path / "plan.json")
    again = cpx.PruningPlan.load(tmp_path / "plan.json")
    assert again.to_dict() == plan.to_dict()
    assert str(again) == str(plan)
    assert relative_error(run(again.apply(model), inputs), run(plan.apply(model), inputs)) == 0
    again.apply(model, verify="numeric", example_inputs=inputs)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_saved_plan_needs_inputs_for_numeric_verification(tmp_path: Path) -> None:
    model = net()
    cpx.plan(model, IMAGES, 0.5).save(tmp_path / "plan.json")
    plan = cpx.PruningPlan.load(tmp_path / "plan.json")
    with pytest.raises(InvalidArgumentError, match="needs example_inputs"):
        plan.apply(model, verify="numeric")


def test_unwritable_file(tmp_path: Path) -> None:
    plan = cpx.plan(net(), IMAGES, 0.5)
    with pytest.raises(OutputError, match=r"missing/plan\.json: can't be written"):
        plan.save(tmp_path / "missing" / "plan.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError):
        plan.save(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: '"plan"',
        lambda text: "{}",
        lambda text: text.replace('"format": 1', '"format": 99'),
        lambda text: text.replace('"kept"', '"keep"'),
        lambda text: text.replace('"attributes": []', '"attributes": [7]'),
        lambda text: text.replace('"0": [', '"zero": ['),
        lambda text: text.replace('"producers"', '"makers"'),
        lambda text: text.replace('"params": [', '"params": ["many", '),
        lambda text: text.replace('"fingerprint": {', '"fingerprint": 3, "rest": {'),
        lambda text: "\udcff\x00",
    ],
    ids=[
        *("truncated", "empty", "list", "string", "nothing", "format", "renamed", "attributes"),
        *("dim", "groups", "numbers", "fingerprint", "binary"),
    ],
)
def test_damaged_file(damage: Callable[[str], str], tmp_path: Path) -> None:
    cpx.plan(net(), IMAGES, 0.5).save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert damage(text) != text
    (tmp_path / "plan.json").write_text(damage(text), errors="surrogateescape")
    with pytest.raises(CheckpointError):
        cpx.PruningPlan.load(tmp_path / "plan.json")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.json"):
        cpx.PruningPlan.load(tmp_path / "nowhere.json")


def _edited(plan: cpx.PruningPlan, edit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    data = json.loads(json.dumps(plan.to_dict()))
    edit(data)
    return data


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d["kept"]["a.weight"].update({"0": [0, 1, 99]}),
        lambda d: d["kept"]["a.weight"].update({"0": [-1, 1, 2]}),
        lambda d: d["kept"]["a.weight"].update({"0": [2, 1, 0]}),
        lambda d: d["kept"]["a.weight"].update({"0": [1, 1, 2]}),
        lambda d: d["kept"]["a.weight"].update({"0": []}),
        lambda d: d["kept"]["a.weight"].update({"9": [0, 1]}),
        lambda d: d["kept"].update({"nobody.weight": {"0": [0]}}),
    ],
    ids=["beyond", "negative", "unsorted", "twice", "none", "dim", "entry"],
)
def test_indices_that_make_no_sense(edit: Callable[[dict[str, Any]], None]) -> None:
    """A plan changed by hand is refused when it is read, before any kernel sees its indices."""
    plan = cpx.plan(net(), IMAGES, 0.5)
    with pytest.raises(CheckpointError):
        cpx.PruningPlan.from_dict(_edited(plan, edit))


# -- plans for other models ----------------------------------------------------------------------


def test_another_width() -> None:
    plan = cpx.plan(net(), IMAGES, 0.5)
    with pytest.raises(
        PlanMismatchError, match=r"'a.weight' is \[10, 3, 3, 3\], the plan expects \[8, 3, 3, 3\]"
    ):
        plan.apply(net(10))


def test_another_class() -> None:
    plan = cpx.plan(net(), IMAGES, 0.5)

    class Other(Net):
        pass

    with pytest.raises(PlanMismatchError, match="class is Other, the plan's is Net"):
        plan.apply(Other())


def test_a_plan_fits_a_copy_whose_class_torch_has_named_anew() -> None:
    model = nn.Sequential(torch.fx.symbolic_trace(net())).eval()
    plan = cpx.plan(model, IMAGES, 0.5)
    fellow = copy.deepcopy(model)
    assert type(fellow[0]).__name__ != type(model[0]).__name__
    plan.apply(fellow, inplace=True)
    assert fellow[0].a.out_channels == 4


def test_other_parts() -> None:
    plan = cpx.plan(net(), IMAGES, 0.5)
    model = net()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(PlanMismatchError, match=r"'extra.weight' that the plan does not know"):
        plan.apply(model)
    model = net()
    model.fc = nn.Identity()
    with pytest.raises(PlanMismatchError, match=r"no parameter 'fc.weight'"):
        plan.apply(model)
    model = net()
    model.bn = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    with pytest.raises(PlanMismatchError, match="'bn' is InstanceNorm2d"):
        plan.apply(model)


def test_other_attributes() -> None:
    torch.manual_seed(0)
    model = randomised(TOYS["SplitByAttribute"].make())
    plan = cpx.plan(model, TOYS["SplitByAttribute"].inputs(), 0.5)
    model.sizes = [8, 8]
    with pytest.raises(PlanMismatchError, match=r"sizes\[0\] is 8, the plan expects 4"):
        plan.apply(model)


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("entry", ["a.weight", "bn.running_mean", "fc.bias"])
def test_weights_that_are_not_finite(entry: str, value: float) -> None:
    model = net()
    with torch.no_grad():
        model.state_dict()[entry].view(-1)[1] = value
    with pytest.raises(InvalidArgumentError, match=f"'{entry}' contains NaN or Inf"):
        cpx.plan(model, IMAGES)


@pytest.mark.parametrize("ratio", [1.0, -0.1, 1.5, float("nan"), float("inf"), "half", [0.5]])
def test_ratio_out_of_range(ratio: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"ratio must be in \[0, 1\)"):
        cpx.plan(net(), IMAGES, ratio)
    with pytest.raises(InvalidArgumentError, match=r"ratios\['a'\] must be in \[0, 1\)"):
        cpx.plan(net(), IMAGES, ratios={"a": ratio})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": {"layer9.*": 0.5}}, r"ratios\['layer9.\*'\] names no group.*there are a, b"),
        ({"ratios": {"fc": 0.5}}, r"ratios\['fc'\] names no group.*the model's output"),
        ({"ignore": ["conv7"]}, r"ignore 'conv7' names no module.*there are a, b"),
        ({"criterion": "l3"}, "criterion must be one of l1, l2"),
        ({"scope": "world"}, "scope must be one of local, isomorphic, global"),
        ({"round_to": 0}, "round_to must be an int >= 1"),
        ({"round_to": 2.5}, "round_to must be an int >= 1"),
        ({"max_ratio": 1.0}, "max_ratio must be"),
        ({"threshold": 1.0, "budget": cpx.Budget(macs=0.5)}, "either threshold or budget"),
        ({"threshold": float("nan")}, "threshold must be"),
        ({"threshold": "high"}, "threshold must be"),
        ({"budget": 0.5}, "budget must be"),
        ({"budget": cpx.Budget(params=0.001)}, "budget cannot be met"),
        ({"ratios": {3: 0.5}}, "ratios"),
        ({"ratios": [0.5]}, "ratios"),
        ({"ignore": [3]}, "ignore"),
        ({"ignore": 3}, "ignore must be a str or several of them, got 3"),
        ({"kinds": 3}, "kinds must be a str or several of them, got 3"),
        ({"criterion": None}, "criterion must be the name of a criterion.*got None"),
        ({"outputs": "logits"}, "outputs must be a function.*got 'logits'"),
        ({"outputs": lambda out: out.logits}, "outputs raised AttributeError.*a Tensor: "),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        cpx.plan(net(), IMAGES, **options)


def test_nothing_to_ignore() -> None:
    assert cpx.plan(net(), IMAGES, ignore=None).options["ignore"] == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "needs one of macs, params"),
        ({"macs": 0}, r"macs must be in \(0, 1\]"),
        ({"params": 1.5}, r"params must be in \(0, 1\]"),
        ({"macs": float("nan")}, r"macs must be in \(0, 1\]"),
        ({"macs": "half"}, r"macs must be in \(0, 1\]"),
    ],
)
def test_budgets_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        cpx.Budget(**values)


@pytest.mark.parametrize(
    ("inputs", "kind", "message"),
    [
        (
            torch.randn(2, 5, 8, 8),
            AnalysisError,
            r"raised RuntimeError in 'a'.*expected input.*3 channels",
        ),
        (torch.randn(2, 8), AnalysisError, r"in 'a' \(conv2d\)"),
        ((IMAGES, IMAGES), AnalysisError, r"takes 2 positional arguments but 3 were given"),
        ({"y": IMAGES}, AnalysisError, r"unexpected keyword argument 'y'"),
        (None, InvalidArgumentError, "must hold at least one tensor.*NoneType"),
        ((), InvalidArgumentError, "must hold at least one tensor"),
        (torch.randint(0, 9, (2, 3, 8, 8)), AnalysisError, r"raised RuntimeError in 'a'"),
    ],
    ids=["channels", "rank", "many", "keyword", "none", "empty", "integers"],
)
def test_inputs_the_model_does_not_take(inputs: Any, kind: type[Exception], message: str) -> None:
    model = net()
    with pytest.raises(ChanpruneError, match=message) as caught:
        cpx.plan(model, inputs)
    assert isinstance(caught.value, kind)
    assert relative_error(run(model, IMAGES), run(net(), IMAGES)) == 0


def test_models_that_cannot_be_followed() -> None:
    with pytest.raises(InvalidArgumentError, match=r"must be a torch.nn.Module, got function"):
        cpx.plan(lambda x: x, IMAGES)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="prune the plain model"):
        cpx.plan(nn.Sequential(torch.compile(net())), IMAGES)
    with pytest.raises(InvalidArgumentError, match="prune the eager model"):
        cpx.plan(torch.jit.trace(net(), IMAGES), IMAGES)
    scripted = torch.jit.script(nn.Conv2d(3, 3, 1))
    traced = torch.jit.trace(nn.ReLU(), IMAGES)
    frozen = torch.jit.freeze(torch.jit.script(nn.Conv2d(3, 3, 1).eval()))
    for part in (scripted, traced, frozen):
        with pytest.raises(InvalidArgumentError, match=r"'0' is a scripted.*put the eager module"):
            cpx.plan(nn.Sequential(part, net()), IMAGES)
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(
        InvalidArgumentError, match=r"lazy parameter '0.weight'.*run the model once"
    ):
        cpx.plan(lazy, IMAGES)
    with pytest.raises(InvalidArgumentError, match="no values to score"):
        cpx.plan(net().to("meta"), IMAGES.to("meta"))


def test_inputs_without_values_show_shapes_only() -> None:
    plan = cpx.plan(net(), IMAGES.to("meta"), 0.5)
    assert plan.to_dict()["kept"] == cpx.plan(net(), IMAGES, 0.5).to_dict()["kept"]
    with pytest.raises(InvalidArgumentError, match="inputs with values"):
        plan.apply(net(), verify="numeric")


def test_a_model_without_values_can_be_planned_at_random() -> None:
    plan = cpx.plan(net().to("meta"), IMAGES.to("meta"), criterion="random")
    assert plan.params_after < plan.params_before
    assert plan.apply(net()).a.out_channels == 4


def test_a_forward_that_raises_is_told_with_its_module() -> None:
    class Bad(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.bn(self.a(x))
            raise RuntimeError("not today")

    with pytest.raises(AnalysisError, match="not today"):
        cpx.plan(Bad(), IMAGES)


class OnlyHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class OnlyUnknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x.mean((2, 3)))
        return self.fc(torch.linalg.matrix_exp(x.unsqueeze(2) * x.unsqueeze(1)).sum(2))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (OnlyHead, {}, r"no channels that may be removed: 4 channels of 'fc.weight'"),
        (nn.ReLU, {}, "no channels that may be removed"),
        (OnlyUnknown, {}, "no rule for aten::linalg_matrix_exp"),
        (Net, {"ratio": 0.0}, "none has a ratio above 0"),
        (Net, {"ignore": ["a", "b"]}, "ignored"),
        (Net, {"ratio": 0.01}, "nothing would be removed"),
        (Net, {"round_to": 64}, "nothing would be removed"),
        (Net, {"threshold": -1.0}, "nothing would be removed"),
    ],
)
def test_nothing_to_prune(model: Callable[[], nn.Module], options: Any, message: str) -> None:
    with pytest.raises(NothingToPruneError, match=message):
        cpx.plan(model(), IMAGES, **options)


def test_prune_is_plan_and_apply() -> None:
    model = net()
    pruned = cpx.prune(model, IMAGES, 0.5, criterion="l2", verify="numeric")
    plan = cpx.plan(model, IMAGES, 0.5, criterion="l2")
    assert cpx.plan_of(pruned).to_dict() == plan.to_dict()  # type: ignore[union-attr]
    assert relative_error(run(pruned, IMAGES), run(plan.apply(model), IMAGES)) == 0
    assert cpx.prune(model, IMAGES).a.out_channels == 4


def test_a_buffer_that_a_forward_fills_does_not_make_it_another_model() -> None:
    class Lazy(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("positions", torch.zeros(1), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            if self.positions.shape[0] != x.shape[-1]:
                self.positions = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype)
            return super().forward(x + self.positions)

    torch.manual_seed(0)
    used = Lazy()
    used(IMAGES)
    plan = cpx.plan(used, IMAGES, 0.5)
    assert plan.apply(Lazy())(IMAGES).shape == used(IMAGES).shape

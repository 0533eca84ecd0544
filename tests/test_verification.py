"""The package's own proof: it accepts what is right and refuses what is not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import randomised, relative_error, run, zeroed
from torch import nn
from toys import TOYS

import chanprune_ext as cpx
from chanprune_ext.errors import InvalidArgumentError, VerificationError
from chanprune_ext.verification import max_relative_error, zeroed_copy

EXACT = ["Residual", "ChunkDense", "DepthwiseMultiplier", "FlattenGrid", "WeightNormParametrised"]


def made(name: str) -> tuple[nn.Module, cpx.PruningPlan, torch.Tensor]:
    torch.manual_seed(0)
    model, inputs = randomised(TOYS[name].make()), TOYS[name].inputs()
    return model, cpx.plan(model, inputs, 0.5), inputs


@pytest.mark.parametrize("name", EXACT)
def test_accepts_what_is_exact(name: str) -> None:
    model, plan, _ = made(name)
    plan.apply(model, verify="numeric")


def test_accepts_half_precision_models() -> None:
    model, _, inputs = made("Residual")
    model.half()
    cpx.prune(model, inputs.half(), 0.5, verify="numeric")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", [*EXACT, "WeightNormHook"])
def test_its_reference_is_that_of_the_tests(name: str) -> None:
    model, plan, inputs = made(name)
    own = run(zeroed_copy(model, plan.pruned), inputs)
    assert relative_error(own, run(zeroed(model, plan), inputs)) < 1e-12


def _with_wrong_index(plan: cpx.PruningPlan, entry: str, dim: int) -> cpx.PruningPlan:
    """The plan with one kept index of one dimension exchanged for a removed one."""
    kept = {e: dict(dims) for e, dims in plan.kept.items()}
    index = kept[entry][dim].clone()
    index[0] = plan.pruned[entry][dim][0]
    kept[entry][dim] = index.sort().values
    return dataclasses.replace(plan, kept=kept)


@pytest.mark.parametrize(
    ("entry", "dim"),
    [("stem.0.weight", 0), ("a.0.weight", 1), ("a.1.running_mean", 0), ("head.fc.weight", 1)],
)
def test_refuses_a_channel_that_does_not_fit_the_others(entry: str, dim: int) -> None:
    """Shapes are right, one index is not: only the numbers tell."""
    model, plan, _ = made("Residual")
    wrong = _with_wrong_index(plan, entry, dim)
    wrong.apply(model, verify="replay")
    with pytest.raises(VerificationError, match="relative error"):
        wrong.apply(model, verify="numeric")
    assert cpx.plan_of(model) is None


def test_refuses_a_plan_that_does_not_run() -> None:
    model, plan, _ = made("Residual")
    kept = {e: dict(dims) for e, dims in plan.kept.items()}
    kept["a.0.weight"][1] = kept["a.0.weight"][1][:-1]
    broken = dataclasses.replace(plan, kept=kept)
    with pytest.raises(VerificationError, match="does not run"):
        broken.apply(model)
    assert broken.apply(model, verify=None) is not model


def test_layers_that_normalise_have_no_zeroed_original() -> None:
    model, plan, _ = made("LayerNormOverChannels")
    with pytest.raises(InvalidArgumentError, match=r"normalises over the channels of a;.*ignore"):
        plan.apply(model, verify="numeric")
    inputs = TOYS["LayerNormOverChannels"].inputs()
    cpx.prune(model, inputs, 0.5, ignore="a", verify="numeric")


def test_inputs_can_be_given() -> None:
    model, plan, inputs = made("Residual")
    dataclasses.replace(plan, example_inputs=None).apply(
        model, verify="numeric", example_inputs=inputs[:1]
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_no_agreement(value: float) -> None:
    good, bad = torch.ones(3), torch.tensor([1.0, value, 1.0])
    assert max_relative_error(bad, good) == float("inf")
    assert max_relative_error(good, bad) == float("inf")
    assert max_relative_error(bad, bad) == float("inf")
    assert max_relative_error([good, bad], [good, bad]) == float("inf")


def test_relative_error() -> None:
    expected = {"a": torch.tensor([1.0, -4.0]), "b": (torch.tensor([3]),)}
    actual = {"a": torch.tensor([1.0, -4.2]), "b": (torch.tensor([3]),)}
    assert max_relative_error(actual, expected) == pytest.approx(0.05)
    assert max_relative_error(torch.ones(2), torch.ones(3)) == float("inf")
    assert max_relative_error(torch.zeros(2), torch.zeros(2)) == 0

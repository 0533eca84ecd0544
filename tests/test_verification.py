"""The package's own proof: it accepts what is right and refuses what is not."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from models import randomised, relative_error, run, zeroed
from torch import Tensor, nn
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


class Directed(nn.Module):
    """A layer whose rows are divided by their norms, as DoRA does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.a.weight / self.a.weight.norm(dim=1, keepdim=True)
        out: Tensor = self.b(nn.functional.linear(x, weight, self.a.bias))
        return out


def test_zeros_that_make_nan_are_no_original() -> None:
    model, x = Directed().eval(), torch.randn(4, 5)
    plan = cpx.plan(model, x, 0.5)
    with pytest.raises(InvalidArgumentError, match=r"returns NaN, as where weights are divided"):
        plan.apply(model, verify="numeric")
    kept = plan.kept["a.weight"][0]
    weight = nn.functional.normalize(model.a.weight[kept])
    hidden = nn.functional.linear(x, weight, model.a.bias[kept])
    expected = nn.functional.linear(hidden, model.b.weight[:, kept], model.b.bias)
    assert torch.allclose(plan.apply(model)(x), expected, atol=1e-6)


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
    complex_values = torch.tensor([3.0 + 4.0j])
    assert max_relative_error(complex_values + 0.5j, complex_values) == pytest.approx(0.1)


class Spectral(nn.Module):
    """Channels mixed at each frequency, beside a skip path, as in a Fourier neural operator."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.skip, self.down = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 2, 1),
        )
        self.modes = nn.Parameter(torch.randn(8, 8, 8, 5, dtype=torch.complex64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        mixed = torch.einsum("bixy,ioxy->boxy", torch.fft.rfft2(x), self.modes)
        return self.down(F.gelu(torch.fft.irfft2(mixed, s=x.shape[-2:]) + self.skip(x)))


def test_complex_parameters_are_compared_in_double_precision() -> None:
    torch.manual_seed(0)
    model, inputs = Spectral(), torch.randn(2, 3, 8, 8)
    assert cpx.prune(model, inputs, 0.5, verify="numeric").modes.shape == (4, 4, 8, 5)
    wrong = _with_wrong_index(cpx.plan(model, inputs, 0.5), "modes", 0)
    with pytest.raises(VerificationError, match="relative error"):
        wrong.apply(model, verify="numeric")


def test_complex_inputs_and_outputs_are_compared() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(n, n, dtype=torch.complex64) for n in (6, 6)))
    inputs = torch.randn(2, 6, dtype=torch.complex64)
    plan = cpx.plan(model, inputs, 0.5)
    plan.apply(model, verify="numeric")
    with pytest.raises(VerificationError, match="relative error"):
        _with_wrong_index(plan, "1.weight", 1).apply(model, verify="numeric")


DTYPES = [torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("verify", ["replay", "numeric"])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_plan_fits_a_model_converted_since(
    dtype: torch.dtype, verify: str, inplace: bool
) -> None:
    model, plan, _ = made("Residual")
    pruned = plan.apply(model.to(dtype), inplace=inplace, verify=verify)
    assert {p.dtype for p in pruned.parameters()} == {dtype}


def test_a_converted_model_is_refused_what_does_not_run() -> None:
    model, plan, _ = made("Residual")
    kept = {e: dict(dims) for e, dims in plan.kept.items()}
    kept["a.0.weight"][1] = kept["a.0.weight"][1][:-1]
    with pytest.raises(VerificationError, match=r"does not run: .*channel dimensions$"):
        dataclasses.replace(plan, kept=kept).apply(model.half())


class Half(nn.Module):
    """A half-precision network that takes float32 and converts it, its norm in ``norm_dtype``."""

    fed: ClassVar[list[torch.dtype]] = []

    def __init__(self, norm_dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.half()
        self.norm.to(norm_dtype)

    def forward(self, x: Tensor) -> Tensor:
        self.fed.append(x.dtype)
        y = self.norm(self.a(x.half()).to(self.norm.weight.dtype))
        return self.b(y.half())


@pytest.mark.parametrize("norm_dtype", [torch.float16, torch.float32], ids=str)
def test_inputs_stay_as_planned_where_the_model_takes_them(norm_dtype: torch.dtype) -> None:
    model, inputs = Half(norm_dtype), torch.randn(2, 6)
    plan = cpx.plan(model, inputs, 0.5)
    Half.fed.clear()
    plan.apply(model)
    assert Half.fed == [torch.float32]


def test_a_model_converted_in_part_is_refused_with_advice() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    plan = cpx.plan(model, torch.randn(2, 3, 5, 5), 0.5)
    model[0].half()
    with pytest.raises(
        VerificationError,
        match=r"does not run: .*parameters are float16 and float32, .*planned with are float32: "
        r".*apply the plan first and convert",
    ):
        plan.apply(model)


def test_a_forward_bound_to_a_dtype_cannot_be_compared() -> None:
    inputs = torch.randn(2, 6)
    with pytest.raises(VerificationError, match=r"does not run in float64.*use verify='replay'"):
        cpx.prune(Half(), inputs, 0.5, verify="numeric")


def test_what_a_forward_draws_is_the_same_for_both_models() -> None:
    class Sampling(nn.Module):
        """As a variational autoencoder does in eval mode as well."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(5, 8), nn.Linear(8, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            mean = self.b(self.a(x).relu())
            out: Tensor = self.out(mean + torch.randn_like(mean))
            return out

    model, x = Sampling().eval(), torch.randn(2, 5)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    cpx.prune(model, x, 0.5, ignore=["b"], verify="numeric")
    assert torch.equal(torch.rand(3), expected)

"""Unfolding, moments and the ridge solver against slow, plain formulae."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from chanprune_ext.compensation.fit import one_sided_residual
from chanprune_ext.compensation.linear_maps import linear_map, unfolded
from chanprune_ext.compensation.moments import Moments
from chanprune_ext.compensation.ridge import Change
from chanprune_ext.compensation.samples import Samples
from chanprune_ext.errors import InvalidArgumentError

CPU = torch.device("cpu")


def sample_layer(groups: int = 1, dtype: torch.dtype = torch.float64):
    x = torch.randn(6, 4, 9, 8, dtype=dtype)
    weight = torch.randn(6, 4 // groups, 3, 2, dtype=dtype)
    arguments = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": groups}
    geometry, _ = linear_map("conv2d", (x, weight), arguments)
    return geometry, x, weight, F.conv2d(x, weight, **arguments)


@pytest.mark.parametrize("groups", [1, 2])
def test_weights_times_columns_is_the_convolution(groups):
    geometry, x, weight, y = sample_layer(groups)
    (columns, (rows,)), *more = unfolded([geometry], [x], [y], size=10**9)
    assert not more
    assert torch.allclose(weight.view(groups, 6 // groups, -1) @ columns, rows)


@pytest.mark.parametrize("every", [(2, 2), (3, 3), (1, 3)])
def test_thinned_positions_pair_up_and_all_have_their_turn(every):
    geometry, x, weight, y = sample_layer()
    position = torch.arange(y[0, 0].numel(), dtype=y.dtype).view(1, 1, *y.shape[2:]).expand_as(y)
    seen = set()
    for turn in range(math.prod(every)):
        (columns, (rows, places)), *_ = unfolded(
            [geometry], [x], [y, position], size=10**9, every=every, turn=turn
        )
        assert torch.allclose(weight.view(1, 6, -1) @ columns, rows)
        seen |= set(places[0, 0].tolist())
    assert seen == set(range(y[0, 0].numel()))


def test_small_pieces_add_up_to_the_moments_of_the_whole():
    geometry, x, _, y = sample_layer()
    whole, pieces = Moments(1, 6, 24, CPU), Moments(1, 6, 24, CPU)
    ((columns, (rows,)),) = unfolded([geometry], [x], [y], size=10**9)
    whole.add(columns, rows)
    count = 0
    for columns, (rows,) in unfolded([geometry], [x], [y], size=1):
        pieces.add(columns, rows)
        count += 1
    assert count == len(x)
    for name in ("gram", "cross", "column_sum", "row_sum", "row_energy"):
        assert torch.allclose(getattr(pieces, name), getattr(whole, name), rtol=1e-12), name
    assert pieces.samples == whole.samples


def test_float32_moments_are_summed_in_float64():
    x = torch.randn(1, 3, 20000) + 100
    moments = Moments(1, 1, 3, CPU)
    for piece in x.split(100, -1):
        moments.add(piece, torch.ones(1, 1, 100))
    assert torch.allclose(moments.gram, x.double() @ x.double().mT, rtol=1e-6)


KINDS = ["moments", "samples"]


def collected(kind: str, x: torch.Tensor, r: torch.Tensor) -> Moments | Samples:
    """Evidence of samples in rows, as a linear layer has them, in two pieces."""
    evidence = Moments(1, r.shape[1], x.shape[1], CPU) if kind == "moments" else Samples()
    for part in (slice(0, 3), slice(3, None)):
        evidence.add(x[part].T[None], r[part].T[None])
    return evidence


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [50, 5], ids=["many samples", "few samples"])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("ridge", [1e-4, 0.3])
@pytest.mark.parametrize("offset", [1, 9])
def test_ridge_solution_equals_augmented_least_squares(kind, count, ridge, intercept, offset):
    """``min |R - D X - d|^2 + n lambda |M + D|^2``, written as one tall system for numpy."""
    rng = np.random.default_rng(0)
    n, k, m = count, 7, 3
    x, r, made = rng.normal(offset, 1, (n, k)), rng.normal(2, 1, (n, m)), rng.normal(0, 1, (m, k))
    evidence = collected(kind, torch.tensor(x), torch.tensor(r))
    solver = evidence.solver(ridge, intercept=intercept)
    change = solver.solve(Change(torch.tensor(made)[None], None))
    assert solver.ridge == ridge

    energy = np.mean(x**2)
    if intercept:
        energy = min(energy, 4 * np.mean(x.var(0)))
    root = np.sqrt(n * ridge * energy) * np.eye(k)
    columns = [np.vstack([x, root])]
    if intercept:
        columns.append(np.vstack([np.ones((n, 1)), np.zeros((k, 1))]))
    expected = np.linalg.lstsq(np.hstack(columns), np.vstack([r, -root @ made.T]), rcond=None)[0].T
    np.testing.assert_allclose(change.weight[0].numpy(), expected[:, :k], rtol=1e-8, atol=1e-9)
    if intercept:
        np.testing.assert_allclose(change.intercept[0].numpy(), expected[:, k], rtol=1e-8)
    else:
        assert change.intercept is None


@pytest.mark.parametrize(("kind", "count"), [("moments", 60), ("moments", 6), ("samples", 6)])
@pytest.mark.parametrize("intercept", [True, False])
def test_rank_and_condition_are_those_of_the_eigenvalues(kind, count, intercept):
    x = torch.randn(count, 12).double() @ torch.diag(torch.logspace(0, -2, 12).double()) + 0.1
    solver = collected(kind, x, x[:, :2]).solver(1e-3, intercept=intercept)
    centred = x - x.mean(0) if intercept else x
    eigenvalues = torch.linalg.eigvalsh(centred.T @ centred / count).clamp(min=0)
    penalty = 1e-3 * float(x.square().mean())
    rank, condition = solver.spectrum()
    assert rank == pytest.approx(float((eigenvalues / (eigenvalues + penalty)).sum()), rel=1e-6)
    extremes = eigenvalues.max() + penalty, eigenvalues.min() + penalty
    assert condition == pytest.approx(float(extremes[0] / extremes[1]), rel=0.3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("intercept", [True, False])
def test_loss_is_the_mean_squared_residual(kind, intercept):
    x, r = torch.randn(40, 5).double() + 1, torch.randn(40, 2).double()
    evidence = collected(kind, x, r)
    assert evidence.loss(None) == pytest.approx(float(r.square().mean(0).sum()))
    change = evidence.solver(0.1, intercept=intercept).solve()
    left = r - x @ change.weight[0].T - (change.intercept[0] if intercept else 0)
    assert evidence.loss(change) == pytest.approx(float(left.square().mean(0).sum()))
    assert evidence.samples == 40


@pytest.mark.parametrize("kind", KINDS)
def test_residual_can_be_replaced(kind):
    x, r = torch.randn(40, 5).double(), torch.randn(40, 2).double()
    evidence = collected(kind, x, torch.randn(40, 2).double())
    solver = evidence.solver(0.1, intercept=True)
    evidence.clear_residual()
    for part in (slice(0, 3), slice(3, None)):
        evidence.add_residual(x[part].T[None], r[part].T[None])
    expected = collected(kind, x, r).solver(0.1, intercept=True).solve()
    assert torch.allclose(solver.solve().weight, expected.weight)
    assert torch.allclose(solver.solve().intercept, expected.intercept)


def test_singular_system_is_solved_and_its_rank_reported():
    x = torch.randn(100, 3).double() @ torch.randn(3, 8).double()
    solver = collected("moments", x, x[:, :2]).solver(1e-10, intercept=False)
    assert torch.allclose(x @ solver.solve().weight[0].T, x[:, :2], atol=1e-5)
    rank, condition = solver.spectrum()
    assert rank == pytest.approx(3, abs=1e-3)
    assert condition > 1e8


@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_are_always_zero(kind):
    evidence = collected(kind, torch.zeros(10, 4), torch.ones(10, 2))
    change = evidence.solver(0.0, intercept=True).solve()
    assert torch.equal(change.weight, torch.zeros(1, 2, 4).double())
    assert torch.allclose(change.intercept, torch.ones(1, 2).double())


def test_large_system_estimates_rank_and_condition():
    scales = torch.logspace(0, -3, 1100).double()
    moments = Moments(1, 1, 1100, CPU)
    moments.gram[0] = torch.diag(scales)
    moments.samples = 1
    solver = moments.solver(1e-3, intercept=False)
    shifted = scales + 1e-3 * scales.mean()
    rank, condition = solver.spectrum()
    assert rank == pytest.approx(float((scales / shifted).sum()), rel=0.02)
    assert condition == pytest.approx(float(shifted.max() / shifted.min()), rel=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_are_not_finite_are_refused(kind):
    x = torch.tensor([[1e300]], dtype=torch.float64).expand(5, 1)
    evidence = collected(kind, x, torch.ones(5, 1).double())
    with pytest.raises(InvalidArgumentError, match="not finite"):
        evidence.solver(0.1, intercept=False)


@pytest.mark.parametrize("bounds", [(0.0, float("inf")), (0.0, 6.0), (-1.0, 1.0)])
def test_one_sided_steps_reduce_the_clamped_error(bounds):
    x = torch.randn(400, 6).double()
    target = torch.relu(x) @ torch.randn(6, 4).double() * 3
    weight = torch.zeros(4, 6).double()
    moments = collected("moments", x, target)
    solver = moments.solver(1e-8, intercept=False)
    weight += solver.solve().weight[0]

    def majorised_loss() -> float:
        return float(one_sided_residual(target, x @ weight.T, bounds).square().mean())

    losses = [majorised_loss()]
    for _ in range(6):
        moments.clear_residual()
        residual = one_sided_residual(target, x @ weight.T, bounds)
        moments.add_residual(x.T[None], residual.T[None])
        weight += solver.solve().weight[0]
        losses.append(majorised_loss())
    assert all(b < a for a, b in itertools.pairwise(losses))
    assert losses[-1] < 0.95 * losses[0]


def test_one_sided_residual_by_hand():
    original = torch.tensor([2.0, 2.0, -1.0, -1.0, 7.0, 7.0, 7.0])
    pruned = torch.tensor([1.0, 8.0, -3.0, 0.5, 5.0, 6.5, -1.0])
    expected = torch.tensor([1.0, -6.0, 0.0, -0.5, 1.0, 0.0, 7.0])
    assert torch.equal(one_sided_residual(original, pruned, (0.0, 6.0)), expected)
    assert torch.equal(one_sided_residual(original, pruned, None), original - pruned)

"""Backward elimination against least squares solved anew for every subset."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chanprune_ext.elimination.backward import Problem, eliminate

RIDGE = 0.3


def problem(units: int, width: int, rows: int, seed: int) -> tuple[Problem, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n = units * width
    x = torch.randn(n, 4 * n, generator=generator, dtype=torch.float64)
    gram = x @ x.mT / x.shape[1] + RIDGE * torch.eye(n, dtype=torch.float64)
    weights = torch.randn(rows, n, generator=generator, dtype=torch.float64)
    columns = torch.randperm(n, generator=generator).view(units, width)
    return Problem(torch.linalg.inv(gram), weights.clone(), columns, 1.0), gram, weights


def refitted(gram: Tensor, weights: Tensor, left: list[int]) -> tuple[Tensor, float]:
    """The best weights on the columns ``left``, and what they lose, by a system of their own."""
    best = torch.zeros_like(weights)
    best[:, left] = torch.linalg.solve(gram[left][:, left], gram[left] @ weights.mT).mT
    change = best - weights
    return best, float(((change @ gram) * change).sum())


def columns_left(columns: Tensor, gone: list[int]) -> list[int]:
    taken = set(columns[gone].flatten().tolist())
    return [c for c in range(columns.numel()) if c not in taken]


@given(
    units=st.integers(2, 6),
    width=st.integers(1, 3),
    rows=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_every_step_is_the_cheapest_and_costs_what_it_says(units, width, rows, seed):
    given_problem, gram, weights = problem(units, width, rows, seed)
    columns = given_problem.columns.clone()
    found = eliminate([given_problem], units, stops=range(1, units))
    before = 0.0
    for step in range(units):
        gone = found.order[:step].tolist()
        losses = {
            unit: refitted(gram, weights, columns_left(columns, [*gone, unit]))[1] - before
            for unit in range(units)
            if unit not in gone
        }
        assert int(found.order[step]) == min(losses, key=lambda u: losses[u])
        assert float(found.increase[step]) == pytest.approx(
            min(losses.values()), rel=1e-7, abs=1e-9
        )
        before += float(found.increase[step])
        if step + 1 < units:
            left = columns_left(columns, found.order[: step + 1].tolist())
            torch.testing.assert_close(
                found.states[step + 1][0], refitted(gram, weights, left)[0], rtol=1e-7, atol=1e-8
            )


def test_two_readers_count_by_their_scale():
    # The first reader needs unit 0, the second unit 1; neither needs the other's.
    eye = torch.eye(2, dtype=torch.float64)
    columns = torch.tensor([[0], [1]])
    for scales, first in (((1.0, 2.0), 0), ((2.0, 1.0), 1)):
        problems = [
            Problem(eye.clone(), row.clone().unsqueeze(0), columns, scale)
            for row, scale in zip(eye, scales, strict=True)
        ]
        found = eliminate(problems, 2)
        assert found.order.tolist() == [first, 1 - first]
        assert found.increase.tolist() == sorted(scales)


def test_units_without_columns_in_a_reader_cost_nothing_there():
    weights = torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    columns = torch.tensor([[0, 1], [-1, -1]])
    found = eliminate([Problem(eye, weights, columns, 1.0)], 2)
    assert found.order.tolist() == [1, 0]
    assert found.increase.tolist() == [0.0, 10.0]


def test_ragged_units():
    weights = torch.tensor([[1.0, 2.0, 2.0]], dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    columns = torch.tensor([[0, -1], [1, 2]])
    found = eliminate([Problem(eye, weights, columns, 1.0)], 2)
    assert found.order.tolist() == [0, 1]
    assert found.increase.tolist() == [1.0, 8.0]


def test_of_two_equal_inputs_one_goes_for_nothing():
    x = torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, x[1:2]])
    gram = x @ x.mT / 50 + 1e-9 * torch.eye(4, dtype=torch.float64)
    weights = torch.ones(1, 4, dtype=torch.float64)
    found = eliminate(
        [Problem(torch.linalg.inv(gram), weights, torch.arange(4).unsqueeze(1), 1.0)], 4, [1]
    )
    assert int(found.order[0]) in (1, 3)
    assert float(found.increase[0]) < 1e-6
    other = 4 - int(found.order[0])
    assert float(found.states[1][0][0, other]) == pytest.approx(2.0, abs=1e-5)


def test_wide_layers_lose_several_units_at_a_time_and_all_in_the_end():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 900, generator=generator, dtype=torch.float64)
    gram = x @ x.mT / 900 + 1e-3 * torch.eye(300, dtype=torch.float64)
    weights = torch.randn(2, 300, generator=generator, dtype=torch.float64)
    start = Problem(torch.linalg.inv(gram), weights.clone(), torch.arange(300).unsqueeze(1), 1.0)
    found = eliminate([start], 300, stops=[150])
    assert sorted(found.order.tolist()) == list(range(300))
    zero = found.states[150][0].abs().sum(0) == 0
    assert int(zero.sum()) in range(150, 154)


def test_the_order_beats_all_others_of_a_small_problem_on_average():
    start, gram, weights = problem(5, 1, 3, seed=7)
    columns = start.columns.clone()
    chosen = eliminate([start], 5).order[:2].tolist()
    losses = sorted(
        refitted(gram, weights, columns_left(columns, list(pair)))[1]
        for pair in itertools.combinations(range(5), 2)
    )
    mine = refitted(gram, weights, columns_left(columns, chosen))[1]
    assert mine <= losses[len(losses) // 4]

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.search_problems import (
    FREE,
    KEY,
    all_bits,
    budget,
    constraint,
    cost_table,
    exact_cost,
)

from mpq_jax.search import problem
from mpq_jax.search.problem import Constraint
from mpq_jax.search.space import SearchSpace

BITS = np.array(FREE.candidates)


def choices_of(bits):
    return (np.asarray(bits)[..., None] == BITS).argmax(-1)


@pytest.mark.parametrize("kind", ["bitops", "bytes", "act_bytes"])
def test_costs_are_sums_over_layers(kind):
    bits = all_bits(FREE)
    found = problem.total_cost(cost_table(FREE, kind), choices_of(bits))
    np.testing.assert_allclose(found, exact_cost(FREE, bits, kind), rtol=1e-12)  # sums


def test_violation_is_the_relative_sum_over_constraints():
    bits = all_bits(FREE)
    states = choices_of(bits)
    limits = (
        constraint(FREE, 4.5e5),
        constraint(FREE, 1250, "bytes", lower_bound=1000),
        constraint(FREE, np.inf, "act_bytes", lower_bound=230.0),
    )
    found = problem.violation(budget("all", *limits), states)
    bitops, size, acts = (exact_cost(FREE, bits, one.name) for one in limits)
    wanted = np.maximum(bitops - 4.5e5, 0) / 4.5e5 + np.maximum(size - 1250, 0) / 1250
    wanted += np.maximum(1000 - size, 0) / 1250
    within = (bitops <= 4.5e5) & (size <= 1250) & (size >= 1000) & (acts >= 230)
    assert 0 < within.sum() < len(bits)
    np.testing.assert_array_equal(found == 0, within)
    fine = acts >= 230
    np.testing.assert_allclose(found[fine], wanted[fine], rtol=1e-9, atol=1e-15)
    single = problem.violation(budget("all", *limits), states[7])
    assert single == found[7]
    priced = problem.relative_cost(budget("all", *limits), states)
    np.testing.assert_allclose(priced, bitops / 4.5e5, rtol=1e-12)


@pytest.mark.parametrize("most", [1e9, math.inf])
def test_what_costs_infinity_is_beyond_every_limit(most):
    cost = cost_table(FREE)
    cost[1, FREE.candidates.index(3)] = np.inf
    bits = all_bits(FREE)
    found = problem.violation(budget("any", Constraint("holes", cost, most)), choices_of(bits))
    np.testing.assert_array_equal(found > 0, bits[:, 1, 0] == 3)


@pytest.mark.parametrize("sign", [1, -1])
def test_constraints_are_kept_to_their_tolerance(sign):
    state = SearchSpace(FREE).max_choices()[None]
    total = exact_cost(FREE, all_bits(FREE)).max()
    for relative, kept in [(0.0, True), (0.9e-6, True), (1.1e-6, False)]:
        edge = total / (1 + sign * relative)
        one = constraint(FREE, edge) if sign > 0 else constraint(FREE, 1e9, lower_bound=edge)
        assert bool(problem.violation(budget("edge", one), state)[0] == 0) is kept
        low, high = one.bounds
        assert bool(low <= total <= high) is kept


def test_scores_that_are_no_numbers_are_infinitely_bad():
    space, states = (
        SearchSpace(FREE),
        SearchSpace(FREE).neighbors(SearchSpace(FREE).max_choices())[:5],
    )

    def score(configs, key):
        assert configs.weights.shape == (5, 5) and key is KEY
        return jnp.array([1.5, jnp.nan, jnp.inf, -jnp.inf, 2.0])

    found = problem.score_choices(score, space, states, KEY)
    assert found.dtype == np.float64 and found.tolist() == [1.5, np.inf, np.inf, np.inf, 2.0]


def test_budgets_are_met_from_the_largest_and_answered_in_their_order():
    budgets = [budget(str(most), constraint(FREE, most)) for most in (3, 9, 1, 9.5)]
    assert [one.name for one in problem.largest_first(budgets)] == ["9.5", "9", "3", "1"]
    state = SearchSpace(FREE).max_choices()
    results = [problem.make_result(SearchSpace(FREE), one, state, 0.5) for one in budgets[::-1]]
    ordered = problem.in_order_of(budgets, results)
    assert [one.budget for one in ordered] == ["3", "9", "1", "9.5"]
    assert ordered[0].costs == {"bitops": 544000.0} and ordered[0].score == 0.5


def test_keys_are_different_and_repeatable():
    one, other = (
        [
            jax.random.key_data(k).tolist()
            for k, _ in zip(problem.key_sequence(KEY), range(9), strict=False)
        ]
        for _ in range(2)
    )
    assert one == other and len({tuple(k) for k in one}) == 9

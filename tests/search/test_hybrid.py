import numpy as np
import pytest
from helpers.search_problems import (
    FREE,
    KEY,
    TABLES,
    Recorder,
    all_bits,
    bits_of,
    budget,
    constraint,
    exact_cost,
    rugged,
    scores_of,
    shifted,
)

from mpq_jax.search.hybrid import hybrid_search
from mpq_jax.search.ilp import ilp_search
from mpq_jax.search.space import SearchSpace


def search(strategy, score, table=FREE, parts=(0.5, 0.2), **options):
    totals = exact_cost(table, all_bits(table))
    budgets = [
        budget(str(part), constraint(table, totals.min() + part * np.ptp(totals))) for part in parts
    ]
    return strategy(score, SearchSpace(table), budgets, KEY, **options)


@pytest.mark.slow_but_first
@pytest.mark.parametrize("which", TABLES)
@pytest.mark.parametrize("seed", range(3))
def test_it_never_ends_worse_than_its_program(which, seed):
    table = TABLES[which]
    starts = search(ilp_search, shifted(seed), table, solutions=3)
    without = search(hybrid_search, shifted(seed), table, solutions=3, rounds=0)
    results = search(hybrid_search, shifted(seed), table, solutions=3, rounds=5)
    for start, same, found in zip(starts, without, results, strict=True):
        np.testing.assert_array_equal(bits_of(same.bits), bits_of(start.bits))
        value = scores_of(shifted(seed), bits_of(start.bits)[None])[0]
        assert same.score == value
        assert found.score == scores_of(shifted(seed), bits_of(found.bits)[None])[0] <= value


def test_exchanges_find_what_a_sum_of_losses_does_not():
    gained = []
    for seed in range(4):
        (start,), (found,) = (
            search(strategy, shifted(seed), parts=(0.4,))
            for strategy in (ilp_search, hybrid_search)
        )
        gained.append(start.score - found.score)
    assert min(gained) >= 0 and sum(np.array(gained) > 0) >= 2


def test_sensitivities_are_measured_once_for_all_budgets():
    """7 variables: 18 choices and the largest; then 8 solutions and what exchanges ask for."""
    score, steps = Recorder(rugged), []
    search(hybrid_search, score, parts=(0.6, 0.4, 0.2), rounds=1, on_step=steps.append)
    sizes = [len(call) for call in score.calls]
    assert sizes[0] == 1 + 3 + 3 + 2 + 2 + 3 + 3 + 3
    assert sizes[1::4] == [8, 8, 8] and len(sizes) == 1 + 3 * 4
    assert [step.phase for step in steps] == ["program", "exchange"] * 3


def test_a_program_with_one_solution_is_not_asked_for_a_score():
    for strategy in (ilp_search, hybrid_search):
        score = Recorder(rugged)
        found = search(strategy, score, solutions=1)
        calls = [len(call) for call in score.calls]
        assert calls[0] == 20
        if strategy is ilp_search:
            assert len(calls) == 1 and all(np.isnan(one.score) for one in found)
        else:
            assert all(np.isfinite(one.score) for one in found)


def test_a_given_objective_is_not_measured():
    score = Recorder(rugged)
    objective = np.random.default_rng(0).uniform(size=(5, 4, 4))
    (found,) = search(ilp_search, score, parts=(0.5,), objective=objective, solutions=5)
    assert [len(call) for call in score.calls] == [5]
    bits = all_bits(FREE)
    totals = exact_cost(FREE, bits)
    within = bits[totals <= (totals.min() + totals.max()) / 2 * (1 + 1e-6)]
    place = (within[..., None] == np.array(FREE.candidates)).argmax(-1)
    sums = objective[np.arange(5), place[..., 0], place[..., 1]].sum(-1)
    best = within[np.argsort(sums)[:5]]
    np.testing.assert_array_equal(np.unique(score.seen, axis=0), np.unique(best, axis=0))
    assert found.score == scores_of(rugged, best).min()

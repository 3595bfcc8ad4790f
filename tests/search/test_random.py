import numpy as np
import pytest
from helpers.search_problems import (
    FREE,
    KEY,
    TABLES,
    Recorder,
    additive,
    all_bits,
    bits_of,
    budget,
    constraint,
    exact_cost,
    never,
    rugged,
)

from mpq_jax.search import problem, sampling
from mpq_jax.search.random import random_search
from mpq_jax.search.space import SearchSpace

TOTALS = exact_cost(FREE, all_bits(FREE))
HALF = float((TOTALS.min() + TOTALS.max()) / 2)


def search(score, *budgets, table=FREE, **options):
    return random_search(score, SearchSpace(table), budgets, KEY, **options)


def test_the_best_of_the_samples_is_returned():
    score, steps = Recorder(rugged), []
    half = budget("half", constraint(FREE, HALF))
    (found,) = search(score, half, samples=150, window=1.0, on_step=steps.append)
    assert [len(call) for call in score.calls] == [64, 64, 22]
    seen = score.seen
    assert len({bits.tobytes() for bits in seen}) == 150  # nothing twice
    values = np.concatenate([rugged_of(call) for call in score.calls])
    assert found.score == values.min()
    np.testing.assert_array_equal(bits_of(found.bits), seen[values.argmin()])
    assert [step.change for step in steps] == ["64 of 150", "128 of 150", "150 of 150"]
    assert [step.score for step in steps] == [values[:n].min() for n in (64, 128, 150)]


def rugged_of(bits):
    return rugged(SearchSpace(FREE).bits_of(choices_of(bits)))


def choices_of(bits):
    return (bits[..., None] == np.array(FREE.candidates)).argmax(-1)


def test_what_is_drawn_uses_the_budget():
    score = Recorder()
    search(score, budget("half", constraint(FREE, HALF)), samples=100, window=0.05)
    used = exact_cost(FREE, score.seen) / HALF
    assert used.max() <= 1 + 1e-6
    assert np.mean(used >= 0.95) > 0.8  # where the last step is not too large
    assert len(np.unique(score.seen, axis=0)) == 100
    everything = Recorder()
    search(everything, budget("half", constraint(FREE, HALF)), samples=100, window=1.0)
    assert exact_cost(FREE, everything.seen).mean() < exact_cost(FREE, score.seen).mean()


def test_a_wide_budget_leaves_draws_alone():
    """Uniform by entry, then: all 972 configurations are about equally likely."""
    score = Recorder()
    search(score, budget("all", constraint(FREE, 1e9)), samples=900, window=1.0)
    assert len(np.unique(score.seen, axis=0)) > 700
    for index, column in [(1, 0), (4, 1)]:
        shares = [np.mean(score.seen[:, index, column] == bits) for bits in (4, 3, 2)]
        np.testing.assert_allclose(shares, 1 / 3, atol=0.08)  # 900 without replacement


def test_there_may_be_fewer_configurations_than_samples():
    cheapest = budget("least", constraint(FREE, float(TOTALS.min())))
    score = Recorder()
    (found,) = search(score, cheapest, samples=20)
    assert len(score.seen) == 1 and found.costs["bitops"] == TOTALS.min()


def test_enough_samples_find_the_best():
    table = TABLES["tied"]
    bits = all_bits(table)
    totals = exact_cost(table, bits)
    most = float(np.median(totals))
    (found,) = search(
        additive, budget("half", constraint(table, most)), table=table, samples=300, window=1.0
    )
    config = SearchSpace(table).bits_of(choices_of(bits[totals <= most]))
    assert found.score == additive(config).min()


def test_samples_are_counted():
    with pytest.raises(ValueError, match="samples is 0; wanted at least 1"):
        search(never, budget("half", constraint(FREE, HALF)), samples=0)


@pytest.mark.parametrize("seed", range(3))
def test_states_are_moved_into_budgets_that_no_descent_meets(seed):
    """A window that is one configuration wide, which single moves pass by."""
    bits = all_bits(FREE)
    chosen = bits[np.random.default_rng(seed).integers(len(bits))]
    limits = [
        constraint(
            FREE,
            exact_cost(FREE, chosen, kind),
            kind,
            lower_bound=float(exact_cost(FREE, chosen, kind)),
        )
        for kind in ("bitops", "bytes", "act_bytes")
    ]
    wanted = budget("window", *limits)
    space, generator = SearchSpace(FREE), np.random.default_rng(0)
    for _ in range(3):
        state = sampling.repair(space, wanted, space.sample(generator), generator, window=0.05)
        assert problem.violation(wanted, state) == 0


def test_the_first_different_states_are_taken():
    states = [np.array([i % 3]) for i in range(10)]
    assert [s.tolist() for s in sampling.distinct(states, 2)] == [[0], [1]]
    assert len(sampling.distinct(states, 5)) == 3
    endless = (np.array([i]) for i in iter(int, 1))
    assert len(sampling.distinct(endless, 1)) == 1

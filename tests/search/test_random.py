import numpy as np
import pytest
from helpers.search_problems import (
    FREE,
    KEY,
    TABLES,
    Recorder,
    additive,
    all_bits,
    billed,
    bits_of,
    budget,
    limit,
    never,
    rugged,
)

from mpq_jax.search import problem as spaces
from mpq_jax.search import random
from mpq_jax.search.problem import Space

TOTALS = billed(FREE, all_bits(FREE))
HALF = float((TOTALS.min() + TOTALS.max()) / 2)


def search(score, *budgets, table=FREE, **options):
    return random.search(score, table, table.candidates, table.mask, budgets, KEY, **options)


def test_the_best_of_the_samples_is_returned():
    score, steps = Recorder(rugged), []
    half = budget("half", limit(FREE, HALF))
    (found,) = search(score, half, samples=150, window=1.0, watch=steps.append)
    assert [len(call) for call in score.calls] == [64, 64, 22]
    seen = score.seen
    assert len({bits.tobytes() for bits in seen}) == 150  # nothing twice
    values = np.concatenate([rugged_of(call) for call in score.calls])
    assert found.score == values.min()
    np.testing.assert_array_equal(bits_of(found.bits), seen[values.argmin()])
    assert [step.change for step in steps] == ["64 of 150", "128 of 150", "150 of 150"]
    assert [step.score for step in steps] == [values[:n].min() for n in (64, 128, 150)]


def rugged_of(bits):
    return rugged(Space(FREE, FREE.candidates, FREE.mask).config(states_of(bits)))


def states_of(bits):
    return (bits[..., None] == np.array(FREE.candidates)).argmax(-1)


def test_what_is_drawn_uses_the_budget():
    score = Recorder()
    search(score, budget("half", limit(FREE, HALF)), samples=100, window=0.05)
    used = billed(FREE, score.seen) / HALF
    assert used.max() <= 1 + 1e-6
    assert np.mean(used >= 0.95) > 0.8  # where the last step is not too large
    assert len(np.unique(score.seen, axis=0)) == 100
    everything = Recorder()
    search(everything, budget("half", limit(FREE, HALF)), samples=100, window=1.0)
    assert billed(FREE, everything.seen).mean() < billed(FREE, score.seen).mean()


def test_a_wide_budget_leaves_draws_alone():
    """Uniform by entry, then: all 972 configurations are about equally likely."""
    score = Recorder()
    search(score, budget("all", limit(FREE, 1e9)), samples=900, window=1.0)
    assert len(np.unique(score.seen, axis=0)) > 700
    for index, column in [(1, 0), (4, 1)]:
        shares = [np.mean(score.seen[:, index, column] == bits) for bits in (4, 3, 2)]
        np.testing.assert_allclose(shares, 1 / 3, atol=0.08)  # 900 without replacement


def test_there_may_be_fewer_configurations_than_samples():
    cheapest = budget("least", limit(FREE, float(TOTALS.min())))
    score = Recorder()
    (found,) = search(score, cheapest, samples=20)
    assert len(score.seen) == 1 and found.costs["bitops"] == TOTALS.min()


def test_enough_samples_find_the_best():
    table = TABLES["tied"]
    bits = all_bits(table)
    totals = billed(table, bits)
    most = float(np.median(totals))
    (found,) = search(
        additive, budget("half", limit(table, most)), table=table, samples=300, window=1.0
    )
    config = Space(table, table.candidates, table.mask).config(states_of(bits[totals <= most]))
    assert found.score == additive(config).min()


def test_samples_are_counted():
    with pytest.raises(ValueError, match="samples is 0; wanted at least 1"):
        search(never, budget("half", limit(FREE, HALF)), samples=0)


@pytest.mark.parametrize("seed", range(3))
def test_states_are_moved_into_budgets_that_no_descent_meets(seed):
    """A window that is one configuration wide, which single moves pass by."""
    bits = all_bits(FREE)
    chosen = bits[np.random.default_rng(seed).integers(len(bits))]
    limits = [
        limit(FREE, billed(FREE, chosen, kind), kind, at_least=float(billed(FREE, chosen, kind)))
        for kind in ("bitops", "bytes", "act_bytes")
    ]
    wanted = budget("window", *limits)
    space, generator = Space(FREE, FREE.candidates, FREE.mask), np.random.default_rng(0)
    for _ in range(3):
        state = random.into_budget(space, wanted, space.drawn(generator), generator, window=0.05)
        assert spaces.excess(wanted, state) == 0


def test_the_first_different_states_are_taken():
    states = [np.array([i % 3]) for i in range(10)]
    assert [s.tolist() for s in random.distinct(states, 2)] == [[0], [1]]
    assert len(random.distinct(states, 5)) == 3
    endless = (np.array([i]) for i in iter(int, 1))
    assert len(random.distinct(endless, 1)) == 1

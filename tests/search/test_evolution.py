import numpy as np
import pytest
from helpers.search_problems import (
    FREE,
    KEY,
    Recorder,
    all_bits,
    bits_of,
    budget,
    constraint,
    exact_cost,
    layer,
    never,
    rugged,
)

from mpq_jax.search.evolution import evolutionary_search
from mpq_jax.search.space import SearchSpace
from mpq_jax.supernet.layer_table import LayerTable

BITS = (6, 5, 4, 3, 2)
LARGE = LayerTable(tuple(layer(f"layer{i}", BITS, BITS) for i in range(10)))  # 5^20
OPTIONS = {"population": 12, "generations": 4, "parents": 3, "mutations": 4, "crossovers": 5}
MOST = 36 * 1000.0 * len(LARGE)
WIDE = budget("all", constraint(LARGE, MOST))


def search(score, budgets=(WIDE,), table=LARGE, **options):
    options = OPTIONS | options
    return evolutionary_search(score, SearchSpace(table), budgets, KEY, **options)


def test_generations_of_the_population_are_scored_and_the_best_one_returned():
    score, steps = Recorder(rugged), []
    budgets = [budget("half", constraint(LARGE, MOST / 2)), WIDE]
    found = search(score, budgets, on_step=steps.append)
    assert [len(call) for call in score.calls] == [12] * 8
    for one, calls in zip(found, (score.calls[:4], score.calls[4:]), strict=True):
        seen = np.concatenate(calls)
        assert len({bits.tobytes() for bits in seen}) == 48  # nothing twice
        values = np.concatenate([rugged_of(call) for call in calls])
        assert one.score == values.min()
        np.testing.assert_array_equal(bits_of(one.bits), seen[values.argmin()])
    assert exact_cost(LARGE, np.concatenate(score.calls[:4])).max() <= MOST / 2 * (1 + 1e-6)
    assert [step.phase for step in steps] == [f"generation {i}" for i in (1, 2, 3, 4)] * 2
    assert [step.change for step in steps[:4]] == [f"{n} scored" for n in (12, 24, 36, 48)]


class Config:
    def __init__(self, bits):
        self.weights, self.acts = bits[..., 0], bits[..., 1]


def rugged_of(bits):
    return rugged(Config(bits))


def parents_of(calls, count=3):
    """The best of all that was scored before."""
    seen = np.concatenate(calls)
    return seen[np.argsort(rugged_of(seen), kind="stable")[:count]]


def from_two(bits, parents):
    """Whether every entry is that of one of two parents."""
    return any(((bits == one) | (bits == other)).all() for one in parents for other in parents)


def test_generations_have_as_many_mutations_and_crossovers_as_asked():
    """Told apart: with probability 1, mutations are random; nothing is moved into the budget."""
    score = Recorder(rugged)
    search(score, mutation_probability=1.0, window=1.0)
    for number in (1, 2, 3):
        parents = parents_of(score.calls[:number])
        crossed = [from_two(bits, parents) for bits in score.calls[number]]
        assert sum(crossed) == OPTIONS["crossovers"]


def test_mutations_change_entries_of_a_parent_at_the_probability():
    """A new draw is the old one in a fifth of the cases."""
    score = Recorder(rugged)
    options = {"population": 60, "mutations": 60, "crossovers": 0, "parents": 1}
    search(score, mutation_probability=0.3, window=1.0, generations=2, **options)
    changed = score.calls[1] != parents_of(score.calls[:1], 1)[0]
    assert abs(changed.mean() - 0.3 * 0.8) < 4.5 * np.sqrt(0.24 * 0.76 / changed.size)


def test_crossovers_take_either_parent_evenly():
    score = Recorder(rugged)
    options = {"population": 60, "mutations": 0, "crossovers": 60, "parents": 2}
    search(score, window=1.0, generations=2, **options)
    one, other = parents_of(score.calls[:1], 2)
    apart = one != other
    share = (score.calls[1] == one)[:, apart].mean()
    assert abs(share - 0.5) < 4.5 * np.sqrt(0.25 / (60 * apart.sum()))


def test_without_parents_generations_are_random():
    score = Recorder(rugged)
    search(score, mutations=0, crossovers=0, window=1.0)
    seen = np.concatenate(score.calls)
    assert [len(call) for call in score.calls] == [12] * 4
    assert abs((seen == 6).mean() - 0.2) < 4.5 * np.sqrt(0.16 / seen.size)


def test_a_small_space_is_scored_once_and_then_the_search_ends():
    totals = exact_cost(FREE, all_bits(FREE))
    least = budget("least", constraint(FREE, float(totals.min())))
    score = Recorder(rugged)
    (found,) = search(score, [least], FREE)
    assert [len(call) for call in score.calls] == [1]
    assert found.costs["bitops"] == totals.min()


def test_evolution_beats_as_many_random_configurations():
    score = Recorder(rugged)
    (found,) = search(score, generations=8, population=20, mutations=8, crossovers=8, window=1.0)
    lone, options = Recorder(rugged), {"generations": 1, "parents": 1, "window": 1.0}
    (drawn,) = search(lone, population=160, mutations=0, crossovers=0, **options)
    assert len(score.seen) == len(lone.seen) == 160
    assert found.score < drawn.score


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parents": 0}, "parents is 0"),
        ({"parents": 13}, "parents is 13"),
        ({"mutations": 8}, "mutations 8 and crossovers 5; .* the population of 12"),
        ({"generations": 0}, "generations is 0; wanted at least 1"),
    ],
)
def test_counts_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        search(never, **options)

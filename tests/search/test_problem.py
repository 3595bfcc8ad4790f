import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.search_problems import (
    FREE,
    KEY,
    TABLES,
    all_bits,
    billed,
    bits_of,
    budget,
    cost_table,
    layer,
    limit,
)

from mpq_jax.search import problem as spaces
from mpq_jax.search.problem import Limit, Space
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable

BITS = np.array(FREE.candidates)


def space_of(table, mask=None):
    return Space(table, table.candidates, table.mask if mask is None else mask)


def states_of(bits):
    return (np.asarray(bits)[..., None] == BITS).argmax(-1)


@pytest.mark.parametrize(
    ("which", "genes"),
    [("free", [2, 3, 4, 5, 6, 8, 9]), ("tied", [2, 6, 8]), ("groups", [2, 3, 5, 6])],
)
def test_genes_are_what_can_be_moved_by_itself(which, genes):
    """Entry 4 of "groups", the weights of mixed, follows 3; its input, 5, has 4 or 3."""
    space = space_of(TABLES[which])
    assert space.genes == genes
    for gene in genes:
        tied = next((g for g in TABLES[which].tied_groups if gene in g), (gene,))
        assert np.flatnonzero(space.followers(gene).ravel()).tolist() == list(tied)
        columns = {entry % 2 for entry in tied}
        assert space.column(gene) == (spaces.WEIGHTS if 0 in columns else spaces.ACTS)


@pytest.mark.parametrize("which", TABLES)
def test_the_space_is_all_that_rules_ties_and_mask_allow(which):
    """By walking from the largest state over neighbors."""
    table = TABLES[which]
    mask = table.mask.copy()
    mask[4, 1, table.candidates.index(2)] = False  # follows in two of the tables
    space = space_of(table, mask)
    start = space.largest()
    seen, front = {start.tobytes()}, [start]
    while front:
        found = [state for one in front for state in space.neighbors(one)]
        front = [state for state in found if state.tobytes() not in seen]
        front = list({state.tobytes(): state for state in front}.values())
        seen |= {state.tobytes() for state in front}
    wanted = states_of(all_bits(table, mask))
    assert seen == {state.tobytes() for state in wanted}
    generator = np.random.default_rng(0)
    drawn = {space.drawn(generator).tobytes() for _ in range(12 * len(wanted))}
    assert drawn <= seen and len(drawn) > 0.99 * len(seen)


def test_draws_are_uniform_by_gene():
    space, generator = space_of(TABLES["groups"]), np.random.default_rng(1)
    drawn = BITS[np.array([space.drawn(generator) for _ in range(3000)])]
    for column, bits in [((1, 0), (4, 3, 2)), ((1, 1), (4, 2)), ((2, 1), (4, 3))]:
        for one in bits:
            share = np.mean(drawn[:, column[0], column[1]] == one)
            assert abs(share - 1 / len(bits)) < 4.5 * math.sqrt(0.25 / 3000)


def test_neighbors_are_one_choice_away_and_skip_what_is_masked():
    mask = FREE.mask.copy()
    mask[1, 0, FREE.candidates.index(3)] = False
    space = space_of(FREE, mask)
    state = states_of([[8, 8], [4, 3], [2, 4], [3, 4], [2, 2]])
    found = {tuple(BITS[one].ravel().tolist()) for one in space.neighbors(state)}
    assert len(space.neighbors(state)) == len(found)
    rows = [
        [8, 8, 2, 3, 2, 4, 3, 4, 2, 2],
        [8, 8, 4, 4, 2, 4, 3, 4, 2, 2],
        [8, 8, 4, 2, 2, 4, 3, 4, 2, 2],
        [8, 8, 4, 3, 4, 4, 3, 4, 2, 2],
        [8, 8, 4, 3, 2, 3, 3, 4, 2, 2],
        [8, 8, 4, 3, 2, 4, 4, 4, 2, 2],
        [8, 8, 4, 3, 2, 4, 2, 4, 2, 2],
        [8, 8, 4, 3, 2, 4, 3, 4, 3, 2],
        [8, 8, 4, 3, 2, 4, 3, 4, 2, 3],
    ]
    assert found == {tuple(row) for row in rows}
    assert len(space.neighbors(state, [2, 6])) == 3
    assert space.neighbors(state, []).shape == (0, 5, 2)


def test_tied_entries_move_together():
    space = space_of(TABLES["groups"])
    state = space.largest()
    moved = space.moved(state, 2, FREE.candidates.index(2))
    assert np.argwhere(moved != state).tolist() == [[1, 0], [4, 1]]
    assert space.change(state, moved) == "first weights 2"
    assert space.differing(state, moved) == [2]
    assert space.change(moved, space.moved(moved, 5, 2)) == "mixed acts 3"
    both = space.moved(moved, 3, 3)
    assert space.change(state, both) == "first weights 2, first acts 2"


@pytest.mark.parametrize(
    ("wanted", "bits"),
    [
        (8, [[8, 8], [4, 4], [4, 4], [4, 4], [4, 4]]),
        (3, [[8, 8], [3, 3], [4, 3], [3, 4], [3, 3]]),  # of 4 and 2 the higher
        (1, [[8, 8], [2, 2], [2, 3], [2, 4], [2, 2]]),
    ],
)
def test_uniform_takes_the_nearest_allowed_bits(wanted, bits):
    space = space_of(FREE)
    assert BITS[space.uniform(wanted)].tolist() == bits
    np.testing.assert_array_equal(BITS[space.largest()], bits_of(FREE.max_config))
    for which in ("tied", "groups"):
        config = space_of(TABLES[which]).uniform(wanted)
        TABLES[which].check(space.config(config))


def test_states_and_configurations_are_each_other():
    space = space_of(FREE)
    bits = all_bits(FREE)
    config = space.config(states_of(bits))
    assert config.weights.dtype == config.acts.dtype == jnp.int32
    np.testing.assert_array_equal(bits_of(config), bits)
    for one in (0, 100, 971):
        single = BitConfig(config.weights[one], config.acts[one])
        np.testing.assert_array_equal(space.state_of(single), states_of(bits[one]))


@pytest.mark.parametrize("kind", ["bitops", "bytes", "act_bytes"])
def test_costs_are_sums_over_layers(kind):
    bits = all_bits(FREE)
    found = spaces.cost_of(cost_table(FREE, kind), states_of(bits))
    np.testing.assert_allclose(found, billed(FREE, bits, kind), rtol=1e-12)  # sums


def test_excess_is_the_relative_sum_over_limits():
    bits = all_bits(FREE)
    states = states_of(bits)
    limits = (
        limit(FREE, 4.5e5),
        limit(FREE, 1250, "bytes", at_least=1000),
        limit(FREE, np.inf, "act_bytes", at_least=230.0),
    )
    found = spaces.excess(budget("all", *limits), states)
    bitops, size, acts = (billed(FREE, bits, one.name) for one in limits)
    wanted = np.maximum(bitops - 4.5e5, 0) / 4.5e5 + np.maximum(size - 1250, 0) / 1250
    wanted += np.maximum(1000 - size, 0) / 1250
    within = (bitops <= 4.5e5) & (size <= 1250) & (size >= 1000) & (acts >= 230)
    assert 0 < within.sum() < len(bits)
    np.testing.assert_array_equal(found == 0, within)
    fine = acts >= 230
    np.testing.assert_allclose(found[fine], wanted[fine], rtol=1e-9, atol=1e-15)
    single = spaces.excess(budget("all", *limits), states[7])
    assert single == found[7]
    priced = spaces.price(budget("all", *limits), states)
    np.testing.assert_allclose(priced, bitops / 4.5e5, rtol=1e-12)


@pytest.mark.parametrize("most", [1e9, math.inf])
def test_what_costs_infinity_is_beyond_every_limit(most):
    cost = cost_table(FREE)
    cost[1, FREE.candidates.index(3)] = np.inf
    bits = all_bits(FREE)
    found = spaces.excess(budget("any", Limit("holes", cost, most)), states_of(bits))
    np.testing.assert_array_equal(found > 0, bits[:, 1, 0] == 3)


@pytest.mark.parametrize("sign", [1, -1])
def test_limits_are_kept_to_their_tolerance(sign):
    state = space_of(FREE).largest()[None]
    total = billed(FREE, all_bits(FREE)).max()
    for relative, kept in [(0.0, True), (0.9e-6, True), (1.1e-6, False)]:
        edge = total / (1 + sign * relative)
        one = limit(FREE, edge) if sign > 0 else limit(FREE, 1e9, at_least=edge)
        assert bool(spaces.excess(budget("edge", one), state)[0] == 0) is kept
        low, high = one.bounds
        assert bool(low <= total <= high) is kept


def test_scores_that_are_no_numbers_are_infinitely_bad():
    space, states = space_of(FREE), space_of(FREE).neighbors(space_of(FREE).largest())[:5]

    def score(configs, key):
        assert configs.weights.shape == (5, 5) and key is KEY
        return jnp.array([1.5, jnp.nan, jnp.inf, -jnp.inf, 2.0])

    found = spaces.scored(score, space, states, KEY)
    assert found.dtype == np.float64 and found.tolist() == [1.5, np.inf, np.inf, np.inf, 2.0]


def test_budgets_are_met_from_the_largest_and_answered_in_their_order():
    budgets = [budget(str(most), limit(FREE, most)) for most in (3, 9, 1, 9.5)]
    assert [one.name for one in spaces.tightest_last(budgets)] == ["9.5", "9", "3", "1"]
    state = space_of(FREE).largest()
    found = {one.name: spaces.result(space_of(FREE), one, state, 0.5) for one in budgets[::-1]}
    assert [one.budget for one in spaces.in_order(budgets, found)] == ["3", "9", "1", "9.5"]
    assert found["3"].costs == {"bitops": 544000.0} and found["3"].score == 0.5


def test_keys_are_different_and_repeatable():
    one, other = (
        [jax.random.key_data(k).tolist() for k, _ in zip(spaces.keys(KEY), range(9), strict=False)]
        for _ in range(2)
    )
    assert one == other and len({tuple(k) for k in one}) == 9


def test_a_mask_that_leaves_nothing_to_tied_layers_is_refused():
    table = LayerTable((layer("a", (4, 2), (4,)), layer("b", (4, 2), (4,))), tied_groups=((0, 2),))
    mask = table.mask.copy()
    mask[0, 0, 0] = mask[1, 0, 1] = False
    with pytest.raises(ValueError, match="leaves no bits to a, b"):
        space_of(table, mask)

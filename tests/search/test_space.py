import math

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.search_problems import FREE, TABLES, all_bits, bits_of, layer

from mpq_jax.search.space import ACTS, WEIGHTS, SearchSpace
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable

BITS = np.array(FREE.candidates)


def choices_of(bits):
    return (np.asarray(bits)[..., None] == BITS).argmax(-1)


@pytest.mark.parametrize(
    ("which", "variables"),
    [
        ("free", [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (4, 0), (4, 1)]),
        ("tied", [(1, 0), (3, 0), (4, 0)]),
        ("groups", [(1, 0), (1, 1), (2, 1), (3, 0)]),
    ],
)
def test_variables_are_entries_that_can_be_set_by_themselves(which, variables):
    """The weights of mixed follow the input of first in "groups"; its own input has 4 or 3."""
    table = TABLES[which]
    space = SearchSpace(table)
    assert space.variables == variables
    for index, column in variables:
        entry = 2 * index + column
        tied = next((group for group in table.tied_groups if entry in group), (entry,))
        assert np.flatnonzero(space.members((index, column)).ravel()).tolist() == list(tied)
        has_weights = any(member % 2 == 0 for member in tied)
        assert space.column((index, column)) == (WEIGHTS if has_weights else ACTS)


@pytest.mark.slow
@pytest.mark.parametrize("which", TABLES)
def test_the_space_is_all_that_rules_ties_and_mask_allow(which):
    """By walking from the largest state over neighbors."""
    table = TABLES[which]
    mask = table.mask.copy()
    mask[4, 1, table.candidates.index(2)] = False  # follows in two of the tables
    space = SearchSpace(table, mask)
    start = space.max_choices()
    seen, front = {start.tobytes()}, [start]
    while front:
        found = [state for one in front for state in space.neighbors(one)]
        front = [state for state in found if state.tobytes() not in seen]
        front = list({state.tobytes(): state for state in front}.values())
        seen |= {state.tobytes() for state in front}
    wanted = choices_of(all_bits(table, mask))
    assert seen == {state.tobytes() for state in wanted}
    generator = np.random.default_rng(0)
    drawn = {space.sample(generator).tobytes() for _ in range(12 * len(wanted))}
    assert drawn <= seen and len(drawn) > 0.99 * len(seen)


def test_samples_are_uniform_by_variable():
    space, generator = SearchSpace(TABLES["groups"]), np.random.default_rng(1)
    drawn = BITS[np.array([space.sample(generator) for _ in range(3000)])]
    for column, bits in [((1, 0), (4, 3, 2)), ((1, 1), (4, 2)), ((2, 1), (4, 3))]:
        for one in bits:
            share = np.mean(drawn[:, column[0], column[1]] == one)
            assert abs(share - 1 / len(bits)) < 4.5 * math.sqrt(0.25 / 3000)


def test_neighbors_are_one_choice_away_and_skip_what_is_masked():
    mask = FREE.mask.copy()
    mask[1, 0, FREE.candidates.index(3)] = False
    space = SearchSpace(FREE, mask)
    state = choices_of([[8, 8], [4, 3], [2, 4], [3, 4], [2, 2]])
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
    assert len(space.neighbors(state, [(1, 0), (3, 0)])) == 3
    assert space.neighbors(state, []).shape == (0, 5, 2)


def test_tied_entries_move_together():
    space = SearchSpace(TABLES["groups"])
    state = space.max_choices()
    moved = space.with_choice(state, (1, 0), FREE.candidates.index(2))
    assert np.argwhere(moved != state).tolist() == [[1, 0], [4, 1]]
    assert space.describe_change(state, moved) == "first weights 2"
    assert space.changed(state, moved) == [(1, 0)]
    assert space.describe_change(moved, space.with_choice(moved, (2, 1), 2)) == "mixed acts 3"
    both = space.with_choice(moved, (1, 1), 3)
    assert space.describe_change(state, both) == "first weights 2, first acts 2"


@pytest.mark.parametrize(
    ("wanted", "bits"),
    [
        (8, [[8, 8], [4, 4], [4, 4], [4, 4], [4, 4]]),
        (3, [[8, 8], [3, 3], [4, 3], [3, 4], [3, 3]]),  # of 4 and 2 the higher
        (1, [[8, 8], [2, 2], [2, 3], [2, 4], [2, 2]]),
    ],
)
def test_uniform_takes_the_nearest_allowed_bits(wanted, bits):
    space = SearchSpace(FREE)
    assert BITS[space.uniform(wanted)].tolist() == bits
    np.testing.assert_array_equal(BITS[space.max_choices()], bits_of(FREE.max_config))
    for which in ("tied", "groups"):
        config = SearchSpace(TABLES[which]).uniform(wanted)
        TABLES[which].check(space.bits_of(config))


def test_choices_and_bits_are_each_other():
    space = SearchSpace(FREE)
    bits = all_bits(FREE)
    config = space.bits_of(choices_of(bits))
    assert config.weights.dtype == config.acts.dtype == jnp.int32
    np.testing.assert_array_equal(bits_of(config), bits)
    for one in (0, 100, 971):
        single = BitConfig(config.weights[one], config.acts[one])
        np.testing.assert_array_equal(space.choices_of(single), choices_of(bits[one]))


def test_a_mask_that_leaves_nothing_to_tied_layers_is_refused():
    table = LayerTable((layer("a", (4, 2), (4,)), layer("b", (4, 2), (4,))), tied_groups=((0, 2),))
    mask = table.mask.copy()
    mask[0, 0, 0] = mask[1, 0, 1] = False
    with pytest.raises(ValueError, match="leaves no bits to a, b"):
        SearchSpace(table, mask)


def test_a_mask_that_does_not_fit_or_leaves_nothing_is_refused():
    mask = FREE.mask.copy()
    mask[2, 1] = False
    with pytest.raises(ValueError, match="leaves no bits to mixed"):
        SearchSpace(FREE, mask)
    with pytest.raises(ValueError, match=r"shape \(4, 2, 4\); the table has \(5, 2, 4\)"):
        SearchSpace(FREE, mask[1:])

import dataclasses
import itertools
import re

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.search_problems import layer

from mpq_jax.supernet import costs
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.tied_layers import tie_acts_to_weights, tie_matching, tie_shared_inputs

TABLE = LayerTable(
    (
        layer("stem", (8,), (8,), macs=30, float_acts=True),
        layer("block0/conv", (8, 4, 2), (8, 4, 2), macs=11, params=7, inputs=6),
        layer("block0/side", (8, 4), (4, 2), macs=17, params=3, inputs=6, shares_input_with=1),
        layer("block1/conv", (4, 2), (4,), macs=23, params=5, inputs=9),
        layer("block1/side", (2,), (8, 4), macs=5, params=2, inputs=9, shares_input_with=3),
        layer("head", (8, 4, 2), (4, 2), macs=3, params=13, inputs=2),
    )
)
PLACE = TABLE.candidates.index


def bits_of(table):
    """What the mask leaves: {(layer, kind): bits}."""
    return {
        (index, kind): tuple(np.array(table.candidates)[table.mask[index, kind]].tolist())
        for index, kind in itertools.product(range(len(table)), range(2))
    }


def test_inputs_follow_weights_where_both_have_a_choice():
    table = tie_acts_to_weights(TABLE)
    assert table.tied_groups == ((2, 3), (4, 5), (10, 11))
    assert table.layers == TABLE.layers and not TABLE.tied_groups  # nothing edited
    assert bits_of(table) == bits_of(TABLE) | {
        (2, 0): (4,),
        (2, 1): (4,),
        (5, 0): (4, 2),
    }
    assert tie_acts_to_weights(table) == table


@pytest.mark.parametrize("kind", ["bitops", "bytes", "act_bytes"])
def test_costs_of_tied_layers_are_those_of_equal_bits(kind):
    table = tie_acts_to_weights(TABLE)
    cost = costs.cost_table(table, kind)
    for index in range(len(TABLE)):
        pairs = {
            (table.candidates[w], table.candidates[a])
            for w, a in np.argwhere(np.isfinite(cost[index]))
        }
        assert (
            pairs
            == {
                0: {(8, 8)},
                1: {(8, 8), (4, 4), (2, 2)},
                2: {(4, 4)},
                3: {(4, 4), (2, 4)},
                4: {(2, 8), (2, 4)},
                5: {(4, 4), (2, 2)},
            }[index]
        )
        np.testing.assert_array_equal(
            cost[index][np.isfinite(cost[index])],
            costs.cost_table(TABLE, kind)[index][np.isfinite(cost[index])],
        )


def test_layers_of_a_pattern_share_weight_bits_and_input_bits():
    table = tie_matching(TABLE, ["conv|head", "side$"])
    # Of the convolutions one input is fixed, of the side layers one kernel.
    assert table.tied_groups == ((2, 6, 10), (3, 11), (5, 9))
    left = bits_of(table)
    assert left[1, 0] == left[3, 0] == left[5, 0] == (4, 2)
    assert left[1, 1] == left[5, 1] == (4, 2)
    assert left[2, 1] == left[4, 1] == (4,)
    assert left[2, 0] == (8, 4) and left[3, 1] == (4,)


def test_groups_that_meet_become_one():
    table = tie_matching(TABLE, ["block0", "conv", "head|block1/conv"])
    assert table.tied_groups == ((2, 4, 6, 10), (3, 5))
    both = tie_acts_to_weights(table)
    assert both.tied_groups == ((2, 3, 4, 5, 6, 10, 11),)
    assert both.group_leaders.ravel().tolist() == [0, 1, 2, 2, 2, 2, 2, 7, 8, 9, 2, 2]
    assert bits_of(both)[1, 0] == (4,)


def test_readers_of_one_array_share_its_bits():
    assert tie_shared_inputs(TABLE).tied_groups == ((3, 5),)  # of block1 only one has a choice
    assert tie_acts_to_weights(tie_shared_inputs(TABLE)).tied_groups == ((2, 3, 4, 5), (10, 11))
    alone = LayerTable(TABLE.layers[:2])
    assert tie_shared_inputs(alone) == alone


def test_configurations_follow_the_first_of_each_group():
    table = dataclasses.replace(TABLE, tied_groups=((2, 5), (3, 10)))
    assert TABLE.apply_ties(TABLE.max_config) is not None
    rows = np.arange(24, dtype=np.int32).reshape(2, 12)
    wanted = rows.copy()
    wanted[:, 5], wanted[:, 10] = rows[:, 2], rows[:, 3]
    for many in (rows, rows[0]):
        found = table.apply_ties(BitConfig(jnp.asarray(many[..., ::2]), many[..., 1::2]))
        expected = wanted if many.ndim == 2 else wanted[0]
        np.testing.assert_array_equal(found.weights, expected[..., ::2])
        np.testing.assert_array_equal(found.acts, expected[..., 1::2])


@pytest.mark.parametrize(
    ("tie", "message"),
    [
        (lambda table: tie_matching(table, ["("]), "'\\(' is not a regular expression"),
        (lambda table: tie_matching(table, ["head"]), "'head' matches 1 layers and ties none"),
        (lambda table: tie_matching(table, ["conv", "x"]), "'x' matches 0 layers .*block0/conv"),
        (lambda table: tie_matching(table, ["block1"]), "'block1' matches 2 layers and ties none"),
    ],
)
def test_patterns_that_tie_nothing_are_refused(tie, message):
    with pytest.raises(ValueError, match=message):
        tie(TABLE)


def test_entries_without_common_bits_are_named():
    layers = (
        layer("fine", (4, 2), (4, 2)),
        layer("apart", (6, 4), (3, 2), shares_input_with=0),
        layer("third", (6, 2), (8, 6), shares_input_with=0),
    )
    table = LayerTable(layers)
    message = "weights of apart (6, 4); acts of apart (3, 2)"
    with pytest.raises(ValueError, match="no candidate in common: " + re.escape(message)):
        tie_acts_to_weights(table)
    message = "acts of fine (4, 2); acts of apart (3, 2); acts of third (8, 6)"
    with pytest.raises(ValueError, match=re.escape(message)):
        tie_shared_inputs(table)
    with pytest.raises(ValueError, match="no candidate in common: weights of fine"):
        tie_matching(table, ["."])  # each two have some, not all three

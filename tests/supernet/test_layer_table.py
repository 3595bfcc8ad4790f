"""Tables of layers: uniform bits, checks, norm rows and ties."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.traced_models import Separable, make_table

from mpq_jax.supernet import costs
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import FIRST_LAST, FIRST_LAST_8BIT, FIRST_LAST_FLOAT, Rule, bit_rules


@pytest.fixture(scope="module")
def table():
    return make_table()


def test_candidates_and_mask(table):
    assert table.candidates == (8, 6, 4, 2)
    assert table.bank_bits == (6, 4, 2)
    fixed, depthwise, free = [1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]
    rows = [fixed, depthwise, free, free, free, fixed]
    np.testing.assert_array_equal(
        table.mask, np.array([[row, row] for row in rows], bool), strict=True
    )
    np.testing.assert_array_equal(table.searchable, [False, True, True, True, True, False])
    assert table.searchable_norms == {"body/spatial_norm": 1, "body/mix_norm": 2}
    assert table.bank_norms == table.searchable_norms
    assert table.with_bn_banks("shared").bank_norms == {}
    assert table.with_bn_banks("shared").searchable_norms == table.searchable_norms
    # Of layers with a choice and no norm of their own, their outputs.
    assert table.features == table.searchable_norms | {"body/gate": 3, "grouped": 4}


def test_uniform_keeps_fixed_layers_and_lifts_what_a_layer_lacks(table):
    bits = table.uniform(2, 4)
    np.testing.assert_array_equal(bits.weights, np.array([8, 4, 2, 2, 2, 8], np.int32), strict=True)
    np.testing.assert_array_equal(bits.acts, np.array([8, 4, 4, 4, 4, 8], np.int32), strict=True)
    table.check(bits)


@pytest.mark.parametrize(("weights", "acts", "kind"), [(3, 4, "weights is 3"), (4, 8, "acts is 8")])
def test_uniform_bits_that_no_layer_has_are_refused(table, weights, acts, kind):
    with pytest.raises(ValueError, match=rf"{kind}; the candidates are \(6, 4, 2\)"):
        table.uniform(weights, acts)


def changed(table, kind, layer, value):
    bits = table.uniform(4, 4)
    return bits._replace(**{kind: getattr(bits, kind).at[layer].set(value)})


@pytest.mark.parametrize(
    ("kind", "layer", "value", "message"),
    [
        ("weights", 0, 4, r"weights of 'stem' are 4; allowed: \(8,\)"),
        ("acts", 1, 2, r"acts of 'body/spatial' are 2; allowed: \(6, 4\)"),
        ("weights", 2, 8, "weights of 'body/mix' are 8"),
    ],
)
def test_check_names_the_layer_that_is_wrong(table, kind, layer, value, message):
    with pytest.raises(ValueError, match=message):
        table.check(changed(table, kind, layer, value))


def test_check_refuses_another_number_of_layers(table):
    short = BitConfig(jnp.array([4, 4]), jnp.array([4, 4]))
    with pytest.raises(ValueError, match=r"weights have shape \(2,\).*each of the 6 layers"):
        table.check(short)


def test_table_is_a_static_argument(table):
    again = trace_layers(Separable(), (16, 16, 3), rules=bit_rules((6, 4, 2), depthwise_min_bits=3))
    other = trace_layers(Separable(), (16, 16, 3), rules=FIRST_LAST_8BIT)
    assert again == table and hash(again) == hash(table)
    assert other != table
    traces = []

    @jax.jit(static_argnames="table")
    def double(bits, table):
        traces.append(len(table))
        return 2 * bits.weights

    for used in (table, again, other):
        double(used.uniform(4, 4), used)
    assert len(traces) == 2


# Norm rows.


@pytest.mark.parametrize(
    ("bn_banks", "axes"),
    [
        ("shared", ()),
        ("weights", ("weights",)),
        ("pair", ("weights", "acts")),
        ("transition", ("weights", "previous")),
    ],
)
def test_norm_rows_by_name(table, bn_banks, axes):
    other = table.with_bn_banks(bn_banks)
    assert other.bank_axes == axes
    assert other.layers == table.layers
    assert other.bank_norms == (table.searchable_norms if axes else {})
    assert (other == table) == (bn_banks == table.bn_banks == "pair")
    assert other.with_bn_banks("pair") == table


def test_unknown_norm_rows_are_refused(table):
    with pytest.raises(
        ValueError, match=r"bn_banks is 'bits'; wanted one of .*'transition', 'weights'"
    ):
        table.with_bn_banks("bits")


def test_largest():
    rules = [
        Rule("body", weights=(3, 5), acts=(2, 7, 4)),
        Rule("grouped", weights=2, acts=(4, 3)),
        *FIRST_LAST_FLOAT,
    ]
    table = trace_layers(Separable(), (16, 16, 3), rules=rules)
    bits = table.max_config
    np.testing.assert_array_equal(bits.weights, np.int32([32, 5, 5, 5, 2, 32]), strict=True)
    np.testing.assert_array_equal(bits.acts, np.int32([32, 7, 7, 7, 4, 32]), strict=True)
    table.check(bits)


@pytest.mark.parametrize("ends", FIRST_LAST)
def test_mean_bits_are_those_of_the_layers_with_a_choice(ends):
    rules = bit_rules((6, 4, 2), first_last=FIRST_LAST[ends])
    table = trace_layers(Separable(), (16, 16, 3), rules=rules)
    config = table.uniform(4, 2)._replace(weights=table.uniform(4, 2).weights.at[1].set(6))
    chosen, bits = table.layers[1:-1], [6, 4, 4, 4]
    if ends == "same":
        chosen, bits = table.layers, [4, 6, 4, 4, 4, 4]
    assert costs.mean_bits(table, config, by="layer") == np.float32(np.mean(bits))
    wanted = np.average(bits, weights=[layer.params for layer in chosen])
    np.testing.assert_allclose(costs.mean_bits(table, config, by="param"), wanted, rtol=1e-6)


def tied_table():
    """Weights of one with the input of another; both of a third; a fixed stem."""
    rules = [
        Rule("stem", weights=8, acts=8),
        Rule("spatial", weights=(8, 4, 2), acts=(8, 4)),
        Rule("mix", weights=(6, 4), acts=(4, 2)),
        Rule("grouped", weights=(8, 4, 2), acts=(4, 2)),
        Rule(weights=(8, 6), acts=(8, 6)),
    ]
    table = trace_layers(Separable(), (9, 9, 2), rules=rules)
    assert table.tied_groups == () and table.names[1:3] == ("body/spatial", "body/mix")
    return dataclasses.replace(table, tied_groups=((2, 5), (8, 9)))


def test_tied_entries_have_the_bits_that_all_of_them_may_take():
    table = tied_table()
    bits = np.array(table.candidates)
    free = dataclasses.replace(table, tied_groups=())
    np.testing.assert_array_equal(
        table.group_leaders, [[0, 1], [2, 3], [4, 2], [6, 7], [8, 8], [10, 11]]
    )
    np.testing.assert_array_equal(free.group_leaders.ravel(), np.arange(12))
    common = {(1, 0): [4, 2], (2, 1): [4, 2], (4, 0): [4, 2], (4, 1): [4, 2]}
    for index, kind in np.ndindex(6, 2):
        allowed = (table.layers[index].weight_candidates, table.layers[index].act_candidates)[kind]
        assert table.candidates_of(2 * index + kind) == allowed
        assert bits[free.mask[index, kind]].tolist() == list(allowed)
        wanted = common.get((index, kind), list(allowed))
        assert bits[table.mask[index, kind]].tolist() == wanted
    assert table != free and hash(table) != hash(free)
    assert table.with_bn_banks("weights").tied_groups == table.tied_groups


@pytest.mark.parametrize("weights", [8, 6, 4, 2])
@pytest.mark.parametrize("acts", [8, 2])
def test_uniform_and_largest_bits_honor_ties(weights, acts):
    table = tied_table()
    table.check(table.max_config)
    found = table.uniform(weights, acts)
    table.check(found)
    free = dataclasses.replace(table, tied_groups=()).uniform(weights, acts)
    followed = [{8: 4, 6: 4}.get(weights, weights)] * 2
    np.testing.assert_array_equal(found.weights[jnp.array([1, 4])], followed)
    np.testing.assert_array_equal(
        found.weights[jnp.array([0, 2, 3, 5])], free.weights[jnp.array([0, 2, 3, 5])]
    )
    np.testing.assert_array_equal(
        found.acts[jnp.array([0, 1, 3, 5])], free.acts[jnp.array([0, 1, 3, 5])]
    )
    np.testing.assert_array_equal(table.apply_ties(found).acts, found.acts)


def test_check_names_tied_bits_that_differ():
    table = tied_table()
    bits = table.max_config
    wrong = BitConfig(bits.weights.at[1].set(2), bits.acts)
    dataclasses.replace(table, tied_groups=()).check(wrong)
    message = r"tied bits differ: weights of body/spatial \(2\), acts of body/mix \(4\)"
    with pytest.raises(ValueError, match=message):
        table.check(wrong)
    free = dataclasses.replace(table, tied_groups=())
    assert free.apply_ties(wrong) is wrong

"""Products of activations in CSQ."""

import jax
import numpy as np
import pytest
from helpers.attention import IMAGES, SCORES, SHAPE
from helpers.attention_training import CHOICE, FIXED, MODEL, RUN, one_step, places_of, table_of
from helpers.random_variables import drawn_variables

from mpq_jax.methods import csq
from mpq_jax.methods.csq.network import with_planes
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import Rule


def product_of(table, name=SCORES):
    return table.layers[table.names.index(name)]


def test_operands_with_a_choice_are_inputs_to_csq():
    grown = product_of(with_planes(table_of(CHOICE), act_bits=5, float_acts=False))
    assert (grown.weight_candidates, grown.act_candidates) == ((5,), (5,))
    assert not grown.float_weights and not grown.float_acts
    grown = product_of(with_planes(table_of(CHOICE), act_bits=32, float_acts=True))
    assert (grown.weight_candidates, grown.act_candidates) == ((32,), (32,))
    assert grown.float_weights and grown.float_acts


@pytest.mark.parametrize(("act_bits", "float_acts"), [(5, False), (32, True)])
def test_operands_that_a_rule_fixes_keep_their_bits_in_csq(act_bits, float_acts):
    table = table_of(FIXED)
    grown = with_planes(table, act_bits=act_bits, float_acts=float_acts)
    assert product_of(grown) == product_of(table)
    mixed = table_of(Rule(kind="product", weights=8, acts=(4, 2)))
    one = product_of(with_planes(mixed, act_bits=act_bits, float_acts=float_acts))
    assert (one.weight_candidates, one.float_weights) == ((8,), False)
    assert (one.act_candidates, one.float_acts) == ((act_bits,), float_acts)


def test_products_alone_grow_no_scheme():
    table = trace_layers(MODEL, SHAPE, rules=[CHOICE, Rule(weights=8, acts=8)])
    with pytest.raises(ValueError, match="weights of no layer have a choice of bits"):
        with_planes(table, act_bits=4, float_acts=False)


@pytest.mark.slow
def test_csq_trains_products_and_hands_them_on():
    options = csq.Options(act_bits=4, target=3.0, least_planes=1, step_learning_rate=0.01)
    method = csq.FAMILY.make(MODEL, table_of(CHOICE, candidates=(4, 2)), options, RUN)
    before, after, state = one_step(method, drawn_variables(MODEL, SHAPE, 0))
    places = places_of(method.table)
    for old, new in zip(before, after, strict=True):
        moved = (old != new)[places]
        np.testing.assert_array_equal(moved.sum(axis=1), [1, 1])
        np.testing.assert_array_equal(moved.any(axis=0), moved.all(axis=0))
    held = method.variables(state)
    scheme = method.scheme(held)
    bits = scheme.bits["integers"]
    for place in places:
        assert (bits.weights[place], bits.acts[place]) == (4, 4)
    hard = jax.jit(lambda held: method.predict(held, method.eval_bits["hard"], IMAGES))
    found = scheme.net.predict(scheme.state, bits, IMAGES)
    assert np.ptp(found) > 0.1
    np.testing.assert_allclose(found, hard(held), rtol=1e-5, atol=1e-5)  # two programs

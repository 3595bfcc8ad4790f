"""Searches over the bits of products of activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.attention import IMAGES, LABELS, SHAPE, TinyVit
from helpers.random_variables import drawn_variables

import mpq_jax as mpq
from mpq_jax.quantizers import lsq
from mpq_jax.search import objectives
from mpq_jax.search.prefix_scoring import make_prefix_score, shared_work
from mpq_jax.search.segments import find_segments
from mpq_jax.supernet import costs
from mpq_jax.supernet.bits import sample
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import Rule, bit_rules
from mpq_jax.supernet.scoring import make_score
from mpq_jax.supernet.supernet import Supernet
from mpq_jax.supernet.tied_layers import tie_acts_to_weights

MODEL = TinyVit(depth=2)
CHOICES = Rule(kind="product", weights=(8, 4, 2), acts=(8, 4, 2))
TABLE = trace_layers(MODEL, SHAPE, rules=[CHOICES, *bit_rules((8, 4, 2))])
NET = Supernet(MODEL, TABLE, quantizer=lsq.QUANTIZER)
PLACES = [index for index, layer in enumerate(TABLE.layers) if layer.is_product]


@pytest.fixture(scope="module")
def state():
    variables = drawn_variables(MODEL, SHAPE, 0)
    return jax.jit(Supernet.init, static_argnums=0)(NET, variables, IMAGES)


def parts_of(table):
    cut = find_segments(Supernet(MODEL, table, quantizer=lsq.QUANTIZER), SHAPE, train=False)
    return [{table.names[index] for index in part.layers} for part in cut.parts]


def test_products_belong_to_the_segment_of_their_block():
    first, second = parts_of(TABLE)
    for block, part in (("block0", first), ("block1", second)):
        inside = {name for name in TABLE.names if name.startswith(block)}
        assert {f"{block}/product", f"{block}/product#2"} <= inside <= part
    assert first | second == set(TABLE.names) and not first & second


def test_products_alone_make_segments():
    alone = trace_layers(MODEL, SHAPE, rules=[CHOICES, Rule(weights=8, acts=8)])
    first, second = parts_of(alone)
    assert {"block0/product", "block0/product#2"} <= first
    assert {"block1/product", "block1/product#2"} <= second


@pytest.mark.slow
def test_scores_of_shared_prefixes_are_those_of_one_by_one(state):
    """Most of the configurations differ in the bits of a product alone."""
    keys = jax.random.split(jax.random.key(0), 3)
    drawn = jax.vmap(lambda key: sample(key, TABLE.candidates, TABLE.mask))(keys)
    most = TABLE.max_config
    fewer = [
        most._replace(**{kind: getattr(most, kind).at[place].set(2)})
        for place in PLACES
        for kind in ("weights", "acts")
    ]
    configs = jax.tree.map(
        lambda some, *leaves: jnp.concatenate([some, jnp.stack(leaves)]), drawn, most, *fewer
    )
    one_by_one = make_score(NET, state, metric="kl")(configs, IMAGES, LABELS)
    cut = find_segments(NET, SHAPE, train=False)
    assert shared_work(TABLE, cut, configs) < 0.9
    found = make_prefix_score(NET, state, cut, metric="kl")(configs, IMAGES, LABELS)
    np.testing.assert_allclose(found, one_by_one, rtol=1e-4, atol=1e-6)  # sums in another order
    different = np.unique(np.asarray(one_by_one).round(7))
    assert len(different) == len(one_by_one), "some bits of products change nothing"


@pytest.mark.slow
def test_a_search_chooses_the_bits_of_products(state):
    cost = costs.cost_table(TABLE, "bitops")
    limit = costs.total(TABLE, cost, TABLE.uniform(4, 4))
    report = mpq.search(
        NET,
        state,
        IMAGES,
        LABELS,
        budgets=(limit,),
        cost="bitops",
        strategy="random",
        strategy_options={"samples": 8},
    )
    (found,) = [one for one in report.configs if one.group != "uniform"]
    TABLE.check(found.bits)
    assert costs.total(TABLE, cost, found.bits) <= limit
    of_products = report.sensitivity[PLACES]
    assert np.isfinite(of_products).all()
    np.testing.assert_allclose(of_products[..., 0], 0, atol=1e-6)  # the largest bits themselves
    assert (np.abs(of_products[..., -1]) > 1e-6).all(), "2 bits of an operand change nothing"


@pytest.mark.slow
def test_limits_of_all_that_is_stored_are_met(state):
    everything = costs.total(TABLE, costs.cost_table(TABLE, "stored_bytes"), TABLE.uniform(4, 4))
    report = mpq.search(
        NET,
        state,
        IMAGES,
        LABELS,
        budgets=(everything,),
        cost="stored_bytes",
        strategy="random",
        strategy_options={"samples": 8},
        sensitivity=False,
    )
    (found,) = [one for one in report.configs if one.group != "uniform"]
    stored = float(costs.model_bytes(TABLE, found.bits, count_float=True))
    assert stored == found.costs["stored_bytes"] <= everything
    kernels = float(costs.model_bytes(TABLE, found.bits))
    assert stored - kernels == costs.float_bytes(TABLE)


def test_a_budget_below_what_stays_float_is_refused(state):
    with pytest.raises(ValueError, match="budget"):
        mpq.search(
            NET,
            state,
            IMAGES,
            LABELS,
            budgets=(costs.float_bytes(TABLE),),
            cost="stored_bytes",
            strategy="random",
        )


def test_hessian_objectives_refuse_products_with_a_choice():
    tied = tie_acts_to_weights(TABLE)
    with pytest.raises(ValueError, match="'block0/product' is a product of activations with a"):
        objectives.check_inputs_are_determined(tied)
    fixed = trace_layers(
        MODEL, SHAPE, rules=[Rule(kind="product", weights=8, acts=8), *bit_rules((8, 4, 2))]
    )
    objectives.check_inputs_are_determined(tie_acts_to_weights(fixed))

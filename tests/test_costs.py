import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.bits import BitConfig, sample
from mpq_jax.costs import COSTS, bitops, cost_table, mean_bits, model_bytes
from mpq_jax.layer_table import bit_rules, trace_layers
from mpq_jax.models import make_model

GIGA, MIB = 1e9, 2**20


@pytest.fixture(scope="module")
def resnet18():
    return trace_layers(make_model("resnet18", num_classes=1000), (224, 224, 3))


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        x = nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise")(x)
        x = nn.Conv(16, (1, 1), name="mix")(x)
        return nn.Dense(3, name="head")(jnp.mean(x, axis=(1, 2)))


PARAMS = np.array([9 * 2 * 4, 9 * 4, 4 * 16, 16 * 3])
MACS = PARAMS * np.array([36, 36, 36, 1])
RULES = bit_rules((6, 4, 2), depthwise_min_bits=3)


@pytest.fixture(scope="module")
def small():
    return trace_layers(Small(), (6, 6, 2), rules=RULES)


@pytest.fixture(scope="module")
def configs(small):
    keys = jax.random.split(jax.random.key(0), 20)
    return jax.vmap(lambda key: sample(key, small.candidates, small.mask))(keys)


def each(configs):
    return [jax.tree.map(lambda leaf, i=i: leaf[i], configs) for i in range(20)]


@pytest.mark.parametrize(
    ("bits", "giga"), [(2, 14.368), (3, 22.846), (4, 34.714), (5, 49.974), (6, 68.625)]
)
def test_bitops_of_resnet18(resnet18, bits, giga):
    assert round(float(bitops(resnet18, resnet18.uniform(bits, bits))) / GIGA, 3) == giga


def test_bytes_of_resnet18_at_four_bits(resnet18):
    assert round(float(model_bytes(resnet18, resnet18.uniform(4, 6))) / MIB, 3) == 5.818


def test_costs_equal_sums_over_layers(small, configs):
    for config in each(configs):
        weights, acts = np.asarray(config.weights), np.asarray(config.acts)
        assert float(bitops(small, config)) == np.sum(MACS * weights * acts)  # exact below 2^24
        assert float(model_bytes(small, config)) == np.sum(PARAMS * weights) / 8
        searched = weights[1:3]  # stem and head are fixed
        np.testing.assert_allclose(
            mean_bits(small, config, by="layer"), searched.mean(), rtol=1e-6
        )  # a float32 quotient
        np.testing.assert_allclose(
            mean_bits(small, config, by="param"),
            np.average(searched, weights=PARAMS[1:3]),
            rtol=1e-6,
        )


@pytest.mark.parametrize(
    "cost",
    [
        bitops,
        model_bytes,
        lambda table, bits: mean_bits(table, bits, by="layer"),
        lambda table, bits: mean_bits(table, bits, by="param"),
    ],
)
def test_costs_map_over_configurations(small, configs, cost):
    mapped = jax.jit(jax.vmap(lambda bits: cost(small, bits)))(configs)
    assert mapped.shape == (20,)
    alone = np.array([cost(small, config) for config in each(configs)])
    np.testing.assert_allclose(mapped, alone, rtol=1e-6)  # jit divides by a constant otherwise


def test_mean_bits_of_uniform_bits(resnet18):
    for by in ("layer", "param"):
        assert mean_bits(resnet18, resnet18.uniform(3, 5), by=by) == 3


def test_mean_bits_by_something_else_is_refused(small):
    unchecked = inspect.unwrap(mean_bits)  # without the type checker of the tests
    with pytest.raises(ValueError, match='by is \'mac\'; wanted "layer" or "param"'):
        unchecked(small, small.uniform(4, 4), by="mac")


@pytest.mark.parametrize("kind", COSTS)
def test_cost_table_adds_up_to_the_cost(small, configs, kind):
    costs = cost_table(small, kind)
    assert (costs.shape, costs.dtype) == ((4, 4, 4), np.float64)
    place = {bits: index for index, bits in enumerate(small.candidates)}
    for config in each(configs):
        rows = zip(config.weights.tolist(), config.acts.tolist(), strict=True)
        total = sum(costs[layer, place[w], place[a]] for layer, (w, a) in enumerate(rows))
        assert total == float(COSTS[kind](small, config))


@pytest.mark.parametrize("kind", COSTS)
def test_what_the_table_forbids_costs_infinity(small, kind):
    costs = cost_table(small, kind)
    weights, acts = small.mask[:, 0], small.mask[:, 1]
    np.testing.assert_array_equal(np.isfinite(costs), weights[:, :, None] & acts[:, None, :])
    assert small.candidates == (8, 6, 4, 2)
    assert np.isinf(costs[1, 3]).all() and np.isinf(costs[0, 1]).all()
    assert (costs[np.isfinite(costs)] > 0).all()


def test_unknown_budget_is_refused_with_the_choices(small):
    with pytest.raises(ValueError, match=r"'flops'; known kinds are \['bitops', 'bytes'\]"):
        cost_table(small, "flops")


def test_a_float_input_is_billed_at_the_bits_of_its_rule(small):
    bits = BitConfig(jnp.array([8, 4, 2, 8]), jnp.array([8, 4, 2, 8]))
    assert small.layers[0].float_acts
    assert float(bitops(small, bits)) == MACS @ [64, 16, 4, 64]

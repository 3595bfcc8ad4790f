import dataclasses
import inspect
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.attention import PRODUCT_INPUTS, PRODUCT_MACS, SHAPE, TinyVit

from mpq_jax.models import make_model
from mpq_jax.supernet.bits import BitConfig, sample
from mpq_jax.supernet.costs import (
    COSTS,
    act_bytes,
    allowed_pairs,
    bitops,
    cost_table,
    float_bytes,
    latency_table,
    mean_bits,
    model_bytes,
    total,
)
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import Rule, bit_rules

GIGA, MIB = 1e9, 2**20


@pytest.fixture(scope="module")
def resnet18():
    return trace_layers(make_model("resnet18", num_classes=1000), (224, 224, 3))


@pytest.fixture(scope="module")
def mobilenet_v2():
    model = make_model("mobilenet_v2", num_classes=1000)
    return trace_layers(model, (224, 224, 3), rules=bit_rules((6, 5, 4, 3, 2)))


@pytest.fixture(scope="module")
def efficientnet_lite0():
    model = make_model("efficientnet_lite0", num_classes=1000)
    return trace_layers(model, (224, 224, 3), rules=bit_rules((6, 5, 4, 3, 2)))


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        x = nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise")(x)
        x = nn.Conv(16, (1, 1), name="mix")(x)
        return nn.Dense(3, name="head")(jnp.mean(x, axis=(1, 2)))


PARAMS = np.array([9 * 2 * 4, 9 * 4, 4 * 16, 16 * 3])
MACS = PARAMS * np.array([36, 36, 36, 1])
INPUTS = np.array([36 * 2, 36 * 4, 36 * 4, 16])
RULES = bit_rules((6, 4, 2), depthwise_min_bits=3)
THREE = [Rule("head", weights=(6, 5, 3), acts=(6, 3))]


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


@pytest.mark.parametrize(
    ("bits", "giga"), [(2, 1.930), (3, 3.373), (4, 5.394), (5, 7.992), (6, 11.167)]
)
def test_bitops_of_mobilenet_v2(mobilenet_v2, bits, giga):
    assert round(float(bitops(mobilenet_v2, mobilenet_v2.uniform(bits, bits))) / GIGA, 3) == giga


def test_bytes_and_macs_of_mobilenet_v2(mobilenet_v2):
    assert round(float(model_bytes(mobilenet_v2, mobilenet_v2.uniform(4, 6))) / MIB, 3) == 2.265
    macs = np.array([layer.macs for layer in mobilenet_v2.layers]) / 1e6
    chosen = mobilenet_v2.searchable
    assert (round(macs[chosen].sum(), 1), round(macs[~chosen].sum(), 1)) == (288.7, 12.1)


@pytest.mark.parametrize(
    ("bits", "giga"), [(2, 2.268), (3, 4.133), (4, 6.745), (5, 10.102), (6, 14.206)]
)
def test_bitops_of_efficientnet_lite0(efficientnet_lite0, bits, giga):
    uniform = efficientnet_lite0.uniform(bits, bits)
    assert round(float(bitops(efficientnet_lite0, uniform)) / GIGA, 3) == giga


def test_bytes_and_macs_of_efficientnet_lite0(efficientnet_lite0):
    uniform = efficientnet_lite0.uniform(4, 6)
    assert round(float(model_bytes(efficientnet_lite0, uniform)) / MIB, 3) == 2.809
    macs = np.array([layer.macs for layer in efficientnet_lite0.layers]) / 1e6
    chosen = efficientnet_lite0.searchable
    assert chosen.sum() == 48
    assert (round(macs[chosen].sum(), 1), round(macs[~chosen].sum(), 1)) == (373.1, 12.1)


def test_costs_equal_sums_over_layers(small, configs):
    for config in each(configs):
        weights, acts = np.asarray(config.weights), np.asarray(config.acts)
        assert float(bitops(small, config)) == np.sum(MACS * weights * acts)  # exact below 2^24
        assert float(model_bytes(small, config)) == np.sum(PARAMS * weights) / 8
        assert float(act_bytes(small, config)) == np.sum(INPUTS * acts) / 8
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
        act_bytes,
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


def test_bytes_of_activations_by_hand(small, resnet18):
    bits = BitConfig(jnp.array([8, 4, 2, 8]), jnp.array([8, 4, 2, 8]))
    assert float(act_bytes(small, bits)) == 72 * 1 + 144 * 0.5 + 144 * 0.25 + 16 * 1
    # conv1 and downsample of a stage read the same array, and both count.
    layers = {layer.name: layer.inputs for layer in resnet18.layers}
    assert resnet18.layers[0].inputs == 224 * 224 * 3
    reads = [
        n
        for n, one in zip(layers, resnet18.layers, strict=True)
        if one.shares_input_with is not None
    ]
    assert any(layers[name] == 56 * 56 * 64 for name in reads)
    assert list(layers.values())[-1] == 512
    total = sum(layers.values()) - 224 * 224 * 3 - 512
    assert float(act_bytes(resnet18, resnet18.uniform(2, 4))) == (total / 2 + 224 * 224 * 3 + 512)


@pytest.mark.parametrize("kind", COSTS)
def test_cost_table_of_tied_layers_knows_equal_bits_only(kind):
    rules = bit_rules((6, 4, 2), depthwise_min_bits=3, first=[Rule("mix", acts=(4, 2))])
    table = trace_layers(Small(), (6, 6, 2), rules=rules)
    tied = dataclasses.replace(table, tied_groups=((2, 3),))
    np.testing.assert_array_equal(allowed_pairs(tied)[1], np.diag([False, True, True, False]))
    np.testing.assert_array_equal(allowed_pairs(tied)[0], allowed_pairs(table)[0])
    both = tied.mask[2, 0][:, None] & tied.mask[2, 1]
    np.testing.assert_array_equal(allowed_pairs(tied)[2], both)
    cost = cost_table(tied, kind)
    np.testing.assert_array_equal(np.isfinite(cost), allowed_pairs(tied))
    kept = np.isfinite(cost)
    np.testing.assert_array_equal(cost[kept], cost_table(table, kind)[kept])


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
    charged = small.searchable if kind == "mean_bits" else np.ones(4, bool)
    finite = np.where(np.isfinite(costs), costs, 1.0)
    assert (finite[charged] > 0).all()


def test_mean_bits_charge_layers_with_a_choice_alone(small):
    """The mean of the second and third of four layers."""
    costs = cost_table(small, "mean_bits")
    column = small.candidates.index
    assert costs[1, column(4), column(6)] == costs[2, column(4), column(2)] == 4 / 2
    assert costs[0, column(8), column(8)] == costs[3, column(8), column(8)] == 0


def test_the_mean_of_three_layers_is_that_of_the_cost():
    """A third is no short float: the table is float64, the cost float32."""
    table = trace_layers(Small(), (6, 6, 2), rules=bit_rules((6, 5, 3), first=THREE))
    assert table.searchable.sum() == 3
    costs, place = cost_table(table, "mean_bits"), table.candidates.index
    for config in [sample(jax.random.key(i), table.candidates, table.mask) for i in range(10)]:
        rows = zip(config.weights.tolist(), config.acts.tolist(), strict=True)
        total = sum(costs[layer, place(w), place(a)] for layer, (w, a) in enumerate(rows))
        searched = np.asarray(config.weights)[table.searchable]
        np.testing.assert_allclose(total, searched.mean(), rtol=1e-15)
        np.testing.assert_allclose(total, mean_bits(table, config, by="layer"), rtol=1e-6)


def test_without_any_choice_there_is_no_mean():
    table = trace_layers(Small(), (6, 6, 2), rules=[Rule(weights=4, acts=4)])
    with pytest.raises(ValueError, match="no layer of the table has a choice"):
        cost_table(table, "mean_bits")


def test_unknown_budget_is_refused_with_the_choices(small):
    with pytest.raises(
        ValueError,
        match=r"'flops'; known kinds are "
        r"\['act_bytes', 'bitops', 'bytes', 'mean_bits', 'stored_bytes'\]",
    ):
        cost_table(small, "flops")


def test_a_float_input_is_billed_at_the_bits_of_its_rule(small):
    bits = BitConfig(jnp.array([8, 4, 2, 8]), jnp.array([8, 4, 2, 8]))
    assert small.layers[0].float_acts
    assert float(bitops(small, bits)) == MACS @ [64, 16, 4, 64]


# Everything that must be stored.

BIASES = 4 + 4 + 16 + 3
STEP_SIZES = 2 * 4 - 1  # the input of the stem stays float


class Normed(nn.Module):
    """A norm, a table of words, and parameters that are no kernel."""

    @nn.compact
    def __call__(self, words, train=False):
        x = nn.Embed(5, 4, name="table")(words)
        x = x * self.param("gain", nn.initializers.ones, (1, 1, 4))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(3, use_bias=False, name="head")(x)


def test_what_stays_float_is_stored_in_float32(small):
    assert float_bytes(small) == 4 * (BIASES + STEP_SIZES)
    bits = BitConfig(jnp.array([8, 4, 2, 8]), jnp.array([8, 4, 2, 8]))
    stored = float(model_bytes(small, bits, count_float=True))
    assert stored == 72 * 1 + 36 * 0.5 + 64 * 0.25 + 48 * 1 + 4 * (BIASES + STEP_SIZES)
    assert stored - float(model_bytes(small, bits)) == float_bytes(small)


def test_norms_count_with_their_statistics():
    table = trace_layers(Normed(), jax.ShapeDtypeStruct((1, 6), jnp.int32), rules=RULES[-1:])
    assert table.names == ("table", "head")
    variables = 4 + 4 * 4  # gain; scale, bias, mean and variance
    step_sizes = 2 * 2  # packed files have two of every layer, also of one that looks rows up
    assert float_bytes(table) == 4 * (variables + step_sizes)


def test_float_kernels_are_stored_at_32_bits_whatever_they_count_as():
    first = [Rule("mix", weights=8, float_weights=True), Rule("head", float_acts=True, acts=2)]
    table = trace_layers(Small(), (6, 6, 2), rules=(*first, *RULES))
    bits = table.uniform(4, 4)
    np.testing.assert_array_equal(bits.weights, [8, 4, 8, 8])
    assert float(model_bytes(table, bits)) == 72 + 36 / 2 + 64 + 48
    floats = 4 * (BIASES + STEP_SIZES - 2)
    assert float(model_bytes(table, bits, count_float=True)) == 72 + 18 + 4 * 64 + 48 + floats
    costs = cost_table(table, "stored_bytes")
    assert total(table, costs, bits) == 72 + 18 + 4 * 64 + 48 + floats
    place = table.candidates.index
    assert costs[2, place(8), place(4)] == 4 * 64
    assert costs[0, place(8), place(8)] == 72 + floats  # what belongs to no layer


@pytest.mark.parametrize("kind", COSTS)
def test_tables_and_functions_agree_with_float_layers_and_products(kind):
    rules = (
        Rule("block0/query", weights=8, float_weights=True, acts=(8, 4)),
        Rule("#2", kind="product", weights=(8, 4), acts=32, float_acts=True),
        Rule(kind="product", weights=(8, 3), acts=(6, 2)),
        *bit_rules((6, 4, 2)),
    )
    table = trace_layers(TinyVit(), SHAPE, rules=rules)
    costs = cost_table(table, kind)
    keys = jax.random.split(jax.random.key(1), 20)
    drawn = jax.vmap(lambda key: sample(key, table.candidates, table.mask))(keys)
    found = jax.jit(jax.vmap(lambda bits: COSTS[kind](table, bits)))(drawn)
    assert len(set(found.tolist())) > 3
    tabled = [total(table, costs, config) for config in each(drawn)]
    np.testing.assert_allclose(found, tabled, rtol=1e-6)  # float32 against float64


# Products of activations.


def test_products_cost_work_and_traffic_but_no_bytes():
    fixed = Rule(weights=8, acts=8)
    plain = trace_layers(TinyVit(), SHAPE, rules=[fixed])
    rules = [Rule(kind="product", weights=(8, 4, 2), acts=(8, 4, 2)), fixed]
    table = trace_layers(TinyVit(), SHAPE, rules=rules)
    bits, without = table.uniform(4, 2), plain.max_config
    assert float(bitops(table, bits) - bitops(plain, without)) == 2 * PRODUCT_MACS * 4 * 2
    read = sum(map(sum, PRODUCT_INPUTS)) * 2 / 8
    assert float(act_bytes(table, table.uniform(2, 2)) - act_bytes(plain, without)) == read
    assert float(model_bytes(table, bits)) == float(model_bytes(plain, without))
    assert float_bytes(table) - float_bytes(plain) == 4 * 2 * 2  # a step size of each operand
    with pytest.raises(ValueError, match="no layer of the table has a choice"):
        mean_bits(table, bits, by="layer")
    with pytest.raises(ValueError, match="no layer of the table has a choice"):
        cost_table(table, "mean_bits")


def test_the_mean_of_bits_is_that_of_kernels():
    product = Rule(kind="product", weights=(8, 2), acts=(8, 2))
    table = trace_layers(TinyVit(), SHAPE, rules=[product, *bit_rules((6, 4))])
    most = table.max_config
    fewest = most._replace(weights=jnp.where(most.weights == 8, 2, most.weights))
    is_product = np.array([layer.is_product for layer in table.layers])
    bits = BitConfig(jnp.where(is_product, fewest.weights, most.weights), most.acts)
    table.check(bits)
    assert not np.array_equal(bits.weights, most.weights)
    for one in (most, bits):
        assert mean_bits(table, one, by="layer") == mean_bits(table, one, by="param") == 6
        assert total(table, cost_table(table, "mean_bits"), one) == 6


# Latency tables.


def latencies(**layers):
    content = {"format": "mpq_jax.latency", "version": 1, "unit": "seconds", "layers": layers}
    return json.dumps(content)


MEASURED = {
    "depthwise": {"6": 3e-5, "w4a6": 2e-5, "w4a4": 1.5e-5},
    "mix": {"2": 1, "w6a2": 5e-5, "w16a2": 1e-6, "w2a3": 1e-6},  # 16 and 3 are no candidates
}


def test_latencies_are_read_by_layer_and_pair(small):
    seconds = latency_table(small, latencies(**MEASURED))
    assert (seconds.shape, seconds.dtype) == ((4, 4, 4), np.float64)
    wanted = {
        (0, 8, 8): 0.0,  # fixed and not measured
        (1, 6, 6): 3e-5,
        (1, 4, 6): 2e-5,
        (1, 4, 4): 1.5e-5,
        (2, 2, 2): 1.0,
        (2, 6, 2): 5e-5,
        (3, 8, 8): 0.0,
    }
    column = small.candidates.index
    for (layer, weights, acts), value in wanted.items():
        assert seconds[layer, column(weights), column(acts)] == value
    assert np.isfinite(seconds).sum() == len(wanted)


def test_latencies_of_what_the_rules_forbid_are_ignored(small):
    """2 bits are a candidate, but not of the depthwise layer; the stem is fixed at 8 bits."""
    measured = MEASURED | {"stem": {"8": 7e-5, "4": 4e-5}}
    measured["depthwise"] = MEASURED["depthwise"] | {"2": 1e-6}
    seconds = latency_table(small, latencies(**measured))
    assert seconds[0, 0, 0] == 7e-5
    assert np.isfinite(seconds).sum(axis=(1, 2)).tolist() == [1, 3, 2, 1]
    assert not np.isfinite(seconds[~allowed_pairs(small)]).any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4: 3", "not a latency table: the text is not JSON"),
        ('{"layers":' * 10**5, "not a latency table: the text is nested too deeply"),
        (latencies().replace("{}", '{"mix": 1, "mix": 2}'), r"names \['mix'\] more than once"),
        ("[]", "\"format\" is None; wanted 'mpq_jax.latency'"),
        (latencies().replace("latency", "bits"), "\"format\" is 'mpq_jax.bits'; wanted"),
        (latencies().replace("1", "2"), '"version" is 2; wanted 1'),
        (latencies().replace("seconds", "ms"), "\"unit\" is 'ms'; wanted 'seconds'"),
        (latencies().replace("{}", "[]"), '"layers" should map'),
        (latencies(**MEASURED).replace("layers", "rows"), '"layers" should map'),
        (latencies(mix={"4": 1}), r"missing layers: \['depthwise'\]; unexpected layers: none"),
        (latencies(**MEASURED, other={}), r"missing layers: none; unexpected layers: \['other'\]"),
    ],
)
def test_texts_that_are_no_latency_table_of_the_model_are_refused(small, text, message):
    with pytest.raises(ValueError, match=message):
        latency_table(small, text)


@pytest.mark.parametrize(
    "key", ["w4", "a4", "four", "", "04", "w4a08", "4 ", "W4A4", "w4a4a4", "-4"]
)
def test_keys_that_name_no_bits_are_refused(small, key):
    with pytest.raises(ValueError, match=f"'mix' has a latency at '{key}'; wanted bits like"):
        latency_table(small, latencies(**MEASURED | {"mix": {key: 1e-5}}))


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        ("0", "0"),
        ("-1e-5", "-1e-05"),
        ("NaN", "nan"),
        ("Infinity", "inf"),
        ("1e999", "inf"),
        ("1" + 400 * "0", "1000"),
        ("true", "True"),
        ("null", "None"),
        ('"1e-5"', "'1e-5'"),
    ],
)
def test_latencies_that_are_no_positive_seconds_are_refused(small, number, shown):
    text = latencies(**MEASURED | {"mix": {"4": "here"}}).replace('"here"', number)
    with pytest.raises(ValueError, match=f"of 'mix' at '4' is {shown}.*; wanted positive, finite"):
        latency_table(small, text)


def test_a_layer_needs_a_map_of_its_latencies(small):
    with pytest.raises(ValueError, match="latencies of 'mix' are 1e-05; wanted"):
        latency_table(small, latencies(**MEASURED | {"mix": 1e-5}))


def test_a_pair_is_measured_once(small):
    with pytest.raises(ValueError, match="'mix' has two latencies for w4a4; keep one"):
        latency_table(small, latencies(**MEASURED | {"mix": {"4": 1e-5, "w4a4": 1e-5}}))


# What a configuration costs by a table.


@pytest.mark.parametrize("kind", COSTS)
def test_total_is_the_cost_itself(small, configs, kind):
    table = cost_table(small, kind)
    for config in each(configs):
        given = total(small, table, config)
        assert type(given) is float and given == float(COSTS[kind](small, config))


def test_total_adds_measured_latencies(small):
    seconds = latency_table(small, latencies(**MEASURED | {"stem": {"8": 7e-5}}))
    config = BitConfig(jnp.array([8, 4, 6, 8]), jnp.array([8, 6, 2, 8]))
    assert total(small, seconds, config) == pytest.approx(7e-5 + 2e-5 + 5e-5, rel=1e-12)
    as_numpy = BitConfig(*(np.asarray(bits) for bits in config))
    assert total(small, seconds, as_numpy) == total(small, seconds, config)


def test_total_of_what_was_not_measured_is_infinite(small):
    seconds = latency_table(small, latencies(**MEASURED))
    config = BitConfig(jnp.array([8, 4, 4, 8]), jnp.array([8, 4, 4, 8]))
    assert total(small, seconds, config) == np.inf

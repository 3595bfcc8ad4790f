"""Products of activations as layers: their entries in the table, their values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.attention import (
    DIM,
    HEADS,
    IMAGES,
    MIX,
    PATCH,
    PRODUCT_INPUTS,
    PRODUCT_MACS,
    PRODUCTS,
    SCORES,
    SHAPE,
    SIZE,
    TOKENS,
    Scanned,
    TinyVit,
)
from helpers.random_variables import drawn_variables

from mpq_jax.program import paths
from mpq_jax.quantizers import double_rounding, lsq
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import Rule, bit_rules
from mpq_jax.supernet.supernet import Supernet

FLOAT = Rule(weights=32, acts=32, float_weights=True, float_acts=True)
CHOICES = Rule(kind="product", weights=(8, 4, 2), acts=(8, 4, 2), float_weights=False)
ONLY = (CHOICES._replace(float_acts=False), FLOAT)
QUANTIZERS = {"lsq": lsq.QUANTIZER, "double rounding": double_rounding.QUANTIZER}


@pytest.fixture(scope="module")
def table():
    return trace_layers(TinyVit(), SHAPE, rules=ONLY)


@pytest.fixture(scope="module")
def variables():
    return drawn_variables(TinyVit(), SHAPE, 0)


def layer_of(table, name):
    return table.layers[table.names.index(name)]


# Entries of the table.


def test_products_stand_where_the_model_computes_them(table):
    inside = ("query", "key", "value", "product", "product#2", "out")
    assert table.names == ("stem", *(f"block0/{name}" for name in inside), "head")
    assert [layer.is_product for layer in table.layers] == [
        name in PRODUCTS for name in table.names
    ]


@pytest.mark.parametrize(("name", "inputs"), [*zip(PRODUCTS, PRODUCT_INPUTS, strict=True)])
def test_a_product_has_work_and_inputs_but_no_kernel(table, name, inputs):
    layer = layer_of(table, name)
    assert (layer.kind, layer.macs) == ("product", PRODUCT_MACS)
    assert (layer.inputs, layer.second_inputs) == inputs
    assert (layer.kernel, layer.kernel_shape, layer.params) == (None, (), 0)
    assert (layer.norm, layer.position, layer.channels) == (None, (), 0)
    assert not layer.is_computed


def test_blocks_number_their_own_products():
    names = trace_layers(TinyVit(depth=2), SHAPE, rules=ONLY).names
    found = [name for name in names if "product" in name]
    assert found == [*PRODUCTS, *(name.replace("block0", "block1") for name in PRODUCTS)]


def test_products_have_no_features_and_precede_no_norm(table):
    assert table.features == {}
    rules = [CHOICES, *bit_rules((8, 4, 2), first_last=())]
    searched = trace_layers(TinyVit(), SHAPE, rules=rules)
    names = searched.names
    assert set(searched.features) == set(names) - set(PRODUCTS)
    assert searched.previous[names.index("block0/out")] == names.index("block0/value")


def test_a_product_in_a_loop_is_one_layer_of_all_turns():
    table = trace_layers(Scanned(), SHAPE, rules=ONLY)
    products = [layer for layer in table.layers if layer.is_product]
    assert [layer.name for layer in products] == ["turns/block/product", "turns/block/product#2"]
    assert [layer.macs for layer in products] == 2 * [2 * PRODUCT_MACS]
    found = [(layer.inputs, layer.second_inputs) for layer in products]
    assert found == [(2 * first, 2 * second) for first, second in PRODUCT_INPUTS]
    assert [layer.position for layer in products] == 2 * [()]


# Values and gradients, beside attention written by hand.


def round_ste(x):
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def snapped(x, step, bits, signed):
    """LSQ, equations 1 to 3: the derivative of rounding is one."""
    half = 2.0 ** (bits - 1)
    low, high = (-half, half - 1) if signed else (0.0, 2.0 * half - 1)
    return round_ste(jnp.clip(x / step, low, high)) * step


def dense(x, held):
    return jnp.einsum("...i,io->...o", x, held["kernel"]) + held["bias"].reshape(
        (1,) * (x.ndim - 1) + (-1,)
    )


def block_by_hand(x, held, quantize):
    """One block; `quantize(which product, which operand, x)`."""

    def heads(name):
        return dense(x, held[name]).reshape(len(x), TOKENS, HEADS, SIZE)

    scores = jnp.einsum(
        "bqhs,bths->bhqt", quantize(0, 0, heads("query")), quantize(0, 1, heads("key"))
    )
    weights = quantize(1, 0, jax.nn.softmax(scores / np.float32(np.sqrt(SIZE))))
    mixed = jnp.einsum("bhqt,bths->bqhs", weights, quantize(1, 1, heads("value")))
    return x + dense(mixed.reshape(x.shape), held["out"])


def by_hand(params, images, quantize, blocks):
    """The whole network; `blocks` are the parameters of each block."""
    patches = images.reshape(len(images), 2, PATCH, 2, PATCH, -1).transpose(0, 1, 3, 2, 4, 5)
    kernel = params["stem"]["kernel"].reshape(-1, DIM)
    held = {"kernel": kernel, "bias": params["stem"]["bias"]}
    x = dense(patches.reshape(len(images), TOKENS, -1), held)
    for block in blocks:
        x = block_by_hand(x, block, quantize)
    return dense(x.mean(1), params["head"])


def products_of(table):
    return [index for index, layer in enumerate(table.layers) if layer.is_product]


def quantized_by(table, trainable, bits):
    """`quantize` for `by_hand`: each operand at its own bits; probabilities have no sign."""
    places = products_of(table)

    def quantize(product, operand, x):
        layer = table.layers[places[product]]
        if layer.float_weights if operand else layer.float_acts:
            return x
        steps = trainable.weight_step_sizes if operand else trainable.act_step_sizes
        of_layers = bits.weights if operand else bits.acts
        own = int(of_layers[places[product]])
        step = steps[places[product], table.candidates.index(own)]
        return snapped(x, step, own, signed=bool(operand) or product == 0)

    return quantize


def with_bits(table, **of_products):
    """The largest bits but for (second operand, first operand) of products, as NumPy's."""
    bits = BitConfig(*(np.array(column) for column in table.max_config))
    places = dict(zip(("scores", "mix"), products_of(table), strict=True))
    for name, (weights, acts) in of_products.items():
        bits.weights[places[name]], bits.acts[places[name]] = weights, acts
    table.check(bits)
    return bits


def blocks_of(params):
    if "block0" in params:
        return [params["block0"]]
    return [jax.tree.map(lambda x, i=i: x[i], params["turns"]["block"]) for i in range(2)]


def values_and_gradients(net, variables, configs):
    """Outputs and gradients of a supernet and of the same network by hand, for some bits."""
    state = net.init(variables, IMAGES)
    found, wanted = [], []
    for bits in configs:

        def loss(trainable, bits=bits):
            subnet = net.select(state._replace(trainable=trainable), bits)
            out = net.forward(subnet, IMAGES, train=True).logits
            return jnp.sum(out**2), out

        def loss_by_hand(trainable, bits=bits):
            quantize = quantized_by(net.table, trainable, bits)
            blocks = blocks_of(trainable.params)
            out = by_hand(trainable.params, IMAGES, quantize, blocks)
            return jnp.sum(out**2), out

        for function, results in ((loss, found), (loss_by_hand, wanted)):
            results.append(jax.grad(function, has_aux=True)(state.trainable))
    return found, wanted


def check_close(found, wanted):
    def close(one, other):  # float32 sums in another order
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max() + 1e-6)

    jax.tree.map(close, found, wanted)


CONFIGS = {"a": {"scores": (4, 8), "mix": (2, 4)}, "b": {"scores": (8, 2), "mix": (4, 8)}}


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZERS)
def test_both_operands_are_quantized_at_their_own_bits(table, variables, name):
    net = Supernet(TinyVit(), table, quantizer=QUANTIZERS[name])
    configs = [with_bits(table, **bits) for bits in CONFIGS.values()]
    results = jax.jit(lambda given: values_and_gradients(net, given, configs))(variables)
    check_close(*results)
    for bits, (gradient, _) in zip(configs, results[0], strict=True):
        places = [table.names.index(one) for one in PRODUCTS]
        for steps, own in (
            (gradient.weight_step_sizes, bits.weights),
            (gradient.act_step_sizes, bits.acts),
        ):
            used = np.array(own)[:, None] == np.array(table.candidates)
            used &= np.isin(np.arange(len(table)), places)[:, None]
            np.testing.assert_array_equal(np.asarray(steps) != 0, used)
    outputs = [logits for _, logits in results[0]]
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3


@pytest.mark.slow
def test_products_in_loops_share_their_step_sizes():
    table = trace_layers(Scanned(), SHAPE, rules=ONLY)
    net = Supernet(Scanned(), table, quantizer=lsq.QUANTIZER)
    configs = [with_bits(table, scores=(4, 8), mix=(2, 4))]
    variables = drawn_variables(Scanned(), SHAPE, 0)
    check_close(*jax.jit(lambda given: values_and_gradients(net, given, configs))(variables))


def test_a_float_operand_is_left_alone(variables):
    rules = [
        Rule("product$", kind="product", weights=4, acts=32, float_acts=True, float_weights=False),
        Rule("#2", kind="product", weights=32, acts=4, float_weights=True, float_acts=False),
        FLOAT,
    ]
    table = trace_layers(TinyVit(), SHAPE, rules=rules)
    net = Supernet(TinyVit(), table, quantizer=lsq.QUANTIZER)

    configs = [with_bits(table)]
    both = jax.jit(lambda given: values_and_gradients(net, given, configs))
    found, wanted = both(variables)
    check_close(found, wanted)
    assert np.count_nonzero(found[0][0].weight_step_sizes) == 1
    assert np.count_nonzero(found[0][0].act_step_sizes) == 1


# State.


def test_calibration_reads_both_operands_of_the_float_model(table, variables):
    """LSQ's first step size, 2 mean |x| / sqrt(largest code), of either operand."""
    net = Supernet(TinyVit(), table, quantizer=lsq.QUANTIZER)

    @jax.jit
    def both(variables):
        operands = {}

        def record(product, operand, x):
            operands[product, operand] = jnp.abs(x).mean()
            return x

        params = variables["params"]
        by_hand(params, IMAGES, record, blocks_of(params))
        return net.init(variables, IMAGES), operands

    state, operands = both(variables)
    for product, name in enumerate(PRODUCTS):
        index = table.names.index(name)
        for operand, steps in enumerate(
            (state.trainable.act_step_sizes, state.trainable.weight_step_sizes)
        ):
            signed = operand == 1 or name == SCORES
            for bits, step in zip(table.candidates, steps[index], strict=True):
                most = 2.0 ** (bits - 1) - 1 if signed else 2.0**bits - 1
                wanted = 2 * operands[product, operand] / np.sqrt(most)
                np.testing.assert_allclose(step, wanted, rtol=1e-4)  # float32 sums
    signed = dict(zip(table.names, np.asarray(state.signed), strict=True))
    assert (signed[SCORES], signed[MIX]) == (True, False)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZERS)
def test_subnets_of_ready_kernels_and_masks_know_products(variables, name):
    """Both quantizers have a step size of products for each number of bits."""
    table = trace_layers(TinyVit(), SHAPE, rules=[CHOICES, Rule(weights=(8, 4, 2), acts=(8, 4))])
    net = Supernet(TinyVit(), table, quantizer=QUANTIZERS[name])
    bits = with_bits(table, scores=(4, 8), mix=(2, 4))
    bits.weights[0] = 2

    @jax.jit
    def all_of(variables):
        state = net.init(variables, IMAGES)
        ready = net.quantize_kernels(state.trainable)
        mask = net.update_mask(state.trainable.params, BitConfig(*(x[None] for x in bits)))
        return net.select(state, bits), net.select_quantized(state, ready, bits), mask

    one, other, mask = all_of(variables)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    used = np.asarray(bits.weights)[:, None] == np.array(table.candidates)
    if name == "double rounding":  # one step size of a kernel for all bits
        used[[not layer.is_product for layer in table.layers]] = [True, False, False]
    np.testing.assert_array_equal(mask.weight_step_sizes, used)
    used_by_inputs = np.asarray(bits.acts)[:, None] == np.array(table.candidates)
    np.testing.assert_array_equal(mask.act_step_sizes, used_by_inputs)


def test_products_are_no_parameters(table, variables):
    net = Supernet(TinyVit(), table, quantizer=lsq.QUANTIZER)
    state = jax.eval_shape(net.init, variables, IMAGES)
    assert set(paths.flatten(state.trainable.params)) == set(paths.flatten(variables["params"]))
    assert [w.shape for w in net.kernels(variables["params"])][table.names.index(SCORES)] == ()

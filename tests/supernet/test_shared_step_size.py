"""Supernets with one step size for all bits, and with float kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_supernets import (
    CHOICES,
    CONV,
    DEPTHWISE,
    FLOAT_ENDS,
    HEAD,
    IMAGES,
    INIT,
    MODEL,
    STEM,
    make_float_variables,
    net_of,
)

from mpq_jax.program import paths
from mpq_jax.quantizers import QUANTIZERS, double_rounding
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import Rule


@pytest.fixture(scope="module")
def float_variables():
    return make_float_variables()


def double_rounded(w, step, bits, max_bits):
    """The two roundings, in float64 (the inputs hold no tie)."""
    w, step = np.asarray(w, np.float64), float(step)
    stored = np.clip(np.round(w / step), -(2 ** (max_bits - 1)), 2 ** (max_bits - 1) - 1)
    ratio = 2 ** (max_bits - bits)
    lower = np.clip(np.round(stored / ratio), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return lower * step * ratio


@pytest.fixture(scope="module")
def float_ends(float_variables):
    """A supernet with float ends, of different step sizes everywhere."""
    made = INIT(net_of(FLOAT_ENDS), float_variables, IMAGES)
    factors = np.random.default_rng(3).uniform(0.7, 1.3, (2, *made.trainable.act_step_sizes.shape))
    trainable = made.trainable._replace(
        weight_step_sizes=made.trainable.weight_step_sizes * jnp.asarray(factors[0], jnp.float32),
        act_step_sizes=made.trainable.act_step_sizes * jnp.asarray(factors[1], jnp.float32),
    )
    return made._replace(trainable=trainable)


def float_ends_config(w, d):
    bits = jnp.array([32, w, d, 32], jnp.int32)
    return BitConfig(bits, bits)


@pytest.mark.parametrize(("w", "d"), [(4, 4), (3, 2), (2, 3)])
def test_double_rounding_takes_the_step_size_of_the_highest_bits(float_ends, w, d):
    net, bits = net_of(FLOAT_ENDS, double_rounding.QUANTIZER), float_ends_config(w, d)
    given = net.kernels(float_ends.trainable.params)
    found = net.kernels_of(net.select(float_ends, bits))
    max_bits = FLOAT_ENDS.candidates.index(4)
    for layer, own in ((CONV, w), (DEPTHWISE, d)):
        step = float_ends.trainable.weight_step_sizes[layer, max_bits]
        wanted = double_rounded(given[layer], step, own, 4)
        np.testing.assert_allclose(found[layer], wanted, rtol=1e-6)  # float32 products
        assert len(np.unique(found[layer])) <= 2**own
    for layer in (STEM, HEAD):  # float
        np.testing.assert_array_equal(found[layer], given[layer])
    steps = net.weight_step_sizes(float_ends.trainable, bits.weights)
    np.testing.assert_array_equal(
        steps[CONV], float_ends.trainable.weight_step_sizes[CONV, max_bits]
    )
    np.testing.assert_array_equal(
        steps[DEPTHWISE], float_ends.trainable.weight_step_sizes[2, max_bits]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["double_rounding", "double_rounding_unshared", "lsq"])
def test_only_the_step_sizes_that_serve_get_a_gradient_and_are_marked(float_ends, name):
    net, bits = net_of(FLOAT_ENDS, QUANTIZERS[name]), float_ends_config(3, 2)

    @jax.jit
    @jax.grad
    def gradient(trainable):
        variables = float_ends._replace(trainable=trainable)
        return jnp.sum(net.forward(net.select(variables, bits), IMAGES, train=True).logits ** 2)

    found = gradient(float_ends.trainable)
    one = jax.tree.map(lambda leaf: leaf[None], bits)
    used = net.update_mask(float_ends.trainable.params, one)
    index = FLOAT_ENDS.candidates.index
    serving = (4, 4) if name == "double_rounding" else (3, 2)
    wanted = [[CONV, index(serving[0])], [DEPTHWISE, index(serving[1])]]
    assert np.argwhere(found.weight_step_sizes).tolist() == wanted
    assert np.argwhere(used.weight_step_sizes).tolist() == wanted
    wanted = [[CONV, index(3)], [DEPTHWISE, index(2)]]  # each precision has its own
    assert np.argwhere(found.act_step_sizes).tolist() == wanted
    assert np.argwhere(used.act_step_sizes).tolist() == wanted
    flat = paths.flatten(found.params)
    assert all(np.all(flat[f"{name}/kernel"]) for name in ("stem", "head"))  # straight through
    assert all(paths.flatten(used.params)[f"{name}/kernel"] for name in FLOAT_ENDS.names)


@pytest.mark.slow
def test_the_highest_bits_are_those_of_the_layer(float_variables):
    rules = [Rule("^depthwise$", weights=(3, 2), acts=(4, 3, 2)), Rule(weights=CHOICES, acts=8)]
    table = trace_layers(MODEL, (8, 8, 2), rules=rules)
    made = INIT(net_of(table), float_variables, IMAGES)
    bits = BitConfig(jnp.full(4, 2, jnp.int32), jnp.array([8, 8, 2, 8], jnp.int32))
    net = net_of(table, double_rounding.QUANTIZER)
    found, given = net.kernels_of(net.select(made, bits)), net.kernels(made.trainable.params)
    for layer, max_bits in enumerate((4, 4, 3, 4)):
        step = made.trainable.weight_step_sizes[layer, table.candidates.index(max_bits)]
        wanted = double_rounded(given[layer], step, 2, max_bits)
        np.testing.assert_allclose(found[layer], wanted, rtol=1e-6)


def test_float_layers_do_not_read_their_step_sizes(float_ends):
    net = net_of(FLOAT_ENDS, double_rounding.QUANTIZER)

    @jax.jit
    def logits(trainable):
        return net.apply(float_ends._replace(trainable=trainable), float_ends_config(4, 2), IMAGES)

    trainable = float_ends.trainable
    ends = jnp.array([STEM, HEAD])
    broken = trainable._replace(
        weight_step_sizes=trainable.weight_step_sizes.at[ends].set(jnp.nan),
        act_step_sizes=trainable.act_step_sizes.at[ends].set(jnp.nan),
    )
    np.testing.assert_array_equal(logits(broken), logits(trainable))

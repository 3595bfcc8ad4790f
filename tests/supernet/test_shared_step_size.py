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
)

from mpq_jax.program import paths
from mpq_jax.quantizers import QUANTIZERS, double_rounding
from mpq_jax.supernet import supernet
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import (
    Rule,
    trace_layers,
)


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
    made = INIT(MODEL, FLOAT_ENDS, float_variables, IMAGES)
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
    quantizer = double_rounding.QUANTIZER
    bits = float_ends_config(w, d)
    selected = supernet.select(FLOAT_ENDS, float_ends, bits, quantizer=quantizer)
    kernels = supernet.kernels(FLOAT_ENDS, float_ends.trainable.params)
    found = supernet.kernels(FLOAT_ENDS, selected.params)
    max_bits = FLOAT_ENDS.candidates.index(4)
    for layer, own in ((CONV, w), (DEPTHWISE, d)):
        step = float_ends.trainable.weight_step_sizes[layer, max_bits]
        wanted = double_rounded(kernels[layer], step, own, 4)
        np.testing.assert_allclose(found[layer], wanted, rtol=1e-6)  # float32 products
        assert len(np.unique(found[layer])) <= 2**own
    for layer in (STEM, HEAD):  # float
        np.testing.assert_array_equal(found[layer], kernels[layer])
    steps = supernet.chosen_weight_steps(
        FLOAT_ENDS, float_ends.trainable, bits.weights, quantizer=quantizer
    )
    np.testing.assert_array_equal(
        steps[CONV], float_ends.trainable.weight_step_sizes[CONV, max_bits]
    )
    np.testing.assert_array_equal(
        steps[DEPTHWISE], float_ends.trainable.weight_step_sizes[2, max_bits]
    )


@pytest.mark.parametrize("name", ["double_rounding", "double_rounding_unshared", "lsq"])
def test_only_the_step_sizes_that_serve_get_a_gradient_and_are_marked(float_ends, name):
    quantizer, bits = QUANTIZERS[name], float_ends_config(3, 2)

    @jax.jit
    @jax.grad
    def gradient(trainable):
        variables = float_ends._replace(trainable=trainable)
        selected = supernet.select(FLOAT_ENDS, variables, bits, quantizer=quantizer)
        out = supernet.apply(MODEL, FLOAT_ENDS, selected, IMAGES, train=True, quantizer=quantizer)
        return jnp.sum(out.logits**2)

    found = gradient(float_ends.trainable)
    one = jax.tree.map(lambda leaf: leaf[None], bits)
    used = supernet.update_mask(FLOAT_ENDS, float_ends.trainable.params, one, quantizer=quantizer)
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


def test_the_highest_bits_are_those_of_the_layer(float_variables):
    rules = [Rule("^depthwise$", weights=(3, 2), acts=(4, 3, 2)), Rule(weights=CHOICES, acts=8)]
    table = trace_layers(MODEL, (8, 8, 2), rules=rules)
    made = INIT(MODEL, table, float_variables, IMAGES)
    bits = BitConfig(jnp.full(4, 2, jnp.int32), jnp.array([8, 8, 2, 8], jnp.int32))
    selected = supernet.select(table, made, bits, quantizer=double_rounding.QUANTIZER)
    kernels = supernet.kernels(table, made.trainable.params)
    for layer, max_bits in enumerate((4, 4, 3, 4)):
        step = made.trainable.weight_step_sizes[layer, table.candidates.index(max_bits)]
        wanted = double_rounded(kernels[layer], step, 2, max_bits)
        found = supernet.kernels(table, selected.params)[layer]
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_float_layers_do_not_read_their_step_sizes(float_ends):
    @jax.jit
    def logits(trainable):
        variables = float_ends._replace(trainable=trainable)
        selected = supernet.select(
            FLOAT_ENDS, variables, float_ends_config(4, 2), quantizer=double_rounding.QUANTIZER
        )
        return supernet.apply(MODEL, FLOAT_ENDS, selected, IMAGES, train=False).logits

    trainable = float_ends.trainable
    ends = jnp.array([STEM, HEAD])
    broken = trainable._replace(
        weight_step_sizes=trainable.weight_step_sizes.at[ends].set(jnp.nan),
        act_step_sizes=trainable.act_step_sizes.at[ends].set(jnp.nan),
    )
    np.testing.assert_array_equal(logits(broken), logits(trainable))

"""A network of Equinox, as a function of its arrays."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpq_jax as mpq
from mpq_jax.program import network
from mpq_jax.supernet.rules import Rule

SHAPE = (3, 8, 8)  # Equinox has channels first
IMAGES = jax.random.normal(jax.random.key(1), (4, *SHAPE))


class Net(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    layers: list
    drop: eqx.nn.Dropout

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.conv = eqx.nn.Conv2d(3, 4, 3, padding=1, key=keys[0])
        self.norm = eqx.nn.LayerNorm(4)
        self.layers = [eqx.nn.Linear(4, 6, key=keys[1]), eqx.nn.Linear(6, 5, key=keys[2])]
        self.drop = eqx.nn.Dropout(0.5)

    def __call__(self, image, key, inference):
        x = self.norm(jax.nn.relu(self.conv(image)).mean((1, 2)))
        x = self.drop(jax.nn.relu(self.layers[0](x)), key=key, inference=inference)
        return self.layers[1](x)


NET = Net(jax.random.key(0))
ARRAYS, REST = eqx.partition(NET, eqx.is_array)


def apply(arrays, images, inference, dropout_key=None):
    """Calls the network on a batch."""
    net = eqx.combine(arrays, REST)
    if dropout_key is None:
        return jax.vmap(lambda image: net(image, None, True))(images)
    keys = jax.random.split(dropout_key, len(images))
    return jax.vmap(lambda image, key: net(image, key, inference))(images, keys)


MODEL = mpq.function(apply, ARRAYS)


@pytest.fixture(scope="module")
def table():
    rules = [Rule(weights=(8, 4), acts=(8, 4))]
    return mpq.trace_layers(MODEL, jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32), rules=rules)


def test_its_layers_are_listed(table):
    rows = [(layer.name, layer.kind, layer.kernel_shape, layer.macs) for layer in table.layers]
    assert rows == [
        ("conv", "conv", (4, 3, 3, 3), 64 * 9 * 3 * 4),
        ("layers/0", "dense", (6, 4), 24),
        ("layers/1", "dense", (5, 6), 30),
    ]
    assert [layer.kernel for layer in table.layers] == [f"{row[0]}/weight" for row in rows]
    assert [layer.channels for layer in table.layers] == [4, 6, 5]


def test_it_computes_what_the_module_does():
    variables = mpq.init_variables(MODEL, jax.random.key(0), IMAGES)
    found, _ = network.forward(MODEL, variables, IMAGES, train=False)
    wanted = jax.vmap(lambda image: NET(image, None, True))(IMAGES)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)  # compiled as one


def test_dropout_follows_its_key():
    variables = mpq.init_variables(MODEL, jax.random.key(0), IMAGES)

    def outputs(seed):
        key = None if seed is None else jax.random.key(seed)
        return network.forward(MODEL, variables, IMAGES, train=True, dropout_key=key)[0]

    np.testing.assert_array_equal(outputs(1), outputs(1))
    assert np.any(outputs(1) != outputs(2)) and np.any(outputs(1) != outputs(None))


def test_it_becomes_a_supernet(table):
    net = mpq.Supernet(MODEL, table, quantizer=mpq.quantizers.lsq.QUANTIZER)
    variables = mpq.init_variables(MODEL, jax.random.key(0), IMAGES)
    float_outputs, _ = network.forward(MODEL, variables, IMAGES, train=False)

    @jax.jit
    def errors(variables):
        state = net.init(variables, IMAGES)
        kernels = net.kernels_of(net.select(state, table.uniform(4, 4)))
        outputs = [net.apply(state, table.uniform(bits, bits), IMAGES) for bits in (8, 4)]
        return kernels, [jnp.abs(found - float_outputs).max() for found in outputs]

    kernels, (at_8_bits, at_4_bits) = errors(variables)
    assert all(len(np.unique(kernel)) <= 2**4 for kernel in kernels)
    assert 0 < at_8_bits < at_4_bits
    assert at_8_bits < 0.05 * np.abs(float_outputs).max()

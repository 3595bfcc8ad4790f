"""What a supernet takes of layers and norms that a model calls several times: all calls count."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.program.network import init_variables
from mpq_jax.quantizers import lsq
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import Rule
from mpq_jax.supernet.supernet import Supernet


class OneHead(nn.Module):
    """Calls a layer with values of both signs first, and then with values above zero."""

    flipped: bool = False

    @nn.compact
    def __call__(self, x):
        head = nn.Dense(5, use_bias=False, name="head")
        return head(nn.relu(x)) + head(x) if self.flipped else head(x) + head(nn.relu(x))


class OneNorm(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")
        x = norm(nn.Dense(4, name="first")(x))
        return nn.Dense(3, name="head")(norm(nn.relu(x) + 3))


def bound(model, inputs, bits=8):
    table = trace_layers(model, inputs, rules=[Rule(weights=(bits,), acts=(bits,))])
    net = Supernet(model, table, quantizer=lsq.QUANTIZER)
    variables = init_variables(model, jax.random.key(0), inputs)
    return net, variables, jax.jit(Supernet.init, static_argnums=0)(net, variables, inputs)


@pytest.mark.parametrize("flipped", [False, True])
def test_sign_and_step_size_of_a_layer_are_those_of_all_calls(flipped):
    inputs = jax.random.normal(jax.random.key(1), (256, 16)) - 1
    net, variables, state = bound(OneHead(flipped), inputs)
    assert np.asarray(state.signed).tolist() == [True]
    both = jnp.concatenate([inputs, nn.relu(inputs)])
    wanted = lsq.init_act_step(both, 8, signed=True)
    np.testing.assert_allclose(state.trainable.act_step_sizes[0, 0], wanted, rtol=1e-6)
    wanted = OneHead(flipped).apply(variables, inputs)
    found = net.predict(state, net.table.max_config, inputs)
    error = jnp.sqrt(jnp.mean((found - wanted) ** 2) / jnp.mean(wanted**2))
    assert error < 0.03  # 8 bits of both signs; with the sign of the last call it would be 0.7


def test_statistics_of_a_norm_are_those_of_all_calls():
    inputs = jax.random.normal(jax.random.key(1), (64, 6))
    net, variables, state = bound(OneNorm(), inputs, bits=12)
    state = net.recalibrate(state, net.table.max_config, inputs[None])
    first = np.asarray(inputs) @ np.asarray(variables["params"]["first"]["kernel"])
    second = np.maximum((first - first.mean(0)) / np.sqrt(first.var(0) + 1e-5), 0) + 3
    both = np.concatenate([first, second])
    norm = state.batch_stats["norm"]
    np.testing.assert_allclose(norm["mean"].squeeze(), both.mean(0), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(norm["var"].squeeze(), both.var(0), rtol=2e-3)

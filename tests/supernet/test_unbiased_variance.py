import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers.random_variables import drawn_variables

from mpq_jax.quantizers import lsq
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import Rule
from mpq_jax.supernet.supernet import Supernet

SHAPE, MOMENTUM = (4, 4, 3), 0.9
INIT = jax.jit(Supernet.init, static_argnums=0)


@functools.partial(jax.jit, static_argnames=("net", "train"))
def forward(net, subnet, inputs, *, train):
    return net.forward(subnet, inputs, train=train)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(5, (3, 3), use_bias=False, name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM, name="norm")(x)
        return nn.Dense(2, name="head")(nn.relu(x).mean((1, 2)))


@pytest.mark.slow_but_first
@pytest.mark.parametrize("images", [2, 7])
def test_running_variances_are_updated_as_by_pytorch(images):
    table = trace_layers(Net(), SHAPE, rules=[Rule(weights=(8,), acts=(8,))])
    inputs = jax.random.normal(jax.random.key(0), (images, *SHAPE))
    biased = Supernet(Net(), table, quantizer=lsq.QUANTIZER)
    unbiased = dataclasses.replace(biased, unbiased_variance=True)
    state = INIT(biased, drawn_variables(Net(), SHAPE, 0), inputs)
    subnet = biased.select(state, table.max_config)
    before, one, other = (
        stats["norm"]
        for stats in (
            subnet.batch_stats,
            forward(biased, subnet, inputs, train=True).batch_stats,
            forward(unbiased, subnet, inputs, train=True).batch_stats,
        )
    )
    np.testing.assert_array_equal(one["mean"], other["mean"])
    values = images * SHAPE[0] * SHAPE[1]
    variance = (one["var"] - MOMENTUM * before["var"]) / (1 - MOMENTUM)
    wanted = MOMENTUM * before["var"] + (1 - MOMENTUM) * variance * values / (values - 1)
    np.testing.assert_allclose(other["var"], wanted, rtol=1e-5)
    assert (other["var"] > one["var"]).all()


def test_outputs_and_evaluation_are_the_same():
    table = trace_layers(Net(), SHAPE, rules=[Rule(weights=(8,), acts=(8,))])
    inputs = jax.random.normal(jax.random.key(0), (2, *SHAPE))
    biased = Supernet(Net(), table, quantizer=lsq.QUANTIZER)
    unbiased = dataclasses.replace(biased, unbiased_variance=True)
    state = INIT(biased, drawn_variables(Net(), SHAPE, 0), inputs)
    subnet = biased.select(state, table.max_config)
    for train in (True, False):
        one, other = (forward(net, subnet, inputs, train=train) for net in (biased, unbiased))
        np.testing.assert_array_equal(one.logits, other.logits)
    found = [net.recalibrate(state, table.max_config, inputs[None]) for net in (biased, unbiased)]
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(one, other)

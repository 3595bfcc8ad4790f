"""Kernels that are quantized once for many subnets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_supernets import (
    FLOAT_ENDS,
    MODEL,
    SHAPE,
    TABLE,
    make_float_variables,
    net_of,
    numbered_supernet,
    quantize,
)

from mpq_jax.program import paths
from mpq_jax.quantizers import QUANTIZERS, lsq
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import Rule
from mpq_jax.supernet.state import TrainableParams
from mpq_jax.supernet.supernet import Supernet


@pytest.fixture(scope="module")
def float_variables():
    return make_float_variables()


OTHER_HIGHEST = [
    Rule("^block/conv$", weights=(4, 2), acts=(3, 2)),
    Rule("^depthwise$", weights=(3, 2), acts=(4, 3)),
    Rule("^stem$", weights=8, acts=32, float_acts=True),
    Rule(weights=4, acts=8),
]
QUANTIZE = jax.jit(Supernet.quantize_kernels, static_argnums=0)
SELECT = jax.jit(Supernet.select, static_argnums=0)
SELECT_QUANTIZED = jax.jit(Supernet.select_quantized, static_argnums=0)


def rowed_supernet(table, float_variables, seed):
    """A supernet in which no two rows and no two step sizes are the same."""
    made = numbered_supernet(table, float_variables)
    generator = np.random.default_rng(seed)
    steps = [
        jnp.asarray(generator.uniform(0.02, 0.2, (len(table), len(table.candidates))), jnp.float32)
        for _ in range(2)
    ]
    params = paths.flatten(made.trainable.params)
    for path in params:
        if path.endswith("kernel"):
            params[path] = paths.flatten(float_variables["params"])[path]
    return made._replace(trainable=TrainableParams(paths.unflatten(params), *steps))


def allowed_configs(table, seed, count=6):
    """Some configurations in which every candidate of every tensor comes up."""
    generator = np.random.default_rng(seed)
    bits = np.stack(
        [
            [generator.permutation(np.resize(candidates, count)) for candidates in both]
            for layer in table.layers
            for both in [(layer.weight_candidates, layer.act_candidates)]
        ]
    )
    return [BitConfig(*jnp.asarray(bits[..., i].T, jnp.int32)) for i in range(count)]


QUANTIZED_TABLES = {
    "pair": TABLE,
    "shared": TABLE.with_bn_banks("shared"),
    "transition": TABLE.with_bn_banks("transition"),
    "float ends": FLOAT_ENDS,
    "other highest": trace_layers(MODEL, SHAPE, rules=OTHER_HIGHEST),
}


NORMS_ALONE = ("shared", "transition")  # tables that differ from "pair" in rows of norms
KERNEL_CASES = [
    (kind, name)
    for kind in QUANTIZED_TABLES
    for name in (QUANTIZERS if kind not in NORMS_ALONE else ["double_rounding"])
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), KERNEL_CASES)
def test_kernels_that_were_quantized_before_make_the_same_subnets(float_variables, kind, name):
    table = QUANTIZED_TABLES[kind]
    net, made = net_of(table, QUANTIZERS[name]), rowed_supernet(table, float_variables, 7)
    quantized = QUANTIZE(net, made.trainable)
    assert {path: len(kernels) for path, kernels in quantized.items()} == {
        layer.name: len(layer.weight_candidates)
        for layer in table.layers
        if not layer.float_weights
    }
    for bits in allowed_configs(table, 8):
        table.check(bits)
        found = SELECT_QUANTIZED(net, made, quantized, bits)
        wanted = SELECT(net, made, bits)
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_quantized_kernels_are_in_the_order_of_the_candidates(float_variables):
    table = QUANTIZED_TABLES["other highest"]
    made = rowed_supernet(table, float_variables, 7)
    quantized = QUANTIZE(net_of(table, lsq.QUANTIZER), made.trainable)
    for index, layer in enumerate(table.layers):
        w = paths.flatten(float_variables["params"])[f"{layer.name}/kernel"]
        for kernel, bits in zip(quantized[layer.name], layer.weight_candidates, strict=True):
            step = made.trainable.weight_step_sizes[index, table.candidates.index(bits)]
            wanted = quantize(np.asarray(w), np.asarray(step), bits, True)
            np.testing.assert_array_equal(kernel, wanted)

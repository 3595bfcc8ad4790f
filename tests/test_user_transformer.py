"""A user's transformer out of Flax's own parts: its projections are `nn.DenseGeneral` layers.

It is compared with the same network out of `nn.Dense` layers, whose kernels are those of the first
with the axes of heads put together.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_variables import drawn_variables

from mpq_jax.methods import rfquant
from mpq_jax.methods.base import TrainingInfo
from mpq_jax.methods.rfquant import terms
from mpq_jax.models.vit import attention
from mpq_jax.program import paths
from mpq_jax.quantizers import lsq
from mpq_jax.search.prefix_scoring import make_fast_score
from mpq_jax.supernet import latency
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import bit_rules
from mpq_jax.supernet.scoring import make_score
from mpq_jax.supernet.supernet import Supernet

SHAPE, PATCH, DIM, HEADS, TOKENS = (4, 4, 2), 2, 6, 3, 4
SIZE = DIM // HEADS
PROJECTIONS = ("query", "key", "value", "out")
RULES = bit_rules((4, 3, 2))


class General(nn.Module):
    """Attention as Flax has it, which may have dropout inside of it."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        attend = nn.MultiHeadDotProductAttention(HEADS, dropout_rate=self.dropout, name="attention")
        return attend(x, deterministic=not train)


class Plain(nn.Module):
    """The same by `nn.Dense`."""

    @nn.compact
    def __call__(self, x, train):
        def heads(name):
            return nn.Dense(DIM, name=f"attention_{name}")(x).reshape(len(x), -1, HEADS, SIZE)

        y = attention(*(heads(name) for name in PROJECTIONS[:3]))
        return nn.Dense(DIM, name="attention_out")(y.reshape(x.shape))


class Net(nn.Module):
    mix: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Conv(DIM, (PATCH, PATCH), (PATCH, PATCH), name="stem")(x)
        x = x.reshape(len(x), -1, DIM)
        for index in range(2):
            y = nn.LayerNorm(name=f"norm{index}")(x)
            x = x + self.mix(name=f"mix{index}")(y, train)
            x = x + nn.Dense(DIM, name=f"mlp{index}")(nn.gelu(x))
        return nn.Dense(3, name="head")(x.mean(1))


GENERAL, PLAIN = Net(General), Net(Plain)
TABLE, PLAIN_TABLE = (trace_layers(model, SHAPE, rules=RULES) for model in (GENERAL, PLAIN))
NET, PLAIN_NET = (
    Supernet(model, table, quantizer=lsq.QUANTIZER)
    for model, table in ((GENERAL, TABLE), (PLAIN, PLAIN_TABLE))
)
IMAGES = jnp.asarray(np.random.default_rng(1).normal(size=(8, *SHAPE)), jnp.float32)
LABELS = jnp.arange(8, dtype=jnp.int32) % 3


def with_axes_together(params):
    """Parameters of `GENERAL` as those of `PLAIN`."""
    flat = {}
    for name, leaf in paths.flatten(params).items():
        if "/out/" in name:
            leaf = leaf.reshape(-1, DIM) if name.endswith("kernel") else leaf
        elif "attention" in name:
            leaf = leaf.reshape(DIM, DIM) if name.endswith("kernel") else leaf.reshape(DIM)
        flat[name.replace("attention/", "attention_")] = leaf
    return paths.unflatten(flat)


@pytest.fixture(scope="module")
def variables():
    return drawn_variables(GENERAL, SHAPE, 0)


def test_every_projection_is_a_layer():
    rows = {layer.name: layer for layer in TABLE.layers}
    for name in PROJECTIONS:
        layer = rows[f"mix0/attention/{name}"]
        kernel = (HEADS, SIZE, DIM) if name == "out" else (DIM, HEADS, SIZE)
        assert (layer.kind, layer.kernel_shape) == ("dense", kernel)
        assert (layer.macs, layer.params) == (TOKENS * DIM * DIM, DIM * DIM)
        assert (layer.inputs, layer.channels) == (TOKENS * DIM, DIM)
    assert len(TABLE) == 1 + 2 * (4 + 1) + 1
    first = TABLE.names.index("mix1/attention/query")
    assert [TABLE.layers[first + i].shares_input_with for i in range(3)] == 3 * [first]


def test_the_table_is_that_of_dense_layers():
    for layer, dense in zip(TABLE.layers, PLAIN_TABLE.layers, strict=True):
        assert layer.name.replace("attention/", "attention_") == dense.name
        same = {"name": "", "kernel_shape": (), "kernel": None}
        assert layer._replace(**same) == dense._replace(**same)


class Axes(nn.Module):
    """Contracts several axes, and has kernels of their own along another."""

    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((4, 5), axis=(1, -1), name="several")(x)  # [b 6 7 3] to [b 7 4 5]
        x = jnp.swapaxes(x, 0, 1)
        x = nn.DenseGeneral(2, axis=(2, 3), batch_dims=(0,), name="own")(x)  # [7 b 4 5] to [7 b 2]
        return nn.Dense(3, name="head")(jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1))


def test_axes_of_all_kinds_are_counted():
    several, own, _ = trace_layers(Axes(), (6, 7, 3)).layers
    assert (several.kernel_shape, several.channels) == ((6, 3, 4, 5), 20)
    assert several.macs == 7 * 6 * 3 * 20
    assert (own.kernel_shape, own.channels) == ((7, 4, 5, 2), 14)
    assert own.macs == 7 * 4 * 5 * 2


@pytest.mark.slow
def test_subnets_and_their_gradients_are_those_of_dense_layers(variables):
    random = np.random.default_rng(0)
    searched = np.where(TABLE.searchable, random.choice((4, 3, 2), (2, len(TABLE))), 8)
    bits = BitConfig(*(jnp.asarray(row, jnp.int32) for row in searched))

    def logits_and_gradients(net, variables):
        made = net.init(variables, IMAGES)

        def loss_of(trainable):
            subnet = net.select(made._replace(trainable=trainable), bits, scale_step_gradient=True)
            out = net.forward(subnet, IMAGES, train=True, scale_step_gradient=True)
            features = terms.pick_features(net.table, out.features, "norm_output")
            error = terms.quantization_error(net, trainable, bits, bits.weights)
            return jnp.sum(out.logits**2) + error, (out.logits, features, error)

        gradient, found = jax.grad(loss_of, has_aux=True)(made.trainable)
        return gradient, found

    both = jax.jit(
        lambda general, plain: (
            logits_and_gradients(NET, general),
            logits_and_gradients(PLAIN_NET, plain),
        )
    )
    plain = {"params": with_axes_together(variables["params"])}
    (gradient, found), (wanted_gradient, wanted) = both(variables, plain)
    together = gradient._replace(params=with_axes_together(gradient.params))

    def close(one, other):  # sums over other axes: float32
        np.testing.assert_allclose(one.reshape(other.shape), other, rtol=1e-4, atol=1e-4)

    jax.tree.map(close, together, wanted_gradient)
    close(found[0], wanted[0])
    close(found[2], wanted[2])
    assert len(found[1]) == TABLE.searchable.sum()  # no norm of it counts: each speaks for itself
    for name, feature in found[1].items():
        close(feature, wanted[1][name.replace("attention/", "attention_")])
    assert np.any(gradient.act_step_sizes[TABLE.searchable] != 0, axis=1).all()


@pytest.mark.slow
def test_its_dropout_is_on_only_where_there_is_a_key(variables):
    net = dataclasses.replace(NET, model=Net(functools.partial(General, dropout=0.3)))

    @jax.jit
    def logits(key):
        subnet = net.select(net.init(variables, IMAGES), TABLE.max_config)
        return [
            net.forward(subnet, IMAGES, train=train, dropout_key=k).logits
            for train, k in ((True, key), (True, None), (False, None))
        ]

    one, none, evaluated = logits(jax.random.key(0))
    two, _, _ = logits(jax.random.key(1))
    assert not np.allclose(one, two) and not np.allclose(one, none)
    np.testing.assert_allclose(none, evaluated, rtol=1e-5, atol=1e-5)  # LayerNorm has no mode


@pytest.mark.slow
def test_it_is_trained_and_scored(variables):
    options = rfquant.Options(random_subnets=1, warmup=0.0, subnet_loop="calls", qe_start=0.0)
    run = TrainingInfo(epochs=1, steps_per_epoch=1, prepare=lambda batch, key: batch["image"])
    method = rfquant.make(GENERAL, TABLE, options, run)
    state = method.init(variables, IMAGES)
    kernels = "mix0/attention/query/kernel"
    before = np.array(paths.flatten(state.variables.trainable.params)[kernels])
    state, metrics = method.train_step(state, {"image": IMAGES, "label": LABELS}, jax.random.key(0))
    assert all(np.isfinite(value) for value in metrics.values())
    trained = method.variables(state)
    assert np.all(paths.flatten(trained.trainable.params)[kernels] != before)

    configs = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(TABLE.uniform(bits, bits) for bits in (4, 2))
    )
    one_by_one = make_score(NET, trained, metric="kl")(configs, IMAGES, LABELS)
    fast = make_fast_score(NET, trained, SHAPE, metric="kl")(configs, IMAGES, LABELS)
    np.testing.assert_allclose(fast, one_by_one, rtol=1e-4, atol=1e-6)
    assert abs(one_by_one[0]) < 1e-6 < one_by_one[1]  # of the largest bits from themselves, and not


def test_its_layers_are_measured_as_integers():
    """Of products of codes no rounding is expected."""
    for name, calls in latency.layer_calls(GENERAL, SHAPE, batch=2).items():
        (call,) = calls
        generator = np.random.default_rng(0)
        kernel = latency.draw_codes(generator, call.shapes[call.kernel], 4, "int8")
        x = latency.draw_codes(generator, call.shapes[1 - call.kernel], 4, "int8")
        found = latency.multiply(call, kernel, x)
        assert found.dtype == jnp.int32
        if "attention" in name:
            axes = 2 if name.endswith("out") else 1
            wanted = np.tensordot(np.asarray(x, np.int32), np.asarray(kernel, np.int32), axes)
            np.testing.assert_array_equal(found, wanted)

"""The terms of RFQuant's loss, against closed forms."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_variables import drawn_variables
from helpers.rfquant_networks import (
    CHOICES,
    KEY,
    MODEL,
    NET,
    RUN,
    SHAPE,
    TABLE,
    config,
    pulled_codes,
    with_kernel,
)

from mpq_jax.methods.rfquant import method, terms
from mpq_jax.methods.rfquant.options import FEATURES, Options, published
from mpq_jax.models import resnet
from mpq_jax.quantizers import lsq
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import Rule, bit_rules
from mpq_jax.supernet.state import TrainableParams
from mpq_jax.supernet.supernet import Supernet


def lowest(bits):
    return jnp.array([8, bits, 8], jnp.int32)


@pytest.mark.parametrize(("bits", "least"), [(4, 4), (4, 3), (4, 2), (3, 3), (3, 2), (2, 2)])
def test_quantization_error_pulls_to_the_coinciding_bins(bits, least):
    step = 0.25
    w = np.random.default_rng(2).uniform(-2.6, 2.6, (3, 3, 4, 4)).astype(np.float32)
    trainable = with_kernel(w, step)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    code = np.clip(np.round(w / step), low, high)
    pulled = np.isin(code, sorted(pulled_codes(bits, least)))
    distance = np.where(pulled, np.clip(w, low * step, high * step) - code * step, 0)
    found, gradient = jax.value_and_grad(
        lambda trainable: terms.quantization_error(NET, trainable, config(bits, 4), lowest(least))
    )(trainable)
    wanted = (distance**2).mean((0, 1, 2)).sum()
    np.testing.assert_allclose(found, wanted, rtol=1e-5)  # float32 sum
    inside = (w >= low * step) & (w <= high * step)
    wanted = 2 * distance * inside / (3 * 3 * 4)
    np.testing.assert_allclose(gradient.params["block"]["conv"]["kernel"], wanted, atol=1e-7)
    assert not np.any(gradient.weight_step_sizes) and not np.any(gradient.act_step_sizes)
    assert not np.any(gradient.params["stem"]["kernel"])


def test_three_bits_over_two_pull_exactly_four_codes():
    codes = np.arange(-4, 4)
    w = np.zeros((3, 3, 4, 4), np.float32)
    w.flat[:8] = codes + 0.2
    term = jax.grad(lambda p: terms.quantization_error(NET, p, config(3, 4), lowest(2)))
    gradient = term(with_kernel(w, 1.0)).params["block"]["conv"]["kernel"]
    assert codes[np.asarray(gradient).flat[:8] != 0].tolist() == [-4, -2, 0, 2]


class TwoKinds(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x))
        return nn.Dense(8, name="dense")(x.mean((1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("subnets", [1, 2])
@pytest.mark.parametrize("layer", ["conv", "dense"])
def test_two_bit_term_takes_back_weight_decay_inside_the_range(layer, subnets):
    """Through the optimizer: without other gradients, weights inside stay where they are."""
    table = trace_layers(TwoKinds(), (8, 8, 1), rules=[Rule(weights=CHOICES, acts=CHOICES)])
    net = Supernet(TwoKinds(), table, quantizer=lsq.QUANTIZER)
    index = table.names.index(layer)
    options = Options(
        weight_decay=0.25, learning_rate=1.0, end_learning_rate=1.0, warmup=0.0, momentum=0.0
    )
    # Odd multiples of 1/64: all that follows is exact. The range of 2 bits is -1 to 1/2.
    values = [(np.arange(n) * 14 % 250 - 125) / 64 for n in (36, 32)]
    shapes = [spec.kernel_shape for spec in table.layers]
    kernels = [np.float32(v.reshape(shape)) for v, shape in zip(values, shapes, strict=True)]
    params = {n: {"kernel": jnp.array(w)} for n, w in zip(table.names, kernels, strict=True)}
    trainable = TrainableParams(params, jnp.full((2, 3), 0.5), jnp.ones((2, 3)))
    bits = table.uniform(2, 2)
    once = jnp.full(2, 1.0 / subnets)
    net = Supernet(MODEL, table, quantizer=lsq.QUANTIZER)

    def term(trainable, weights):
        one = terms.two_bit_norm(net, trainable, bits, weights)
        return subnets * (options.two_bit_decay - options.weight_decay) * one

    optimizer = method.make_optimizer(table, options, RUN)
    used = net.update_mask(params, jax.tree.map(lambda leaf: leaf[None], bits))

    def moved(weights):
        gradient = jax.grad(term)(trainable, weights)
        assert not np.any(gradient.weight_step_sizes)
        state = optimizer.init(trainable)
        updates, _ = optimizer.update(gradient, state, trainable, used=used)
        return np.asarray(updates.params[layer]["kernel"])

    w = kernels[index]
    inside = (w >= -1) & (w <= 0.5)
    assert 0 < inside.sum() < w.size
    decays = 0.25 * w if layer == "conv" else np.zeros_like(w)  # on convolution kernels only
    np.testing.assert_array_equal(moved(once)[inside], 0)
    np.testing.assert_array_equal(moved(once)[~inside], -decays[~inside])
    each = moved(jnp.ones(2))[inside]
    np.testing.assert_array_equal(each, ((subnets - 1) * decays)[inside])


def test_two_bit_term_is_half_the_squared_norm_and_leaves_other_bits_alone():
    w = np.random.default_rng(3).normal(size=(3, 3, 4, 4)).astype(np.float32)
    inside = np.clip(w, -2 * 0.4, 0.4)
    weights = jnp.array([1.0, 0.5, 1.0])
    found = terms.two_bit_norm(NET, with_kernel(w, 0.4), config(2, 4), weights)
    np.testing.assert_allclose(found, 0.5 * 0.5 * np.sum(inside**2), rtol=1e-6)
    assert terms.two_bit_norm(NET, with_kernel(w, 0.4), config(3, 2), weights) == 0


def test_distortion_counts_layers_at_their_current_minimum():
    generator = np.random.default_rng(4)
    mine, theirs = (jnp.asarray(generator.normal(size=(2, 4, 4, 4)), jnp.float32) for _ in "ab")

    def distortion(mine, theirs, w, least):
        return terms.information_distortion(
            TABLE, {"block/norm": mine}, {"block/norm": theirs}, config(w, 4), lowest(least)
        )

    wanted = np.mean((np.asarray(mine) - np.asarray(theirs)) ** 2)
    for w, least in [(2, 2), (3, 3)]:
        np.testing.assert_allclose(distortion(mine, theirs, w, least), wanted, rtol=1e-6)
    for w, least in [(3, 2), (4, 2), (2, 3), (4, 3)]:
        assert distortion(mine, theirs, w, least) == 0
    student, teacher = jax.grad(distortion, (0, 1))(mine, theirs, 2, 2)
    np.testing.assert_allclose(student, 2 * (mine - theirs) / mine.size, rtol=1e-5)
    assert not np.any(teacher)


class TwoNorms(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        for index in (1, 2):
            y = nn.Conv(4, (1, 1), name=f"conv{index}")(x)
            y = nn.BatchNorm(use_running_average=not train, name=f"norm{index}")(y)
            x = nn.relu(y + x)
        return x


class Places(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (1, 1), name="top")(x))
        return nn.Dense(3)(TwoNorms(name="block")(x, train=train).mean((1, 2)))


@pytest.mark.parametrize("place", FEATURES)
def test_features_are_picked_at_their_place(place):
    rules = [Rule(weights=CHOICES, acts=CHOICES)]
    table = trace_layers(Places(), (8, 8, 1), rules=rules)
    names = ["BatchNorm_0", "block", "block/norm1", "block/norm2", "Dense_0"]
    captured = {name: jnp.array([-1.0, i]) for i, name in enumerate(names, 1)}
    found = terms.pick_features(table, captured, place)
    raw = {name: captured[name] for name in names if name != "block"}
    wanted = raw if place == "norm_output" else jax.tree.map(jax.nn.relu, raw)
    wanted |= {"Dense_0": captured["Dense_0"]}  # has no norm
    if place in ("block_output", "published"):
        wanted |= {"block/norm2": captured["block"]}
    assert set(found) == set(wanted)
    for name, feature in found.items():
        np.testing.assert_array_equal(feature, wanted[name])


class Residual(nn.Module):
    block: type[nn.Module]

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        return nn.Dense(3, name="head")(self.block(4, 2, name="block")(x, train).mean((1, 2)))


@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.BottleneckBlock])
def test_published_features_are_what_operations_in_place_leave(block):
    """Read off the published code: `relu_(norm(x))`, and `x += shortcut` of a raw shortcut."""
    table = trace_layers(Residual(block), (8, 8, 1), rules=bit_rules(CHOICES))
    norms = [name for name in table.features if "norm" in name]
    captured = {name: jnp.array([-1.0, 2.0]) for name in [*table.features, "block"]}
    found = terms.pick_features(table, captured, "published")
    raw = {name for name in norms if (found[name] < 0).any()}
    last = "block/norm2" if block is resnet.BasicBlock else "block/norm3"
    assert raw == {"block/shortcut_norm", last}  # the latter is `captured["block"]`
    assert found[last] is captured["block"]
    assert len(norms) == {resnet.BasicBlock: 3, resnet.BottleneckBlock: 4}[block]


def test_quantization_error_weight_follows_its_schedule():
    steps = 150 * 7
    weight = lambda step: method.quantization_error_weight(  # noqa: E731
        jnp.int32(step), options=published(), steps=steps
    )
    assert weight(0) == weight(40 * 7) == 0
    for epoch, wanted in [(60, 0.008), (95, 0.050), (120, 0.083)]:
        assert float(weight(epoch * 7)) == pytest.approx(wanted, abs=6e-4)  # printed digits
    assert float(weight(steps)) == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("steps", [2, 40])
def test_quantization_error_weight_of_short_runs(steps):
    weights = [
        float(method.quantization_error_weight(jnp.int32(step), options=Options(), steps=steps))
        for step in range(steps + 1)
    ]
    assert weights == sorted(weights)
    assert weights[0] == 0 and weights[-1] == pytest.approx(0.1)


# Layers without a norm of their own.


class Unnormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
        x = nn.LayerNorm(name="scale")(nn.Conv(4, (1, 1), name="mix")(x))
        return nn.Dense(3, name="head")(nn.Dense(4, name="wide")(x.mean((1, 2))))


@pytest.mark.slow_but_first
@pytest.mark.parametrize("place", FEATURES)
def test_layers_without_a_norm_speak_for_themselves(place):
    model, images = Unnormed(), jax.random.normal(KEY, (4, *SHAPE))
    table = trace_layers(model, SHAPE, rules=bit_rules(CHOICES))
    assert table.features == {"mix": 1, "wide": 2} and not table.searchable_norms

    net = Supernet(model, table, quantizer=lsq.QUANTIZER)

    @jax.jit
    def distance(variables, bits):
        made = net.init(variables, images)

        def features(bits):
            out = net.forward(net.select(made, bits), images, train=True)
            return terms.pick_features(table, out.features, place)

        found, wanted = features(bits), features(table.max_config)
        lowest = jnp.array([8, 2, 2, 8])
        return terms.information_distortion(table, found, wanted, bits, lowest), found, wanted

    weights = jnp.array([8, 2, 3, 8])  # one of the two is at its lowest bits
    total, found, wanted = distance(drawn_variables(model, SHAPE, 0), BitConfig(weights, weights))
    assert set(found) == {"mix", "wide"}
    assert (found["mix"] < 0).any()  # raw in all places
    np.testing.assert_allclose(total, np.mean((found["mix"] - wanted["mix"]) ** 2), rtol=1e-5)
    assert total > 0


def test_features_of_bfloat16_are_compared_in_float32():
    table = trace_layers(Unnormed(), SHAPE, rules=bit_rules(CHOICES))
    generator = np.random.default_rng(0)
    drawn = [jnp.asarray(generator.normal(size=(2, 40)), jnp.bfloat16) for _ in range(2)]
    lowest = jnp.array([8, 2, 2, 8])

    def distortion(x):
        features = {"mix": x, "wide": drawn[1]}
        reference = {"mix": drawn[0], "wide": drawn[1]}
        return terms.information_distortion(
            table, features, reference, BitConfig(lowest, lowest), lowest
        )

    total, gradient = jax.value_and_grad(distortion)(drawn[0] + 1)
    assert (total.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    apart = np.asarray(drawn[0] + 1, np.float32) - np.asarray(drawn[0], np.float32)
    np.testing.assert_allclose(total, np.mean(apart**2), rtol=1e-6)
    np.testing.assert_allclose(
        gradient.astype(jnp.float32), 2 * apart / apart.size, rtol=2**-8
    )  # rounded to bfloat16 at the end

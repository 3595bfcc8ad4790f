import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_variables import drawn_variables

from mpq_jax.methods import rfquant
from mpq_jax.methods.base import Run
from mpq_jax.methods.rfquant import freezing, method, terms
from mpq_jax.methods.rfquant.options import Options, published
from mpq_jax.program import paths
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet import supernet
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import Rule, bit_rules, trace_layers
from mpq_jax.training import metrics as recording

CHOICES = (4, 3, 2)
KEY = jax.random.key(0)
SHAPE = (8, 8, 1)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        y = nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)
        return nn.relu(x + nn.BatchNorm(use_running_average=not train, name="norm")(y))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="stem")(x))
        return nn.Dense(3, name="head")(Block(name="block")(x, train=train).mean((1, 2)))


MODEL = Net()
TABLE = trace_layers(MODEL, (8, 8, 1), rules=bit_rules(CHOICES))
STEM, CONV, HEAD = range(3)
RUN = Run(epochs=10, steps_per_epoch=3, prepare=lambda batch, key: batch["image"])
# Constant rates, and every term large enough to matter from the first steps on.
BASE = Options(
    learning_rate=0.05,
    end_learning_rate=0.05,
    warmup=0.0,
    step_learning_rate=1e-3,
    weight_decay=0.02,
    clip_value=0.05,
    idm_weight=0.5,
    qe_start=0.0,
    freeze_ratio_start=1.0,  # the only layer, at every event: from the second epoch on
    freeze_ratio_end=1.0,
    subnet_loop="calls",
)


class Deep(nn.Module):
    """Many layers of all kinds, for what needs a table only."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        for index in range(3):
            x = nn.Conv(4, (1, 1), name=f"conv{index}")(x)
            x = nn.Conv(4, (3, 3), feature_group_count=4, name=f"depthwise{index}")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


DEEP = trace_layers(Deep(), (8, 8, 1), rules=bit_rules((6, 5, 4, 3, 2), depthwise_min_bits=3))


@pytest.fixture(scope="module")
def variables():
    return drawn_variables(MODEL, SHAPE, 0)


@pytest.fixture(scope="module")
def batch():
    labels = np.arange(16, dtype=np.int32) % 3
    images = np.random.default_rng(0).normal(size=(16, 8, 8, 1))
    images += np.linspace(-1, 1, 8)[:, None] * (labels - 1)[:, None, None, None]
    return {"image": jnp.asarray(images, jnp.float32), "label": jnp.asarray(labels)}


def snapshot(state):
    return jax.tree.map(np.array, state)


def drawn(key, mask, count):
    """The subnets of a step: its key gives one for the images, for the bits, for dropout."""
    keys = jax.random.split(jax.random.split(key, 3)[1], count)
    return [bit_configs.sample(k, TABLE.candidates, jnp.asarray(mask)) for k in keys]


# The scheduler.


def events(epochs, options):
    found = {e: freezing.freeze_ratio(e, epochs=epochs, options=options) for e in range(epochs)}
    return {epoch: ratio for epoch, ratio in found.items() if ratio is not None}


def test_events_of_the_published_run():
    found = events(150, published())
    assert list(found) == [*range(7, 108, 2), 119, 134, 149]
    for epoch, ratio in found.items():
        progress = ((epoch - 5) // 2) / 75
        wanted = 0.2 + 0.5 * (0.5 - 0.2) * (1 + np.cos(np.pi * progress))
        assert ratio == pytest.approx(wanted, rel=1e-12)
    # Of the 19 convolutions of ResNet-18 and the 51 of MobileNetV2.
    for epoch, counts in {7: (9, 25), 57: (7, 21), 107: (5, 13), 149: (3, 10)}.items():
        assert (int(19 * found[epoch]), int(51 * found[epoch])) == counts


def test_the_defaults_have_the_published_events():
    assert events(150, Options()) == events(150, published())


@pytest.mark.parametrize("epochs", range(1, 41))
def test_short_runs_have_events_with_sane_ratios(epochs):
    found = events(epochs, Options())
    assert all(0.2 <= ratio <= 0.5 for ratio in found.values())
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert found or epochs < 3


def test_the_scheduler_can_be_switched_off():
    assert not events(150, Options(freeze_ratio_start=0.0, freeze_ratio_end=0.0))


def freeze(scores, count, **options):
    mask = freezing.freeze(DEEP, jnp.array(scores), jnp.int32(count), options=Options(**options))
    return np.asarray(mask)


def removed(mask):
    """Returns what the mask lacks, as (layer, tensor, bits)."""
    return {
        (DEEP.names[layer], ("weights", "acts")[tensor], DEEP.candidates[choice])
        for layer, tensor, choice in np.argwhere(DEEP.mask & ~mask)
    }


def test_the_most_unstable_layers_lose_exactly_their_lowest_weight_bits():
    assert [DEEP.names[i] for i in freezing.freezable(DEEP)] == list(DEEP.names[1:-1])
    scores = [0.1, 0.9, 0.5, 0.2, 0.8, 0.3]  # conv0, depthwise0, conv1, depthwise1, ...
    assert not removed(freeze(scores, 0))
    wanted = {("depthwise0", "weights", 3), ("conv2", "weights", 2), ("conv1", "weights", 2)}
    assert removed(freeze(scores, 3)) == wanted
    mask = freeze(scores, 6)
    assert len(removed(mask)) == 6
    assert np.all(mask <= DEEP.mask)


def test_freezing_again_removes_no_second_bit_and_releases_the_others():
    first = freeze([0.1, 0.9, 0.5, 0.2, 0.8, 0.3], 2)
    second = freeze([0.9, 0.8, 0.5, 0.2, 0.1, 0.3], 2)
    assert removed(first) == {("depthwise0", "weights", 3), ("conv2", "weights", 2)}
    assert removed(second) == {("conv0", "weights", 2), ("depthwise0", "weights", 3)}


def test_layers_that_score_alike_are_taken_in_order():
    wanted = {("conv0", "weights", 2), ("depthwise0", "weights", 3)}
    assert removed(freeze([0.5] * 6, 2)) == wanted


def test_freezing_activations_too():
    found = removed(freeze([0.1, 0.9, 0.5, 0.2, 0.8, 0.3], 2, freeze_acts=True))
    wanted = {(name, t, b) for name, b in (("depthwise0", 3), ("conv2", 2)) for t in _TENSORS}
    assert found == wanted


_TENSORS = ("weights", "acts")


def unstable_share(w, step, bits):
    """The share of weights next to a boundary, bin by bin as published."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    v = w / step
    k = np.clip(np.round(v), low, high)
    d, count = v - k, 0
    for code in range(low, high + 1):
        inside = d[k == code]
        if code == low:
            inside = inside[inside > 0]
        if code == high:
            inside = inside[inside < 0]
        count += np.sum(np.abs(inside) > 0.375)
    return count / w.size


@pytest.mark.parametrize("mode", ["common", "current"])
def test_instabilities_are_taken_over_common_or_current_bits(mode):
    generator = np.random.default_rng(1)
    kernels = [generator.normal(size=layer.kernel_shape) for layer in DEEP.layers]
    steps = generator.uniform(0.2, 0.6, (len(DEEP), len(DEEP.candidates)))
    params = {
        name: {"kernel": jnp.asarray(w, jnp.float32)}
        for name, w in zip(DEEP.names, kernels, strict=True)
    }
    steps = jnp.asarray(steps, jnp.float32)
    trainable = supernet.TrainableParams(params, steps, steps)
    mask = freeze([0.1, 0.9, 0.5, 0.2, 0.8, 0.3], 2)
    found = freezing.instabilities(
        DEEP, trainable, jnp.asarray(mask), options=Options(freeze_scores=mode)
    )
    allowed = {name: (6, 5, 4, 3) if mode == "common" else (6, 5, 4, 3, 2) for name in DEEP.names}
    if mode == "current":
        allowed |= {f"depthwise{i}": (6, 5, 4, 3) for i in range(3)}
        allowed |= {"depthwise0": (6, 5, 4), "conv2": (6, 5, 4, 3)}
    for score, index in zip(found, range(1, 7), strict=True):
        w = np.float32(kernels[index])
        shares = [
            unstable_share(w, np.float32(steps[index, DEEP.candidates.index(b)]), b) / b
            for b in allowed[DEEP.names[index]]
        ]
        np.testing.assert_allclose(score, np.mean(shares), rtol=1e-6)


def test_instabilities_of_layers_without_a_common_bit_are_numbers():
    rules = [Rule("conv", weights=(6, 5), acts=4), Rule("depthwise", weights=(3, 2), acts=4)]
    table = trace_layers(Deep(), (8, 8, 1), rules=[*rules, Rule(weights=8, acts=8)])
    params = {
        layer.name: {"kernel": jax.random.normal(KEY, layer.kernel_shape)} for layer in table.layers
    }
    steps = jnp.full((len(table), len(table.candidates)), 0.3)
    scores = freezing.instabilities(
        table,
        supernet.TrainableParams(params, steps, steps),
        jnp.asarray(table.mask),
        options=Options(),
    )
    assert np.all(np.isfinite(scores))


# The terms of the loss.


def with_kernel(w, step):
    """A supernet of the small net whose middle kernel and step sizes are given."""
    params = {"stem": jnp.zeros((3, 3, 1, 4)), "head": jnp.zeros((4, 3))}
    tree = {name: {"kernel": kernel} for name, kernel in params.items()}
    tree["block"] = {"conv": {"kernel": jnp.asarray(w, jnp.float32)}}
    steps = jnp.ones((3, 4)).at[CONV].set(jnp.asarray(step, jnp.float32))
    return supernet.TrainableParams(tree, steps, jnp.ones((3, 4)))


def config(w, a):
    return BitConfig(jnp.array([8, w, 8], jnp.int32), jnp.array([8, a, 8], jnp.int32))


def lowest(bits):
    return jnp.array([8, bits, 8], jnp.int32)


def pulled_codes(bits, least):
    """The coinciding bins: multiples of 2^(bits - least) times the codes of `least` bits."""
    ratio = 2 ** (bits - least)
    return {ratio * k for k in range(-(2 ** (least - 1)), 2 ** (least - 1))}


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
        lambda trainable: terms.quantization_error(TABLE, trainable, config(bits, 4), lowest(least))
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
    term = jax.grad(lambda p: terms.quantization_error(TABLE, p, config(3, 4), lowest(2)))
    gradient = term(with_kernel(w, 1.0)).params["block"]["conv"]["kernel"]
    assert codes[np.asarray(gradient).flat[:8] != 0].tolist() == [-4, -2, 0, 2]


class TwoKinds(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x))
        return nn.Dense(8, name="dense")(x.mean((1, 2)))


@pytest.mark.parametrize("subnets", [1, 2])
@pytest.mark.parametrize("layer", ["conv", "dense"])
def test_two_bit_term_takes_back_weight_decay_inside_the_range(layer, subnets):
    """Through the optimizer: without other gradients, weights inside stay where they are."""
    table = trace_layers(TwoKinds(), (8, 8, 1), rules=[Rule(weights=CHOICES, acts=CHOICES)])
    index = table.names.index(layer)
    options = Options(
        weight_decay=0.25, learning_rate=1.0, end_learning_rate=1.0, warmup=0.0, momentum=0.0
    )
    # Odd multiples of 1/64: all that follows is exact. The range of 2 bits is -1 to 1/2.
    values = [(np.arange(n) * 14 % 250 - 125) / 64 for n in (36, 32)]
    shapes = [spec.kernel_shape for spec in table.layers]
    kernels = [np.float32(v.reshape(shape)) for v, shape in zip(values, shapes, strict=True)]
    params = {n: {"kernel": jnp.array(w)} for n, w in zip(table.names, kernels, strict=True)}
    trainable = supernet.TrainableParams(params, jnp.full((2, 3), 0.5), jnp.ones((2, 3)))
    bits = table.uniform(2, 2)
    once = jnp.full(2, 1.0 / subnets)

    def term(trainable, weights):
        one = terms.two_bit_norm(table, trainable, bits, weights)
        return subnets * (options.two_bit_decay - options.weight_decay) * one

    optimizer = method.make_optimizer(table, options, RUN)
    used = supernet.update_mask(table, params, jax.tree.map(lambda leaf: leaf[None], bits))

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
    found = terms.two_bit_norm(TABLE, with_kernel(w, 0.4), config(2, 4), weights)
    np.testing.assert_allclose(found, 0.5 * 0.5 * np.sum(inside**2), rtol=1e-6)
    assert terms.two_bit_norm(TABLE, with_kernel(w, 0.4), config(3, 2), weights) == 0


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


@pytest.mark.parametrize("place", ["norm_output", "post_activation", "block_output"])
def test_features_are_picked_at_their_place(place):
    rules = [Rule(weights=CHOICES, acts=CHOICES)]
    table = trace_layers(Places(), (8, 8, 1), rules=rules)
    names = ["BatchNorm_0", "block", "block/norm1", "block/norm2", "Dense_0"]
    captured = {name: jnp.array([-1.0, i]) for i, name in enumerate(names, 1)}
    found = terms.pick_features(table, captured, place)
    raw = {name: captured[name] for name in names if name != "block"}
    wanted = raw if place == "norm_output" else jax.tree.map(jax.nn.relu, raw)
    wanted |= {"Dense_0": captured["Dense_0"]}  # has no norm
    if place == "block_output":
        wanted |= {"block/norm2": captured["block"]}
    assert set(found) == set(wanted)
    for name, feature in found.items():
        np.testing.assert_array_equal(feature, wanted[name])


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


# Options.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("subnet_loop", "vmap"),
        ("gradient", "median"),
        ("idm_features", "logits"),
        ("freeze_scores", "all"),
        ("two_bit_count", "twice"),
        ("rate_change", "batch"),
        ("optimizer", "adam"),
        ("soft_label_weight", 1.5),
        ("freeze_ratio_start", -0.1),
        ("qe_start", 40.0),
        ("ema_decay", 2.0),
        ("random_subnets", -1),
        ("clip_value", -1.0),
    ],
)
def test_impossible_options_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        Options(**{name: value})


def test_published_options_are_those_of_the_published_run():
    options = published()
    assert {"epochs": 150} == {"epochs": round(5 / options.warmup)}
    wanted = dict(
        random_subnets=3,
        gradient="sum",
        soft_label_weight=0.5,
        label_smoothing=0.0,
        idm_weight=0.01,
        idm_features="block_output",
        freeze_scores="current",
        freeze_proportion=0.25,
        freeze_acts=True,
        qe_weight=0.1,
        two_bit_weight=1.0,
        two_bit_decay=0.0,
        two_bit_count="each",
        clip_value=1.0,
        optimizer="sgd",
        learning_rate=0.04,
        end_learning_rate=1e-5,
        warmup_learning_rate=1e-5,
        rate_change="epoch",
        momentum=0.9,
        weight_decay=2.5e-5,
        step_learning_rate=1e-5,
        scale_step_gradient=False,
        ema_decay=0.9997,
        ema_warmup=False,
        norm_banks=True,
    )
    assert {name: getattr(options, name) for name in wanted} == wanted
    assert round(options.qe_start * 150) == 40
    assert published(label_smoothing=0.1).label_smoothing == 0.1


@pytest.mark.parametrize("steps_per_epoch", [1, 7, 45, 2502])
def test_learning_rates_of_the_published_run(steps_per_epoch):
    """Reads the rates off the optimizer's moves under a gradient of one, epoch by epoch."""
    options = published(momentum=0.0, weight_decay=0.0)
    run = Run(150, steps_per_epoch, RUN.prepare)
    trainable = with_kernel(np.ones((3, 3, 4, 4)), 1.0)
    optimizer = method.make_optimizer(TABLE.with_bn_banks("shared"), options, run)
    used = jax.tree.map(lambda _: jnp.array(True), trainable.params)
    used = supernet.TrainableParams(used, jnp.ones((3, 4), bool), jnp.ones((3, 4), bool))
    fresh = optimizer.init(trainable)

    @jax.jit
    def rates(step):
        # Every schedule counts its own steps: all integers of the state but Adam's, per row.
        state = jax.tree.map(
            lambda x: step if x.shape == () and jnp.issubdtype(x.dtype, jnp.integer) else x, fresh
        )
        ones = jax.tree.map(jnp.ones_like, trainable)
        updates, _ = optimizer.update(ones, state, trainable, used=used)
        return -updates.params["head"]["kernel"][0, 0], -updates.act_step_sizes[1, 1]

    for epoch in (0, 1, 4, 5, 6, 20, 149):
        wanted = 1e-5 + epoch * (0.04 - 1e-5) / 5
        if epoch >= 5:
            wanted = 1e-5 + 0.5 * (0.04 - 1e-5) * (1 + np.cos(np.pi * epoch / 150))
        adam = 1e-5 * 0.5 * (1 + np.cos(np.pi * epoch / 150))
        for step in (epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch - 1):
            # float32 cosines near their end, where the rate is a difference of ones
            np.testing.assert_allclose(rates(jnp.int32(step)), (wanted, adam), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("norms", [False, True])
def test_adamw_moves_by_signs_and_decays_convolutions_alone(norms):
    options = Options(optimizer="adamw", learning_rate=0.1, warmup=0.0, weight_decay=0.5)
    trainable = with_kernel(np.full((3, 3, 4, 4), 2.0), 1.0)
    params = trainable.params
    if norms:
        rows = jnp.ones((3, 3, 4))
        params["block"]["norm"] = {"scale": rows, "bias": rows}
    optimizer = method.make_optimizer(TABLE.with_bn_banks("pair"), options, RUN)
    used = paths.map_leaves(
        params,
        lambda path, _: jnp.arange(9).reshape(3, 3) < 4 if "norm" in path else jnp.array(True),
    )
    used = supernet.TrainableParams(used, jnp.ones((3, 4), bool), jnp.ones((3, 4), bool))
    gradient = jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.01), trainable)
    updates, _ = optimizer.update(gradient, optimizer.init(trainable), trainable, used=used)
    moved = paths.flatten(updates.params)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4)  # Adam's epsilon
    close(moved["block/conv/kernel"], 0.1 * (1 - 0.5 * 2.0), atol=1e-6)
    close(moved["head/kernel"], 0.1)
    for path in [path for path in moved if "norm" in path]:
        row = np.where(np.arange(9).reshape(3, 3, 1) < 4, 0.1, 0.0)
        close(moved[path], np.broadcast_to(row, (3, 3, 4)))


# Layers without a norm of their own.


class Unnormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
        x = nn.LayerNorm(name="scale")(nn.Conv(4, (1, 1), name="mix")(x))
        return nn.Dense(3, name="head")(nn.Dense(4, name="wide")(x.mean((1, 2))))


@pytest.mark.parametrize("place", ["norm_output", "post_activation", "block_output"])
def test_layers_without_a_norm_speak_for_themselves(place):
    model, images = Unnormed(), jax.random.normal(KEY, (4, *SHAPE))
    table = trace_layers(model, SHAPE, rules=bit_rules(CHOICES))
    assert table.features == {"mix": 1, "wide": 2} and not table.searchable_norms

    @jax.jit
    def distance(variables, bits):
        made = supernet.init(model, table, variables, images)

        def features(bits):
            selected = supernet.select(table, made, bits)
            out = supernet.apply(model, table, selected, images, train=True)
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


# Training. One run of six epochs of one step is shared by the tests that follow.


@pytest.fixture(scope="module")
def history(variables, batch):
    """States before and after every step, their keys, the counter, and what became of the input."""
    given = jax.tree.map(np.array, variables)
    made = rfquant.make(MODEL, TABLE, BASE, RUN)
    states, keys, totals, logged = [], [], [], []
    with recording.CompileCounter() as counter:
        state = made.init(variables, batch["image"])
        for epoch in range(6):
            state, happened = made.on_epoch(state, epoch)
            before, key = snapshot(state), jax.random.key(epoch)
            state, metrics = made.train_step(state, batch, key)
            states.append((before, snapshot(state)))
            keys.append(key)
            totals.append(sum(counter.counts.values()))
            logged.append((happened, metrics))
    unharmed = jax.tree.map(np.array_equal, variables, given)
    return made, states, keys, (counter, totals, logged), unharmed


def test_the_callers_variables_survive_training(history):
    assert jax.tree.all(history[-1])


def test_metrics_are_finite_scalars(history):
    for _, metrics in history[3][2]:
        assert all(np.shape(value) == () and np.isfinite(value) for value in metrics.values())
        assert {"loss_max", "loss_subnets", "kl_subnets", "idm_subnets", "qe_subnets"} <= set(
            metrics
        )


def test_every_program_compiles_once_whatever_is_frozen(history):
    counter, totals, logged = history[3]
    assert [events.get("frozen_layers") for events, _ in logged] == [None, *[1.0] * 5]
    missing = [np.argwhere(TABLE.mask & ~before.mask).tolist() for before, _ in history[1]]
    assert missing == [[], *[[[CONV, 0, 3]]] * 5]
    programs = ("_begin", "_max_subnet", "_random_subnet", "_finish", "freeze_most_unstable")
    assert {counter.counts[name] for name in programs} == {1}
    assert totals[-1] == totals[1]  # the first event comes in the second epoch


def test_freezing_changes_what_is_drawn_without_recompiling(history, batch):
    made, states, keys, (counter, *_), _ = history
    before = states[0][0]
    mask = np.zeros_like(before.mask)
    mask[STEM, :, 0] = mask[HEAD, :, 0] = True
    mask[CONV, 0, 2] = mask[CONV, 1, 3] = True  # 3 bits of weights, 2 of activations
    with recording.CompileCounter() as again:
        state = jax.tree.map(jnp.array, before)._replace(mask=jnp.asarray(mask))
        after, _ = made.train_step(state, batch, keys[0])
    assert not {name for name in again.counts if name.startswith("_")}
    old, new = (v.batch_stats["block"]["norm"]["mean"] for v in (before.variables, after.variables))
    moved = np.any(old != np.asarray(new), axis=-1)
    assert np.argwhere(moved).tolist() == [[1, 2]]  # the largest allowed bits are the only ones


def rows_of(configs):
    return {
        (CHOICES.index(int(c.weights[CONV])), CHOICES.index(int(c.acts[CONV]))) for c in configs
    }


def test_rows_that_no_subnet_used_are_left_alone(history):
    """By momentum, weight decay and Adam alike, also where earlier steps had used them."""
    _, states, keys, _, _ = history
    resting, used_before = 0, set()
    for (before, after), key in zip(states, keys, strict=True):
        configs = [config(4, 4), *drawn(key, before.mask, 3)]
        used = rows_of(configs)
        old, new = before.variables, after.variables
        for row in np.ndindex(3, 3):
            pairs = [
                (
                    old.batch_stats["block"]["norm"][name][row],
                    new.batch_stats["block"]["norm"][name][row],
                )
                for name in ("mean", "var")
            ] + [
                (
                    old.trainable.params["block"]["norm"][name][row],
                    new.trainable.params["block"]["norm"][name][row],
                )
                for name in ("scale", "bias")
            ]
            for a, b in pairs:
                assert np.array_equal(a, b) == (row not in used)
        for axis, name in enumerate(("weight_step_sizes", "act_step_sizes")):
            for choice in range(3):
                a, b = (getattr(v.trainable, name)[CONV, 1 + choice] for v in (old, new))
                assert (a == b) == (choice not in {row[axis] for row in used})
        resting += len(used_before - used)
        used_before |= used
    assert resting > 0  # rows with momentum had to rest


def decay_at(step):
    return min(0.9997, (1 + step) / (10 + step))


def test_average_is_the_exponential_moving_average_with_warm_up(history):
    made, states, _, _, _ = history
    first = states[0][0]
    parts = lambda v: (v.trainable, v.batch_stats)  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, parts(first.average), parts(first.variables))
    average = parts(first.average)
    for step, (_, after) in enumerate(states):
        d = decay_at(step)
        average = jax.tree.map(
            lambda a, x, d=d: d * a + (1 - d) * x, average, parts(after.variables)
        )
        jax.tree.map(
            # float32 against float64
            lambda a, x: np.testing.assert_allclose(x, a, rtol=1e-5, atol=1e-7),
            average,
            parts(after.average),
        )
    assert made.variables(states[-1][1]) is states[-1][1].average


def cross_entropy(logits, labels, smoothing):
    log_p = jax.nn.log_softmax(logits)
    hard = -jnp.mean(log_p[jnp.arange(len(labels)), labels])
    return (1 - smoothing) * hard - smoothing * jnp.mean(log_p)


def quantization_error(w, step, bits):
    """Of one kernel, with 2 bits as the lowest ones."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    code = jax.lax.stop_gradient(jnp.clip(jnp.round(w / step), low, high))
    pulled = jnp.isin(code, jnp.array(sorted(pulled_codes(bits, 2)), jnp.float32))
    distance = jnp.clip(w, low * step, high * step) - code * step
    return jnp.sum(jnp.mean(jnp.where(pulled, distance, 0) ** 2, (0, 1, 2)))


def summed_loss(trainable, variables, batch, pairs, options, step):
    """The loss of all subnets of a step, in one expression; with the statistics after it.

    `pairs` are the bits that the random subnets drew for the layer between the fixed ones.
    """
    stats, steps = variables.batch_stats, jax.lax.stop_gradient(trainable.weight_step_sizes)
    w = trainable.params["block"]["conv"]["kernel"]
    twos = sum(b == 2 for b, _ in pairs)
    progress = step / RUN.steps
    total, taken_back, teacher = jnp.zeros(()), jnp.zeros(()), None
    for b, a in [(4, 4), *pairs]:
        bits = config(b, a)
        selected = supernet.select(
            TABLE,
            supernet.SupernetState(trainable, stats, variables.signed),
            bits,
            scale_step_gradient=options.scale_step_gradient,
        )
        out = supernet.apply(
            MODEL,
            TABLE,
            selected,
            batch["image"],
            train=True,
            scale_step_gradient=options.scale_step_gradient,
        )
        stats = supernet.scatter_batch_stats(TABLE, stats, bits, out.batch_stats)
        place = "block/norm" if options.idm_features == "norm_output" else "block"
        hard = cross_entropy(out.logits, batch["label"], options.label_smoothing)
        if teacher is None:
            total += hard
            teacher = jax.lax.stop_gradient((out.logits, out.features[place]))
            continue
        p = jax.nn.softmax(teacher[0])
        kl = jnp.mean(jnp.sum(p * (jnp.log(p) - jax.nn.log_softmax(out.logits)), -1))
        total += (1 - options.soft_label_weight) * hard + options.soft_label_weight * kl
        s = steps[CONV, TABLE.candidates.index(b)]
        total += 0.1 * 0.5 * (1 - np.cos(np.pi * progress)) * quantization_error(w, s, b)
        if b == 2:
            total += options.idm_weight * jnp.mean((out.features[place] - teacher[1]) ** 2)
            norm = 0.5 * jnp.sum(jnp.clip(w, -2 * s, s) ** 2)
            share = twos if options.two_bit_count == "once" else 1
            taken_back += -options.weight_decay / share * norm
    if options.gradient == "mean":
        total = total / (len(pairs) + 1)
    return total + taken_back, stats  # weight decay is not averaged, so what it loses is not either


def first_update(trainable, gradient, options):
    """The first step of SGD-Nesterov and of Adam, after clipping, in closed form."""
    clip = options.clip_value

    def sgd(path, w, g):
        g = jnp.clip(g, -clip, clip) if clip else g
        decay = options.weight_decay if path in ("stem/kernel", "block/conv/kernel") else 0.0
        return w - options.learning_rate * (1 + options.momentum) * (g + decay * w)

    def adam(s, g):
        g = jnp.clip(g, -clip, clip) if clip else g
        return s - options.step_learning_rate * g / (jnp.abs(g) + 1e-8)

    flat = paths.flatten(gradient.params)
    return supernet.TrainableParams(
        paths.map_leaves(trainable.params, lambda path, w: sgd(path, w, flat[path])),
        adam(trainable.weight_step_sizes, gradient.weight_step_sizes),
        adam(trainable.act_step_sizes, gradient.act_step_sizes),
    )


SWITCHED = dataclasses.replace(
    BASE,
    random_subnets=2,
    subnet_loop="unrolled",
    gradient="mean",
    two_bit_count="each",
    idm_features="block_output",
    label_smoothing=0.1,
    soft_label_weight=0.3,
    scale_step_gradient=True,
    clip_value=0.0,
    ema_warmup=False,
    ema_decay=0.75,
)


def two_bits_twice(mask, count):
    """Returns a key under which two subnets have 2-bit weights but not the same activations."""
    for seed in range(1000):
        configs = drawn(jax.random.key(seed), mask, count)
        pairs = [(int(c.weights[CONV]), int(c.acts[CONV])) for c in configs]
        if sum(w == 2 for w, _ in pairs) == 2 and len(set(pairs)) == count:
            return jax.random.key(seed), pairs
    raise AssertionError("no such draw")


@pytest.mark.parametrize(
    "options", [BASE, pytest.param(SWITCHED, marks=pytest.mark.slow)], ids=["sum", "mean"]
)
def test_a_step_follows_one_gradient_of_the_summed_loss(history, variables, batch, options):
    if options is BASE:
        made = history[0]
    else:
        made = rfquant.make(MODEL, TABLE, options, RUN)
    state = made.init(variables, batch["image"])
    key, pairs = two_bits_twice(state.mask, options.random_subnets)
    step = 20  # of 30: the quantization-error loss has weight
    variables = jax.tree.map(jnp.copy, state.variables)
    after, _ = made.train_step(state._replace(step=jnp.array(step, jnp.int32)), batch, key)

    @jax.jit
    def reference(trainable):
        gradient, stats = jax.grad(
            lambda p: summed_loss(p, variables, batch, pairs, options, step), has_aux=True
        )(trainable)
        return first_update(trainable, gradient, options), stats, gradient

    trainable, stats, gradient = reference(variables.trainable)
    wanted, found = paths.flatten(trainable.params), paths.flatten(after.variables.trainable.params)
    for path, leaf in wanted.items():
        # float32 gradients summed in another order, times a rate of 0.05
        np.testing.assert_allclose(found[path], leaf, rtol=1e-5, atol=2e-6, err_msg=path)
    for name in ("weight_step_sizes", "act_step_sizes"):
        pair = getattr(after.variables.trainable, name), getattr(trainable, name)
        np.testing.assert_allclose(*pair, rtol=1e-5, atol=1e-6)
    for path, leaf in paths.flatten(stats).items():
        found = paths.flatten(after.variables.batch_stats)[path]
        np.testing.assert_allclose(found, leaf, rtol=1e-5, atol=1e-6)
    if options.clip_value:
        largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient))
        assert largest > 2 * options.clip_value  # the bound was felt
    else:
        average = jax.tree.map(
            lambda old, new: 0.75 * old + 0.25 * new,
            variables.trainable,
            after.variables.trainable,
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
            after.average.trainable,
            average,
        )


def assert_same_step(found, wanted):
    """Compares states after one step whose float32 sums had another order."""
    pairs = zip(jax.tree.leaves(found.variables), jax.tree.leaves(wanted.variables), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("loop", ["scan", pytest.param("unrolled", marks=pytest.mark.slow)])
def test_all_loops_over_the_subnets_take_the_same_step(history, batch, loop):
    made = rfquant.make(MODEL, TABLE, dataclasses.replace(BASE, subnet_loop=loop), RUN)
    before, after = history[1][2]
    state, metrics = made.train_step(jax.tree.map(jnp.array, before), batch, history[2][2])
    assert_same_step(state, after)
    wanted = history[3][2][2][1]
    assert set(metrics) == set(wanted)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-4, atol=1e-6)  # float32


def test_a_batch_spread_over_eight_devices_takes_the_same_step(history, batch):
    made, states, keys, (_, _, logged), _ = history
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    before, after = states[2]
    state = jax.device_put(before, jax.sharding.NamedSharding(mesh, spec()))
    spread = jax.device_put(batch, jax.sharding.NamedSharding(mesh, spec("data")))
    state, metrics = made.train_step(state, spread, keys[2])
    assert_same_step(state, after)  # sums over devices come in another order
    np.testing.assert_allclose(metrics["loss_max"], logged[2][1]["loss_max"], rtol=1e-5)


SWITCHES = [
    ({"random_subnets": 0}, "loss_subnets"),
    ({"random_subnets": 0, "subnet_loop": "scan"}, "loss_subnets"),
    ({"soft_label_weight": 0.0}, "kl_subnets"),
    ({"idm_weight": 0.0}, "idm_subnets"),
    ({"qe_weight": 0.0}, "qe_subnets"),
    ({"two_bit_weight": 0.0}, "two_bit_subnets"),
    ({"clip_value": 0.0}, None),
    ({"ema_decay": 0.0}, None),
    ({"norm_banks": False}, None),
    ({"momentum": 0.0, "weight_decay": 0.0}, None),
]


@pytest.mark.parametrize(("change", "gone"), SWITCHES, ids=lambda value: str(value))
def test_every_element_can_be_switched_off(variables, batch, change, gone):
    """Traces a step without compiling it: the states fit, and the element's metric is gone."""
    made = rfquant.make(MODEL, TABLE, dataclasses.replace(BASE, **change), RUN)
    state = jax.eval_shape(made.init, variables, batch["image"])
    after, metrics = jax.eval_shape(made.train_step, state, batch, KEY)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert gone not in metrics
    assert made.variables(after) is (after.variables if "ema_decay" in change else after.average)


@pytest.mark.slow
@pytest.mark.parametrize(("change", "gone"), SWITCHES, ids=lambda value: str(value))
def test_training_with_an_element_switched_off(variables, batch, change, gone):
    made = rfquant.make(MODEL, TABLE, dataclasses.replace(BASE, **change), RUN)
    state = made.init(variables, batch["image"])
    for step in range(3):
        state, metrics = made.train_step(state, batch, jax.random.key(step))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))
    assert gone not in metrics


def test_with_all_elements_off_a_step_is_plain_quantized_training(variables, batch):
    options = Options(
        random_subnets=0,
        clip_value=0.0,
        ema_decay=0.0,
        norm_banks=False,
        momentum=0.0,
        weight_decay=0.0,
        learning_rate=0.1,
        end_learning_rate=0.1,
        warmup=0.0,
        freeze_ratio_start=0.0,
        freeze_ratio_end=0.0,
        subnet_loop="unrolled",
    )
    made = rfquant.make(MODEL, TABLE, options, RUN)
    state = made.init(variables, batch["image"])
    assert made.on_epoch(state, 5)[1] == {}
    before = snapshot(state)
    after, metrics = made.train_step(state, batch, KEY)
    start = jax.tree.map(jnp.array, before.variables)
    table = TABLE.with_bn_banks("shared")

    @jax.jit
    def gradient(params):
        def loss(params):
            trainable = start.trainable._replace(params=params)
            selected = supernet.select(table, start._replace(trainable=trainable), config(4, 4))
            out = supernet.apply(MODEL, table, selected, batch["image"], train=True)
            return cross_entropy(out.logits, batch["label"], 0.0)

        return jax.value_and_grad(loss)(params)

    loss, wanted = gradient(start.trainable.params)
    np.testing.assert_allclose(metrics["loss_max"], loss, rtol=1e-6)
    jax.tree.map(
        lambda new, old, g: np.testing.assert_allclose(new, old - 0.1 * g, atol=1e-6),
        after.variables.trainable.params,
        start.trainable.params,
        wanted,
    )


@pytest.mark.parametrize("epochs", [1, 2, 40])
def test_runs_of_any_length_can_be_made_and_traced(variables, batch, epochs):
    run = Run(epochs, 1, RUN.prepare)
    made = rfquant.make(MODEL, TABLE, Options(), run)
    state = jax.eval_shape(made.init, variables, batch["image"])
    jax.eval_shape(made.train_step, state, batch, KEY)


def test_a_table_without_choices_is_refused():
    table = trace_layers(MODEL, (8, 8, 1), rules=[Rule(weights=4, acts=4)])
    with pytest.raises(ValueError, match="no layer of the table has a choice"):
        rfquant.make(MODEL, table, BASE, RUN)


def test_evaluation_names_uniform_bits_and_predict_needs_them(history, batch):
    made, states = history[:2]
    assert list(made.eval_bits) == ["w4a4", "w3a3", "w2a2"]
    average = made.variables(jax.tree.map(jnp.array, states[-1][1]))
    with pytest.raises(ValueError, match="bits"):
        made.predict(average, None, batch["image"])
    predict = jax.jit(made.predict)
    before = snapshot(average)
    logits = [predict(average, bits, batch["image"]) for bits in made.eval_bits.values()]
    assert not np.array_equal(logits[0], logits[2])
    jax.tree.map(np.testing.assert_array_equal, average, before)


# Ties: crosswise between layers, and of a layer's weights and input.


def tied_deep():
    entry = {name: 2 * index for index, name in enumerate(DEEP.names)}
    ties = (
        (entry["conv0"], entry["conv1"], entry["depthwise2"] + 1),
        (entry["conv2"], entry["conv2"] + 1),
    )
    return dataclasses.replace(DEEP, tied_groups=ties)


@pytest.mark.parametrize("layer", ["conv0", "conv1", "depthwise2", "conv2"])
@pytest.mark.parametrize("freeze_acts", [False, True])
def test_what_is_drawn_honours_ties_and_what_is_frozen(layer, freeze_acts):
    """A bit that one of a group may not take, none of it takes."""
    table, options = tied_deep(), Options(random_subnets=200, freeze_acts=freeze_acts)
    names = [table.names[i] for i in freezing.freezable(table)]
    scores = jnp.asarray([float(name == layer) for name in names], jnp.float32)
    mask = freezing.freeze(table, scores, jnp.int32(1), options=options)
    zeros = jnp.zeros(len(table))
    state = method.TrainState(jnp.int32(0), zeros, None, zeros, mask)
    plan = method._plan(table, options, RUN, state, KEY, KEY)
    drawn = np.stack(plan.configs, axis=-1)
    place = (drawn[..., None] == np.array(table.candidates)).argmax(-1)
    assert np.asarray(mask)[np.arange(len(table))[:, None], np.arange(2), place].all()
    for group in table.tied_groups:
        flat = drawn.reshape(200, -1)[:, list(group)]
        assert (flat == flat[:, :1]).all()
        assert len(np.unique(flat)) == mask.reshape(-1, 6)[group[0]].sum() > 1
    table.check(plan.max_bits)
    np.testing.assert_array_equal(plan.lowest, drawn[..., 0].min(0))
    frozen = np.argwhere(table.mask & ~np.asarray(mask))
    assert len(frozen) and {table.names[i] for i, *_ in frozen} >= {layer}

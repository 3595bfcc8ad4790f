import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.call_counts import tick, ticks_of
from helpers.random_variables import drawn_variables

from mpq_jax.parallel import mesh as sharding
from mpq_jax.quantizers import QUANTIZERS
from mpq_jax.supernet import scoring
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import bit_rules
from mpq_jax.supernet.scoring import make_score
from mpq_jax.supernet.supernet import Supernet
from mpq_jax.training.metrics import CompileCounter


class Net(nn.Module):
    dropout: float = 0.0
    ticking: bool = False

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="stem")(x))
        x = nn.Conv(6, (3, 3), use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = tick("forward", x) if self.ticking else x
        if self.dropout:
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.relu(nn.Dense(8, name="hidden")(x.mean((1, 2))))
        return nn.Dense(3, name="head")(x)


MODEL, SHAPE, BATCH = Net(), (8, 8, 1), 16
TABLE = trace_layers(MODEL, SHAPE, rules=bit_rules((4, 3, 2)))
NET = Supernet(MODEL, TABLE, quantizer=QUANTIZERS["lsq"])
TICKING = dataclasses.replace(NET, model=Net(ticking=True))
INIT = jax.jit(Supernet.init, static_argnums=0)
LABELS = jnp.arange(BATCH, dtype=jnp.int32) % 3


def drawn_images(seed, *shape):
    drawn = np.random.default_rng(seed).normal(size=(*shape, *SHAPE))
    return jnp.asarray(drawn, jnp.float32)


IMAGES = drawn_images(0, BATCH)
CALIBRATION = drawn_images(1, 3, 8)


@pytest.fixture(scope="module")
def made():
    """A supernet whose norm rows all differ."""
    made = INIT(NET, drawn_variables(MODEL, SHAPE, 1), IMAGES)
    generator = np.random.default_rng(2)

    def disturb(leaf):
        return leaf * jnp.asarray(generator.uniform(0.7, 1.4, leaf.shape), jnp.float32)

    return made._replace(batch_stats=jax.tree.map(disturb, made.batch_stats))


def configs(seed, count=5):
    choices = np.random.default_rng(seed).choice([4, 3, 2], (2, count, 2))
    fixed = np.full((2, count, 1), 8)
    weights, acts = np.concatenate([fixed, choices, fixed], axis=-1).astype(np.int32)
    return BitConfig(jnp.asarray(weights), jnp.asarray(acts))


@functools.cache
def forward(net, norms):
    """The logits of one subnet, by `select` and `recalibrate`."""

    @jax.jit
    def logits(made, bits):
        if norms == "recalibrated":
            made = net.recalibrate(made, bits, CALIBRATION)
        return net.forward(net.select(made, bits), IMAGES, train=norms == "batch").logits

    return logits


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def naive(made, population, metric, norms="batch", net=NET):
    """One configuration at a time; the metrics in NumPy, in float64."""
    logits = functools.partial(forward(net, norms), made)
    teacher = log_softmax(np.asarray(logits(TABLE.max_config), np.float64))
    found = []
    for index in range(len(population.weights)):
        one = jax.tree.map(lambda leaf, i=index: leaf[i], population)
        predicted = log_softmax(np.asarray(logits(one), np.float64))
        found.append(
            {
                "error": np.mean(predicted.argmax(-1) != np.asarray(LABELS)),
                "loss": -np.mean(predicted[np.arange(BATCH), np.asarray(LABELS)]),
                "kl": np.mean((np.exp(teacher) * (teacher - predicted)).sum(-1)),
            }[metric]
        )
    return found


@pytest.mark.slow_but_first
@pytest.mark.parametrize(
    ("metric", "norms", "quantizer"),
    [
        ("error", "batch", "lsq"),
        ("loss", "batch", "double_rounding"),
        ("kl", "batch", "lsq"),
        ("loss", "stored", "lsq"),
        ("kl", "recalibrated", "double_rounding_unshared"),
    ],
)
def test_scores_are_those_of_one_forward_for_each_configuration(made, metric, norms, quantizer):
    net = dataclasses.replace(NET, quantizer=QUANTIZERS[quantizer])
    calibration = CALIBRATION if norms == "recalibrated" else None
    before = jax.tree.map(np.array, made)
    score = make_score(net, made, metric=metric, norms=norms, calibration=calibration)
    with CompileCounter() as counter:
        found = [score(configs(seed), IMAGES, LABELS) for seed in (1, 2, 1)]
    assert counter.counts["score_configs"] == 1
    for scores, seed in zip(found, (1, 2, 1), strict=True):
        wanted = naive(made, configs(seed), metric, norms, net)
        # Means in float32; a divergence is a difference of numbers of order 1.
        np.testing.assert_allclose(scores, wanted, rtol=1e-5, atol=2e-7)
    assert len(set(np.asarray(found[0]).tolist())) > 1
    np.testing.assert_array_equal(found[0], found[2])
    jax.tree.map(np.testing.assert_array_equal, made, before)  # no side effects


@pytest.fixture(scope="module")
def score(made):
    return make_score(NET, made, metric="loss")


def test_any_number_of_configurations_is_one_compilation(made, score):
    score(configs(1), IMAGES, LABELS)
    many = configs(5, 2 * scoring.PER_CALL + 6)
    wanted = naive(made, many, "loss")
    with CompileCounter() as counter:
        for count in (1, 2, scoring.PER_CALL, scoring.PER_CALL + 1, len(many.weights)):
            found = score(jax.tree.map(lambda leaf, n=count: leaf[:n], many), IMAGES, LABELS)
            assert found.shape == (count,)
            np.testing.assert_allclose(found, wanted[:count], rtol=1e-5)
    assert not counter.counts["score_configs"]


def test_bits_of_numpy_and_other_images_compile_nothing(made, score):
    wanted = score(configs(1), IMAGES, LABELS)
    with CompileCounter() as counter:
        found = score(BitConfig(*map(np.asarray, configs(1))), IMAGES, LABELS)
        other = score(configs(1), IMAGES + 1, LABELS[::-1])
    assert not counter.counts["score_configs"]
    np.testing.assert_array_equal(found, wanted)
    assert np.all(np.asarray(other) != np.asarray(wanted))


def test_room_that_is_left_over_computes_nothing(made):
    score = make_score(TICKING, made, metric="loss")
    score(configs(1), IMAGES, LABELS)
    assert ticks_of(lambda: score(configs(1, 7), IMAGES, LABELS)) == {"forward": 7}


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_configurations_are_split_over_devices(made, score, devices):
    mesh = sharding.make_mesh(devices)
    split = make_score(NET, made, metric="loss", mesh=mesh)
    images, labels = sharding.replicate((IMAGES, LABELS), mesh)
    many = configs(5, scoring.PER_CALL + 3)  # neither number is a multiple of the devices
    found = split(many, images, labels)
    np.testing.assert_array_equal(found, score(many, IMAGES, LABELS))
    few = jax.tree.map(lambda leaf: leaf[:3], many)
    np.testing.assert_array_equal(split(few, images, labels), np.asarray(found)[:3])


def test_every_device_gets_its_part_of_the_configurations(made):
    mesh = sharding.make_mesh(4)
    split = make_score(TICKING, made, metric="loss", mesh=mesh)
    images, labels = sharding.replicate((IMAGES, LABELS), mesh)
    assert ticks_of(lambda: split(configs(1, 9), images, labels)) == {"forward": 9}


@pytest.mark.slow
@pytest.mark.parametrize("norms", ["batch", "stored"])
def test_images_are_split_over_devices(made, norms):
    split_score = make_score(NET, made, metric="loss", norms=norms)
    found = split_score(configs(1), IMAGES, LABELS)
    mesh = sharding.make_mesh(8)
    batch = sharding.global_batch({"image": np.asarray(IMAGES), "label": np.asarray(LABELS)}, mesh)
    with CompileCounter() as counter:
        for _ in range(2):
            split = split_score(configs(1), batch["image"], batch["label"])
    assert counter.counts["score_configs"] == 1
    # Sums in another order; a step size is far more, so no code may have changed.
    np.testing.assert_allclose(split, found, rtol=1e-6)


def test_scoring_switches_dropout_off(made, score):
    model = Net(dropout=0.5)
    assert trace_layers(model, SHAPE, rules=bit_rules((4, 3, 2))) == TABLE
    dropping = make_score(dataclasses.replace(NET, model=model), made, metric="loss")
    found = dropping(configs(1), IMAGES, LABELS)
    np.testing.assert_array_equal(found, score(configs(1), IMAGES, LABELS))


def test_the_largest_subnet_does_not_diverge_from_itself(made):
    score = make_score(NET, made, metric="kl")
    largest = jax.tree.map(lambda leaf: leaf[None], TABLE.max_config)
    np.testing.assert_allclose(score(largest, IMAGES, LABELS), 0, atol=1e-7)  # of float32 terms


class HalfPrecision(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
        x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x)).mean((1, 2))
        return nn.Dense(3, name="head")(x).astype(jnp.bfloat16)


@pytest.mark.parametrize("metric", ["loss", "kl"])
def test_logits_may_have_less_precision(metric):
    model = HalfPrecision()
    table = trace_layers(model, SHAPE, rules=bit_rules((4, 3, 2)))
    net = Supernet(model, table, quantizer=NET.quantizer)
    made = INIT(net, drawn_variables(model, SHAPE, 1), IMAGES)
    configs = jax.tree.map(lambda leaf: leaf[None], table.uniform(2, 3))
    found = make_score(net, made, metric=metric)(configs, IMAGES, LABELS)
    assert found.dtype == jnp.float32 and np.all(np.isfinite(found))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"metric": "f1"}, "'f1'; known metrics? are .*error.*loss.*kl"),
        ({"norms": "moving"}, "'moving'; known norms are .*batch.*recalibrated.*stored"),
        ({"norms": "recalibrated"}, "images are missing; 'recalibrated' alone needs them"),
        ({"calibration": CALIBRATION}, "'batch' and calibration images are given"),
        ({"norms": "stored", "calibration": CALIBRATION}, "'stored' and calibration images are"),
    ],
)
def test_what_no_score_can_be_made_of_is_refused(made, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_score(NET, made, **wrong)

"""The way of a user's own model: float training, RFQuant, search, recalibration, evaluation."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets

from mpq_jax.methods import float_training, rfquant
from mpq_jax.methods.base import TrainingInfo
from mpq_jax.program import network
from mpq_jax.search.greedy import greedy_search
from mpq_jax.search.problem import Budget, Constraint
from mpq_jax.search.scoring import on_drawn_images
from mpq_jax.search.space import SearchSpace
from mpq_jax.supernet import costs
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import bit_rules
from mpq_jax.supernet.scoring import make_score
from mpq_jax.tasks.evaluation import make_evaluate
from mpq_jax.training.metrics import CompileCounter

BATCH, STEPS_PER_EPOCH, EPOCHS = 96, 8, 10
TRAIN_IMAGES = 1344  # of 1797; the others are tested on


class DigitNet(nn.Module):
    """Knows nothing of this library."""

    @nn.compact
    def __call__(self, x, training: bool):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        for features, stride in ((12, 2), (16, 2)):
            x = nn.Conv(features, (3, 3), strides=stride, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not training, momentum=0.9)(x))
        x = nn.relu(nn.Dense(24)(x.reshape(len(x), -1)))
        x = nn.relu(nn.Dense(24)(x))
        return nn.Dense(10)(x)


MODEL = DigitNet()
TABLE = trace_layers(MODEL, (8, 8, 1), rules=bit_rules((8, 7, 6, 5, 4, 3, 2)))
RUN = TrainingInfo(EPOCHS, STEPS_PER_EPOCH, lambda batch, key: batch["image"])


@pytest.fixture(scope="module")
def digits():
    stored = sklearn.datasets.load_digits()
    images = jnp.asarray(stored["images"][..., None] / 16 - 0.3, jnp.float32)
    return images, jnp.asarray(stored["target"], jnp.int32)


def train_batches(digits):
    images, labels = digits
    generator = np.random.default_rng(0)
    while True:
        chosen = generator.choice(TRAIN_IMAGES, BATCH, replace=False)
        yield {"image": images[chosen], "label": labels[chosen]}


def train(method, state, batches):
    """Trains a whole run; returns the state and what the scheduler did."""
    events = []
    for epoch in range(EPOCHS):
        state, happened = method.on_epoch(state, epoch)
        events.append(happened)
        for step, batch in enumerate(itertools.islice(batches, STEPS_PER_EPOCH)):
            key = jax.random.fold_in(jax.random.key(epoch), step)
            state, metrics = method.train_step(state, batch, key)
    assert all(np.isfinite(value) for value in metrics.values())
    return state, events


@pytest.mark.slow
def test_a_users_model_is_trained_once_and_searched_for_two_budgets(digits):
    images, labels = digits
    batches = train_batches(digits)
    weight = jnp.ones(len(images) - TRAIN_IMAGES)
    test = [{"image": images[TRAIN_IMAGES:], "label": labels[TRAIN_IMAGES:], "weight": weight}]

    variables = jax.jit(lambda key: network.init_variables(MODEL, key, (8, 8, 1)))(
        jax.random.key(0)
    )
    floats = float_training.make(MODEL, TABLE, float_training.Options(), RUN)
    state, _ = train(floats, floats.init(variables, images[:BATCH]), batches)
    float_score = make_evaluate(floats.predict, lambda x: x)(floats.variables(state), None, test)

    options = rfquant.Options(learning_rate=0.02, step_learning_rate=1e-3, subnet_loop="calls")
    method = rfquant.make(MODEL, TABLE, options, RUN)
    with CompileCounter() as counter:
        trained, events = train(
            method, method.init(floats.variables(state), images[:BATCH]), batches
        )
        net, supernet = method.net, method.variables(trained)
        score = on_drawn_images(
            make_score(net, supernet),
            images[:TRAIN_IMAGES],
            labels[:TRAIN_IMAGES],
            size=BATCH,
        )
        scored = []

        def counting_score(configs, key):
            scored.append(len(configs.weights))
            return score(configs, key)

        cost = costs.cost_table(TABLE, "bitops")
        limits = [float(costs.bitops(TABLE, TABLE.uniform(b, b))) for b in (4, 3)]
        results = greedy_search(
            counting_score,
            SearchSpace(TABLE),
            [Budget(f"{limit:g}", (Constraint("bitops", cost, limit),)) for limit in limits],
            jax.random.key(0),
            start_bits=8,
        )
        evaluate = make_evaluate(method.predict, lambda x: x)
        calibration = images[:TRAIN_IMAGES].reshape(-1, BATCH, 8, 8, 1)
        accuracies = []
        for found in results:
            ready = net.recalibrate(supernet, found.bits, calibration)
            accuracies.append(evaluate(ready, found.bits, test).accuracy)

    assert float_score.accuracy > 0.85
    assert min(accuracies) > 0.7  # chance is 0.1
    for found, limit in zip(results, limits, strict=True):
        TABLE.check(found.bits)
        assert found.costs["bitops"] <= limit * (1 + 1e-6)
    assert max(event.get("frozen_layers", 0) for event in events) >= 1
    assert sum(scored) > 100
    programs = ("_begin", "_max_subnet", "_random_subnet", "_finish", "freeze_most_unstable")
    programs += ("score_configs", "_recalibrate", "evaluate_batch")
    assert {name: counter.counts[name] for name in programs} == dict.fromkeys(programs, 1)

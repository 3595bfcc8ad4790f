"""Options of RFQuant: published values, learning rates and optimizers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rfquant_networks import RUN, TABLE, with_kernel

from mpq_jax.methods.base import TrainingInfo
from mpq_jax.methods.rfquant import method
from mpq_jax.methods.rfquant.options import Options, published
from mpq_jax.program import paths
from mpq_jax.supernet.state import TrainableParams


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
        idm_features="published",
        first_steps="three_sigma",
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
        unbiased_variance=True,
    )
    assert {name: getattr(options, name) for name in wanted} == wanted
    assert round(options.qe_start * 150) == 40
    assert published(label_smoothing=0.1).label_smoothing == 0.1


@pytest.mark.parametrize("steps_per_epoch", [1, 7, 45, 2502])
def test_learning_rates_of_the_published_run(steps_per_epoch):
    """Reads the rates off the optimizer's moves under a gradient of one, epoch by epoch."""
    options = published(momentum=0.0, weight_decay=0.0)
    run = TrainingInfo(150, steps_per_epoch, RUN.prepare)
    trainable = with_kernel(np.ones((3, 3, 4, 4)), 1.0)
    optimizer = method.make_optimizer(TABLE.with_bn_banks("shared"), options, run)
    used = jax.tree.map(lambda _: jnp.array(True), trainable.params)
    used = TrainableParams(used, jnp.ones((3, 4), bool), jnp.ones((3, 4), bool))
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


@pytest.mark.slow
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
    used = TrainableParams(used, jnp.ones((3, 4), bool), jnp.ones((3, 4), bool))
    gradient = jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.01), trainable)
    updates, _ = optimizer.update(gradient, optimizer.init(trainable), trainable, used=used)
    moved = paths.flatten(updates.params)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4)  # Adam's epsilon
    close(moved["block/conv/kernel"], 0.1 * (1 - 0.5 * 2.0), atol=1e-6)
    close(moved["head/kernel"], 0.1)
    for path in [path for path in moved if "norm" in path]:
        row = np.where(np.arange(9).reshape(3, 3, 1) < 4, 0.1, 0.0)
        close(moved[path], np.broadcast_to(row, (3, 3, 4)))

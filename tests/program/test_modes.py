"""Modes: models whose norms do not do what training and evaluation ask of them are refused."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mpq_jax.program.function import function
from mpq_jax.program.layers import shapes_of
from mpq_jax.program.modes import check_modes
from mpq_jax.program.network import as_network, example_batch
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import Rule

FEATURES = (4,)


def check(model, inputs=FEATURES):
    network, batch = as_network(model), example_batch(inputs)
    check_modes(network, shapes_of(network, batch), batch)


class Normed(nn.Module):
    """A norm whose mode follows `train` unless it is fixed; the layers are as many as asked."""

    fixed: bool | None = None
    norms: int = 1

    @nn.compact
    def __call__(self, x, train=False):
        running = not train if self.fixed is None else self.fixed
        for index in range(self.norms):
            x = nn.BatchNorm(use_running_average=running, name=f"norm{index}")(nn.Dense(3)(x))
        return x


# What passes.


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm()(nn.Dense(3)(x))


class Turn(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x, _):
        return nn.BatchNorm(use_running_average=not self.train)(nn.Dense(4)(x)), None


class Scanned(nn.Module):
    """Statistics that a loop updates in every turn."""

    @nn.compact
    def __call__(self, x, train=False):
        axes = {"params": 0, "batch_stats": 0}
        turns = nn.scan(Turn, variable_axes=axes, split_rngs={"params": True}, length=2)
        return turns(train, name="turns")(x, None)[0]


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x, mask, train=False):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x), mask=mask[:, None])


class OfNnx(nnx.Module):
    def __init__(self, **options):
        rngs = nnx.Rngs(0)
        self.dense, self.norm = nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs, **options)

    def __call__(self, x):
        return self.norm(self.dense(x))


def by_hand(update, *, read=True):
    """A function with a running mean, which `update` of the running and the batch's gives."""

    def network(variables, x, train):
        running = variables["batch_stats"]["norm"]["mean"]
        mean = x.mean(0) if train or not read else running
        x = (x - mean[None]) @ variables["params"]["w"]
        stats = {"norm": {"mean": update(running, mean, x, train)}}
        return x, stats

    params = {"w": jnp.ones((4, 3))}
    return function(network, {"params": params, "batch_stats": {"norm": {"mean": jnp.zeros(4)}}})


def moving(running, mean, x, train):
    return 0.9 * running + 0.1 * mean if train else running


BATCH = (
    jax.ShapeDtypeStruct((2, 4), jnp.float32),
    jax.ShapeDtypeStruct((2,), jnp.bool_),
)
SOUND = {
    "no norm with statistics": (Plain, FEATURES),
    "a norm": (Normed, FEATURES),
    "several norms": (functools.partial(Normed, norms=3), FEATURES),
    "a norm in a loop": (Scanned, FEATURES),
    "a norm with a mask": (Masked, BATCH),
    "NNX": (OfNnx, FEATURES),
    "a function": (lambda: by_hand(moving), FEATURES),
}


@pytest.mark.parametrize("name", SOUND)
def test_norms_that_follow_the_mode_pass(name):
    make, inputs = SOUND[name]
    check(make(), inputs)


def test_statistics_with_counters_pass():
    """Counters are integers, and no norm computes with them."""

    def network(variables, x, train):
        stats = variables["batch_stats"]
        mean = x.mean(0) if train else stats["mean"]
        moved = {"mean": moving(stats["mean"], mean, x, train), "count": stats["count"] + 1}
        return (x - mean[None]) @ variables["params"], moved

    stats = {"mean": jnp.zeros(4), "count": jnp.int32(0)}
    check(function(network, {"params": jnp.ones((4, 3)), "batch_stats": stats}))


def test_a_norm_with_one_updated_and_one_constant_statistic_passes():
    def network(variables, x, train):
        stats = variables["batch_stats"]
        mean = x.mean(0) if train else stats["mean"]
        x = (x - mean[None]) / stats["width"][None] @ variables["params"]
        return x, stats | {"mean": moving(stats["mean"], mean, x, train)}

    stats = {"mean": jnp.zeros(4), "width": jnp.ones(4)}
    check(function(network, {"params": jnp.ones((4, 3)), "batch_stats": stats}))


# What is refused.


def test_a_norm_that_always_uses_the_batch_is_refused():
    message = (
        r"Normed changes running statistics in evaluation mode \(batch_stats/norm0/mean, "
        r"batch_stats/norm0/var\).*use_running_average=not train"
    )
    with pytest.raises(ValueError, match=message):
        check(Normed(fixed=False))


def test_three_statistics_are_named_at_most():
    with pytest.raises(ValueError, match=r"norm1/mean and 3 more\)"):
        check(Normed(fixed=False, norms=3))


def test_a_norm_that_never_uses_the_batch_is_refused():
    message = "Normed does not update its running statistics in training mode.*argument `train`"
    with pytest.raises(ValueError, match=message):
        check(Normed(fixed=True))


def test_a_model_without_a_mode_is_refused():
    class Modeless(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True)(nn.Dense(3)(x))

    with pytest.raises(ValueError, match="Modeless does not update .* give it an argument `train`"):
        check(Modeless())


@pytest.mark.parametrize(
    ("fixed", "message"),
    [(True, "does not update its running"), (False, "changes running statistics in evaluation")],
)
def test_norms_of_nnx_with_a_fixed_mode_are_refused(fixed, message):
    class Fixed(OfNnx):
        def __call__(self, x):
            return self.norm(self.dense(x), use_running_average=fixed)

    with pytest.raises(ValueError, match=f"Fixed {message}"):
        check(Fixed())


def test_statistics_that_are_updated_and_never_read_are_refused():
    with pytest.raises(ValueError, match="has running statistics, but does not read them in eval"):
        check(by_hand(moving, read=False))


@pytest.mark.parametrize(
    "update",
    [
        lambda running, mean, x, train: running * mean if train else running,
        lambda running, mean, x, train: mean if train else running,
        lambda running, mean, x, train: jnp.maximum(running, mean) if train else running,
    ],
)
def test_statistics_that_are_no_moving_average_are_refused(update):
    message = r"in a form that is not known \(batch_stats/norm/mean\); wanted decay \* running"
    with pytest.raises(ValueError, match=message):
        check(by_hand(update))


def test_statistics_that_change_in_evaluation_alone_are_refused():
    with pytest.raises(ValueError, match="network changes running statistics in evaluation mode"):
        check(by_hand(lambda running, mean, x, train: running if train else 2.0 * running))


@pytest.mark.parametrize("turned", [False, True])
def test_moving_averages_are_known_in_any_order_of_their_terms(turned):
    def update(running, mean, x, train):
        if not train:
            return running
        terms = np.float32(0.9) * running, mean * 0.1
        return terms[turned] + terms[not turned]

    check(by_hand(update))


def test_tables_check_the_modes():
    with pytest.raises(ValueError, match="changes running statistics in evaluation mode"):
        trace_layers(Normed(fixed=False), FEATURES, rules=[Rule()])

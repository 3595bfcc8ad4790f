import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_variables import drawn_variables

from mpq_jax.methods import METHODS, float_training
from mpq_jax.methods.base import TrainingInfo
from mpq_jax.program import paths
from mpq_jax.supernet.layer_table import trace_layers


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(6, (3, 3), strides=2, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(3, name="head")(x.reshape(len(x), -1))


MODEL = Net()
TABLE = trace_layers(MODEL, (8, 8, 1))
RUN = TrainingInfo(epochs=5, steps_per_epoch=4, prepare=lambda batch, key: batch["image"])
SHAPE = (8, 8, 1)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def variables():
    return drawn_variables(MODEL, SHAPE, 0)


@pytest.fixture(scope="module")
def batch():
    labels = np.arange(24, dtype=np.int32) % 3
    noise = np.random.default_rng(0).normal(size=(24, 8, 8, 1))
    images = noise + np.linspace(-1, 1, 8)[:, None] * (labels - 1)[:, None, None, None]
    return {"image": jnp.asarray(images, jnp.float32), "label": jnp.asarray(labels)}


def make(**options):
    return float_training.make(MODEL, TABLE, float_training.Options(**options), RUN)


@pytest.fixture(scope="module")
def trained(variables, batch):
    """A whole run: the method, its last state, metrics of every step, what became of the input."""
    given = jax.tree.map(np.array, variables)
    method = make(learning_rate=0.1)
    state, history = method.init(variables, batch["image"]), []
    first = jax.tree.leaves(state.params)
    for step in range(RUN.steps):
        state, metrics = method.train_step(state, batch, jax.random.key(step))
        history.append(metrics)
    unharmed = jax.tree.all(jax.tree.map(np.array_equal, variables, given))
    return method, state, history, (unharmed, all(leaf.is_deleted() for leaf in first))


def test_training_reduces_the_loss(trained):
    _, state, history, _ = trained
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]
    assert history[-1]["accuracy"] > 0.9
    assert state.step == RUN.steps


def test_predict_uses_running_statistics(trained, batch):
    method, state, *_ = trained
    found = method.predict(method.variables(state), None, batch["image"])
    wanted = MODEL.apply(method.variables(state), batch["image"], train=False)
    np.testing.assert_array_equal(found, wanted)
    one = method.predict(method.variables(state), None, batch["image"][:1])
    np.testing.assert_allclose(one, wanted[:1], rtol=1e-5, atol=1e-5)  # batches of another size


def test_the_state_is_consumed_but_the_callers_variables_survive(trained):
    unharmed, consumed = trained[3]
    assert unharmed
    assert consumed  # donated: there is no second copy of the state


def test_learning_rate_warms_up_and_follows_a_cosine(trained):
    rates = np.array([metrics["learning_rate"] for metrics in trained[2]])
    t = np.arange(20) / 20
    wanted = np.where(t < 0.05, 0.1 * t / 0.05, 0.05 * (1 + np.cos(np.pi * t)))
    np.testing.assert_allclose(rates, wanted, rtol=1e-5, atol=1e-8)  # float32 cosine


def test_weight_decay_acts_on_kernels_only(variables, batch):
    # Two first steps that differ in the decay alone; the rate at step 0 is its peak.
    base = dict(learning_rate=0.1, warmup=0.0, momentum=0.0)
    after = []
    for decay in (0.0, 0.5):
        method = make(weight_decay=decay, **base)
        state, _ = method.train_step(method.init(variables, batch["image"]), batch, KEY)
        after.append(paths.flatten(state.params))
    for path, leaf in paths.flatten(variables["params"]).items():
        taken = after[0][path] - after[1][path]
        wanted = 0.1 * 0.5 * leaf if path.endswith("kernel") else jnp.zeros_like(leaf)
        np.testing.assert_allclose(taken, wanted, atol=1e-6)  # a difference of float32 of order 1


def test_adamw_moves_by_signs_and_decays_kernels_alone(variables, batch):
    method = make(optimizer="adamw", learning_rate=0.01, warmup=0.0, weight_decay=0.5)
    state, _ = method.train_step(method.init(variables, batch["image"]), batch, KEY)
    after = paths.flatten(state.params)
    for path, leaf in paths.flatten(variables["params"]).items():
        if path == "conv/bias":
            continue  # the norm takes it away again, so that its gradient is rounding noise
        decay = 0.5 * leaf if path.endswith("kernel") else jnp.zeros_like(leaf)
        direction = (leaf - after[path]) / 0.01 - decay
        # Adam's first step is the gradient's sign; a difference of float32 over the rate.
        np.testing.assert_allclose(np.abs(direction), 1, atol=2e-3)


def test_unknown_optimizers_are_refused():
    with pytest.raises(ValueError, match=r"optimizer is 'adam'; wanted one of \('sgd', 'adamw'\)"):
        float_training.Options(optimizer="adam")


def test_epochs_bring_no_events(trained):
    method, state, *_ = trained
    same, events = method.on_epoch(state, 3)
    assert same is state
    assert events == {}
    assert method.eval_bits == {"float": None}


def test_all_methods_are_listed():
    names = ["csq", "csq_uniform", "double_rounding", "double_rounding_mixed", "plain", "rfquant"]
    assert sorted(METHODS) == names
    assert METHODS["plain"].options is float_training.Options

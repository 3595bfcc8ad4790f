"""Every method trains a model that computes in bfloat16; what is learned stays float32.

Mixing types is an error when a step is traced, so most of it is only traced here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_variables import drawn_variables

from mpq_jax.methods import METHODS
from mpq_jax.methods.base import TrainingInfo
from mpq_jax.models.resnet import ResNet
from mpq_jax.models.vit import ViT
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import bit_rules

SHAPE = (4, 4, 1)
KEY = jax.random.key(1)
RUN = TrainingInfo(epochs=2, steps_per_epoch=1, prepare=lambda batch, key: batch["image"])
MODELS = {
    "convolutions": functools.partial(ResNet, 3, (1,), width=2),
    "transformer": functools.partial(ViT, 3, patch_size=2, dim=4, depth=1, heads=2),
}
OPTIONS = {
    "plain": {"warmup": 0.0},
    # All of its terms from the first step on.
    "rfquant": {"random_subnets": 1, "warmup": 0.0, "qe_start": 0.0, "subnet_loop": "unrolled"},
    "double_rounding": {"distill_weight": 0.5},
    "double_rounding_mixed": {"trace_probes": 2, "trace_batch": 4},
    "csq": {"target": 2.0},
    "csq_uniform": {"planes": 2},
}
BATCH = {
    "image": jnp.asarray(np.random.default_rng(0).normal(size=(8, *SHAPE)), jnp.float32),
    "label": jnp.arange(8, dtype=jnp.int32) % 3,
}


@pytest.fixture(params=MODELS)
def models(request):
    return MODELS[request.param]


def method_of(model, name):
    table = trace_layers(model, SHAPE, rules=bit_rules((4, 2)))
    family = METHODS[name]
    return family.make(model, table, family.options(**OPTIONS[name]), RUN)


def step_of(method):
    """Returns a function that does all that training does, once, and predicts."""

    def run(variables, batch):
        before = method.init(variables, batch["image"], batch["label"])
        state, metrics = method.train_step(jax.tree.map(jnp.array, before), batch, KEY)
        bits = next(iter(method.eval_bits.values()))
        logits = method.predict(method.variables(state), bits, batch["image"])
        return before, state, metrics, logits

    return run


def check(before, after, metrics, logits):
    types = jax.tree.map(lambda leaf: leaf.dtype, before)
    assert types == jax.tree.map(lambda leaf: leaf.dtype, after)
    trainable = [leaf.dtype for leaf in jax.tree.leaves(after)]
    assert {dtype for dtype in trainable if dtype.kind == "f"} == {jnp.dtype("float32")}
    assert jnp.dtype("bfloat16") not in trainable  # of no kind that NumPy knows
    assert logits.dtype == jnp.float32
    assert {value.dtype for value in metrics.values()} == {jnp.dtype("float32")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "rfquant", "double_rounding", "csq_uniform"])
def test_a_step_is_traced(models, name):
    model = models(dtype="bfloat16")
    run = step_of(method_of(model, name))
    check(*jax.eval_shape(run, drawn_variables(model, SHAPE, 0), BATCH))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name if name == "plain" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS],
)
def test_a_step_is_run(models, name):
    model = models(dtype="bfloat16")
    run = step_of(method_of(model, name))
    before, after, metrics, logits = run(drawn_variables(model, SHAPE, 0), BATCH)
    check(before, after, metrics, logits)
    assert all(np.isfinite(value) for value in metrics.values())
    assert np.isfinite(logits).all()


@pytest.mark.slow
def test_it_is_the_step_of_float32_but_for_rounding(models):
    variables = drawn_variables(models(), SHAPE, 0)
    found, wanted = (
        step_of(method_of(models(dtype=dtype), "rfquant"))(variables, BATCH)
        for dtype in ("bfloat16", "float32")
    )
    for name in ("loss_max", "loss_subnets"):
        # Rounding an input to 2^-9 of itself moves some of them to the next code of 2 or 4 bits.
        np.testing.assert_allclose(found[2][name], wanted[2][name], rtol=0.1)

    def moved(pair):
        before, after, *_ = pair
        change = jax.tree.map(
            jnp.subtract,
            after.variables.trainable.act_step_sizes,
            before.variables.trainable.act_step_sizes,
        )
        return np.asarray(change)

    # Adam's first step has the size of the rate, and the sign of the gradient.
    steps, same = moved(wanted) != 0, np.sign(moved(found)) == np.sign(moved(wanted))
    assert steps.any() and same[steps].mean() > 0.8

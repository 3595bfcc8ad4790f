"""The tables, kernels, starts and norm statistics of CSQ's networks."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.csq_networks import (
    GROWN,
    MASKS,
    MODEL,
    PLANES,
    RULES,
    SHAPE,
    a_run,
    batch_of,
    flatten,
    hard_kernels,
    layers_of,
    make,
    make_uniform,
    shaken,
    sigmoid,
    start_of,
    variables_of,
    with_masks,
)

from mpq_jax.methods.csq import network
from mpq_jax.methods.csq.network import Gates
from mpq_jax.program import paths
from mpq_jax.quantizers import bit_planes as quantizer
from mpq_jax.quantizers.bit_planes import BitPlanes
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import FIRST_LAST_FLOAT, Rule, bit_rules

FLOAT_RULES = [
    Rule("wide", weights=32, acts=32, float_weights=True, float_acts=True),
    *bit_rules((PLANES, 2), first_last=FIRST_LAST_FLOAT),
]


def test_weights_with_a_choice_get_planes_and_all_others_stay():
    table = trace_layers(MODEL, SHAPE, rules=RULES)
    before = layers_of(table)
    after = layers_of(network.with_planes(table, act_bits=5, float_acts=False))
    assert list(after) == list(before)
    for name in GROWN:
        assert after[name].weight_candidates == (4, 3, 2, 1, 0)
        assert after[name].act_candidates == (5,) and not after[name].float_acts
    assert after["wide"].weight_candidates == (32,) and after["wide"].float_weights
    assert after["wide"].act_candidates == (5,)  # had a choice
    assert after["stem"] == before["stem"] and after["head"] == before["head"]


def test_inputs_that_stay_float_are_billed_at_32_bits():
    table = trace_layers(MODEL, SHAPE, rules=RULES)
    after = layers_of(network.with_planes(table, act_bits=32, float_acts=True))
    for name in (*GROWN, "wide"):
        assert after[name].act_candidates == (32,) and after[name].float_acts
    assert not after["head"].float_acts and after["head"].act_candidates == (8,)


def test_a_given_number_of_planes_counts_instead_of_the_candidates():
    table = trace_layers(MODEL, SHAPE, rules=RULES)
    after = network.with_planes(table, act_bits=4, float_acts=False, planes=2)
    assert layers_of(after)["grown1"].weight_candidates == (2, 1, 0)
    assert layers_of(after)["stem"].weight_candidates == (8,)


@pytest.mark.parametrize("build", [make, make_uniform])
def test_a_table_without_choice_is_refused(build):
    with pytest.raises(ValueError, match="no layer have a choice of bits, so no scheme can grow"):
        build(rules=(Rule(weights=4, acts=(4, 2)),))


def test_a_target_above_the_number_of_planes_is_refused():
    with pytest.raises(
        ValueError, match="target is 4.5; with all planes on, the mean by layer is 4"
    ):
        make(target=4.5)
    assert make(target=4.0).table.layers[1].max_bits == 4


def test_a_target_that_the_layers_do_not_reach_together_is_refused():
    """One layer has 8 planes, the other 3: the mean is at most 5.5."""
    rules = (Rule("grown1", weights=(8, 2)), Rule("grown2", weights=(3, 2)), *RULES)
    with pytest.raises(ValueError, match="target is 6.0"):
        make(rules=rules, target=6.0)


@pytest.mark.parametrize("average", ["layer", "param"])
def test_least_planes_above_the_target_are_refused(average):
    with pytest.raises(ValueError, match="least_planes is 3, and .*, but target is 2.9; raise"):
        make(least_planes=3, target=2.9, average=average)
    make(least_planes=3, target=2.96, average=average)  # the freeze may miss it by 0.05


def test_least_planes_that_a_layer_does_not_have_are_refused():
    rules = (Rule("grown1", weights=(8, 2)), Rule("grown2", weights=(3, 2)), *RULES)
    with pytest.raises(ValueError, match="least_planes is 4; 'grown2' has 3 planes"):
        make(rules=rules, least_planes=4, target=4.0)


def test_more_planes_than_integers_can_hold_are_refused():
    """With the sign, 16 planes make 17 bits, but stored integers have at most 16."""
    with pytest.raises(ValueError, match="16"):
        make(rules=(Rule("grown1", weights=(16, 2)), *RULES))


# The kernels, and where training starts.


@pytest.mark.parametrize("contiguous", [False, True])
def test_kernels_by_what_is_decided(contiguous):
    generator = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(generator.normal(size=shape), jnp.float32)

    beta, mask = 3.0, np.array([0.4, 0.2, -0.3, 0.0, 0.6])
    planes = BitPlanes(draw(5, 2, 3), draw(5, 2, 3), jnp.asarray(mask, jnp.float32), draw())
    planes = planes._replace(scale=jnp.float32(0.7))
    soft = sigmoid(beta * mask)
    on = np.array([0.0, 0, 0, 1, 1] if contiguous else [1.0, 1, 0, 1, 1])
    if contiguous:
        soft = np.array([np.prod(soft[b:]) for b in range(5)])
    positive, negative = (np.asarray(x, np.float64) for x in planes[:2])
    soft_digits = sigmoid(beta * positive) - sigmoid(beta * negative)
    digits = (positive > 0).astype(float) - (negative > 0)
    wanted = {
        (False, False): (soft, soft_digits),
        (True, False): (on, soft_digits),
        (True, True): (on, digits),
        (False, True): (on, digits),  # does not happen: bits without a scheme
    }
    kernel = jax.jit(lambda gates: network.kernel(planes, gates, contiguous=contiguous))
    for (fixed, hard), (gates, values) in wanted.items():
        found = kernel(Gates(jnp.float32(beta), jnp.array(fixed), jnp.array(hard)))
        summed = 0.7 * np.einsum("b,b,b...->...", gates, 2.0 ** np.arange(5) / 31, values)
        np.testing.assert_allclose(found, summed, atol=2e-7)  # float32


def quantized(w, planes):
    """Magnitudes rounded to whole parts of the largest one."""
    unit = np.abs(w).max() / (2**planes - 1)
    return np.sign(w) * np.round(np.abs(w) / unit) * unit


@jax.jit
def float_model(variables, images):
    return MODEL.apply(variables, images, train=False)


def forward_with(kernels, batch_stats, images):
    """Returns the logits of the float model in evaluation mode with some kernels replaced."""
    params = flatten(variables_of(MODEL)["params"])
    params |= {f"{name}/kernel": jnp.asarray(w, jnp.float32) for name, w in kernels.items()}
    variables = {"params": paths.unflatten(params), "batch_stats": batch_stats}
    return np.asarray(float_model(variables, images))


def float_kernels():
    params = variables_of(MODEL)["params"]
    return {name: np.asarray(params[name]["kernel"], np.float64) for name in GROWN}


@functools.cache
def images_of_statistics():
    return jnp.stack([batch_of(step)["image"] for step in range(3)])


FLOAT: dict[str, Any] = dict(act_bits=32, rules=FLOAT_RULES, run=a_run(images=images_of_statistics))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "changes", "factor"),
    [
        (make, {"mask_start": 0.5}, 1.0),
        (make, {"mask_start": 2.0, "contiguous": False}, 1.0),
        (make_uniform, {}, 1.0),
        (make, {"start": "literal"}, (sigmoid(1.0) - 0.5) * 0.5),
    ],
)
def test_training_starts_from_the_quantized_float_model(build, changes, factor):
    made_method = build(**FLOAT | changes)
    variables = made_method.variables(start_of(made_method))
    assert variables.gates.temperature == 1
    images = batch_of(1)["image"]
    found = jax.jit(made_method.predict)(variables, np.array(False), images)
    kernels = {name: factor * quantized(w, PLANES) for name, w in float_kernels().items()}
    wanted = forward_with(kernels, variables_of(MODEL)["batch_stats"], images)
    np.testing.assert_allclose(found, wanted, atol=1e-5)  # sums of float32 gates
    without = forward_with({}, variables_of(MODEL)["batch_stats"], images)
    assert np.abs(wanted - without).max() > 1e-3


@pytest.mark.parametrize("mean", [0.5, -3.0])
@pytest.mark.parametrize("spread", [0.0, 0.01])
def test_weights_far_from_zero_are_no_outliers(mean, spread):
    """They deviate little from each other, but all of them are needed."""
    w = mean + spread * np.random.default_rng(0).uniform(-1, 1, (3, 3, 4))
    planes = quantizer.from_float(jnp.asarray(w, jnp.float32), planes=8, clip_rms=2.5)
    found = quantizer.weights(planes, jnp.float32(1.0))
    np.testing.assert_allclose(found, w, rtol=1 / 255)  # half a code of the largest weight


# Norm statistics.


def moments_by_hand(kernels, batches):
    """Returns mean and variance of every norm's input, each batch normalized by its own."""
    params = flatten(variables_of(MODEL)["params"])
    params |= {f"{name}/kernel": jnp.asarray(w, jnp.float32) for name, w in kernels.items()}
    variables = {
        "params": paths.unflatten(params),
        "batch_stats": variables_of(MODEL)["batch_stats"],
    }
    found = {}
    for images in batches:
        _, seen = MODEL.apply(
            variables,
            images,
            train=True,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: isinstance(module, nn.Conv),
        )
        for name, outputs in seen["intermediates"].items():
            values = np.asarray(outputs["__call__"][0], np.float64).reshape(-1, 4)
            found.setdefault(f"{name}_norm", []).append(values)
    alike = {name: np.concatenate(parts) for name, parts in found.items()}
    return {name: (values.mean(axis=0), values.var(axis=0)) for name, values in alike.items()}


@pytest.mark.slow
def test_hard_evaluation_has_norm_statistics_of_its_own():
    made_method = make(**FLOAT)
    state = with_masks(shaken(start_of(made_method)), MASKS)
    variables = made_method.variables(state)
    kernels = {name: codes * step for name, (codes, step) in hard_kernels(state).items()}
    wanted = moments_by_hand(kernels, images_of_statistics())
    assert set(wanted) == {"stem_norm", "grown1_norm", "grown2_norm"}
    for name, (mean, var) in wanted.items():
        # float32 sums, on top of each other from norm to norm
        np.testing.assert_allclose(variables.hard_stats[name]["mean"], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(variables.hard_stats[name]["var"], var, rtol=1e-4)

    images = batch_of(4)["image"]
    predict = jax.jit(made_method.predict)
    found = {name: predict(variables, hard, images) for name, hard in made_method.eval_bits.items()}
    hard = forward_with(kernels, variables.hard_stats, images)
    np.testing.assert_allclose(found["hard"], hard, atol=1e-5)  # float32 sums
    soft_kernels = {
        name: np.asarray(network.kernel(one, variables.gates, contiguous=False))
        for name, one in state.trainable.by_layer.items()
    }
    soft = forward_with(soft_kernels, state.batch_stats, images)
    np.testing.assert_allclose(found["soft"], soft, atol=1e-5)  # float32 sums
    assert np.abs(hard - forward_with(kernels, state.batch_stats, images)).max() > 1e-3


def test_without_images_all_evaluation_has_the_statistics_of_training():
    made_method = make()
    state = start_of(made_method)
    variables = made_method.variables(state)
    jax.tree.map(np.testing.assert_array_equal, variables.hard_stats, state.batch_stats)

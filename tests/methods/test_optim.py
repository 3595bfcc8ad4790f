import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpq_jax.methods.optim import (
    alrs,
    ema_decay,
    precision_factor,
    scale_by_adam,
    scale_by_given_rate,
    skip_unused_rows,
    warmup_cosine,
)

EPOCHS = 150
PUBLISHED = {"peak": 0.04, "end": 1e-5, "start": 1e-5, "warmup": 5 / EPOCHS}


def published_rate(epoch):
    """The published rate, set once an epoch."""
    if epoch < 5:
        return 1e-5 + epoch * (0.04 - 1e-5) / 5
    return 1e-5 + 0.5 * (0.04 - 1e-5) * (1 + math.cos(math.pi * epoch / EPOCHS))


def schedule(steps_per_epoch, change, **options):
    steps = EPOCHS * steps_per_epoch
    return jax.jit(
        warmup_cosine(
            **(PUBLISHED | options), steps=steps, steps_per_epoch=steps_per_epoch, change=change
        )
    )


@pytest.mark.parametrize("steps_per_epoch", [1, 7, 2503])
def test_published_rate_of_every_epoch(steps_per_epoch):
    rate = schedule(steps_per_epoch, "epoch")
    epochs = np.arange(EPOCHS)
    first, last = epochs * steps_per_epoch, (epochs + 1) * steps_per_epoch - 1
    expected = [published_rate(epoch) for epoch in epochs]
    for steps in (first, last):
        given = jax.vmap(rate)(jnp.asarray(steps, jnp.int32))
        np.testing.assert_allclose(given, expected, rtol=1e-6, atol=3e-9)  # float32 cosines


def test_rate_of_epoch_20_is_that_of_a_published_log():
    assert round(float(schedule(8, "epoch")(20 * 8 + 3)), 6) == 0.038271


@pytest.mark.parametrize("change", ["epoch", "step"])
def test_rate_begins_and_ends_as_told(change):
    rate = schedule(10, change)
    assert rate(0) == np.float32(1e-5)
    assert rate(1500) == np.float32(1e-5)
    assert schedule(10, change, warmup=0.0)(0) == np.float32(0.04)


def test_rate_by_step_moves_within_an_epoch():
    rate = schedule(10, "step")
    np.testing.assert_allclose(rate(25), published_rate(2.5), rtol=1e-6)
    np.testing.assert_allclose(rate(205), published_rate(20.5), rtol=1e-6)
    assert schedule(10, "epoch")(205) == schedule(10, "epoch")(200) != rate(205)


def test_unknown_change_is_refused():
    unchecked = inspect.unwrap(warmup_cosine)  # without the type checker of the tests
    with pytest.raises(ValueError, match='change is \'day\'; wanted "step" or "epoch"'):
        unchecked(**PUBLISHED, steps=9, steps_per_epoch=3, change="day")


@pytest.fixture
def standard_promotion():
    """Optax's Adam adds integers to floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def random_tree(seed, *, bank_axes=(2, 3, 4)):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "norm": jax.random.normal(keys[0], bank_axes),
        "steps": jax.random.normal(keys[1], (2, 3)),
    }


def random_use(seed):
    draw = np.random.default_rng(seed).random((2, 2, 3)) < 0.5
    return {"norm": jnp.asarray(draw[0]), "steps": jnp.asarray(draw[1])}


INNER = {
    "adam": optax.scale_by_adam(),
    "nesterov": optax.trace(0.9, nesterov=True),
    "decay, then Adam with a schedule": optax.chain(
        optax.add_decayed_weights(0.1), optax.adam(lambda count: 0.1 / (1.0 + count))
    ),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_used_rows_move_as_if_alone_and_unused_rows_keep_value_and_state(inner):
    optimizer = skip_unused_rows(inner)
    start = params = random_tree(0)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    history = [(random_tree(seed), random_use(seed)) for seed in range(1, 7)]
    for gradients, used in history:
        updates, state = update(gradients, state, params, used=used)
        params = optax.apply_updates(params, updates)

    alone_update = jax.jit(inner.update)
    for leaf in start:
        for row in np.ndindex(2, 3):
            alone = start[leaf][row]
            alone_state = inner.init(alone)
            for gradients, used in history:
                if used[leaf][row]:
                    change, alone_state = alone_update(gradients[leaf][row], alone_state, alone)
                    alone = optax.apply_updates(alone, change)
            np.testing.assert_allclose(params[leaf][row], alone, rtol=1e-6)  # fused otherwise
            jax.tree.map(
                lambda a, b, row=row: np.testing.assert_allclose(a[row], b, rtol=1e-6),
                state[leaf],
                alone_state,
            )


@pytest.mark.usefixtures("standard_promotion")
def test_unused_rows_are_untouched_to_the_bit_even_by_nan_gradients():
    optimizer = skip_unused_rows(optax.scale_by_adam())
    params, used = random_tree(0), random_use(3)
    _, state = optimizer.update(random_tree(1), optimizer.init(params), params, used=random_use(4))
    gradients = {
        leaf: jnp.where(used[leaf].reshape(2, 3, *[1] * (value.ndim - 2)), value, jnp.nan)
        for leaf, value in random_tree(2).items()
    }
    updates, new_state = optimizer.update(gradients, state, params, used=used)
    for leaf in params:
        unused = ~np.asarray(used[leaf])
        assert (np.asarray(updates[leaf])[unused] == 0).all()
        assert np.isfinite(updates[leaf]).all()
        jax.tree.map(
            lambda new, old, unused=unused: np.testing.assert_array_equal(
                np.asarray(new)[unused], np.asarray(old)[unused]
            ),
            new_state[leaf],
            state[leaf],
        )


@pytest.mark.usefixtures("standard_promotion")
def test_bias_correction_of_adam_is_that_of_the_row():
    optimizer = skip_unused_rows(optax.scale_by_adam(), row_axes=1)
    params = {"steps": jnp.zeros((2, 1))}
    state = optimizer.init(params)
    gradients = {"steps": jnp.full((2, 1), 0.25)}
    for first_row in (True, True, True, False):
        used = {"steps": jnp.array([first_row, not first_row])}
        updates, state = optimizer.update(gradients, state, params, used=used)
    # A row's first Adam step is the sign of the gradient, however many steps others have made.
    np.testing.assert_allclose(updates["steps"], [[0.0], [1.0]], rtol=1e-5)  # 1 - 0.999 in float32


def test_skipping_needs_the_parameters():
    optimizer = skip_unused_rows(optax.scale_by_adam())
    params = random_tree(0)
    with pytest.raises(ValueError, match=r"update\(\.\.\., params\)"):
        optimizer.update(params, optimizer.init(params), used=random_use(0))


@pytest.mark.usefixtures("standard_promotion")
def test_one_group_of_a_partition_inside_a_chain():
    rows = skip_unused_rows(optax.scale_by_adam())
    labels = {"norm": "rows", "steps": "rows", "kernel": "plain"}
    optimizer = optax.chain(
        optax.clip(0.5),
        optax.partition(
            {"rows": rows, "plain": optax.sgd(0.1)}, labels, mask_compatible_extra_args=True
        ),
    )
    params = random_tree(0) | {"kernel": jnp.ones((3, 3))}
    gradients = random_tree(1) | {"kernel": jnp.full((3, 3), 2.0)}
    used = random_use(1)
    updates, _ = jax.jit(optimizer.update)(
        gradients, optimizer.init(params), params, used=used | {"kernel": jnp.array(True)}
    )
    np.testing.assert_allclose(updates["kernel"], np.full((3, 3), -0.05), rtol=1e-6)  # 0.1
    clipped = jax.tree.map(lambda leaf: jnp.clip(leaf, -0.5, 0.5), random_tree(1))
    expected, _ = rows.update(clipped, rows.init(random_tree(0)), random_tree(0), used=used)
    for leaf, value in expected.items():
        np.testing.assert_allclose(updates[leaf], value, rtol=1e-6)  # jit fuses otherwise


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32])
def test_ema_decay(dtype):
    steps = (0, 1, 90, 30_000, 10**6)
    growing = [ema_decay(dtype(step), decay=0.9997, warmup=True) for step in steps]
    expected = [min(0.9997, (1 + step) / (10 + step)) for step in steps]
    np.testing.assert_allclose(growing, expected, rtol=1e-6)  # float32 quotients
    for step in steps:
        assert ema_decay(dtype(step), decay=0.9997, warmup=False) == np.float32(0.9997)


def test_ema_decay_of_a_traced_step_compiles_once():
    traces = []

    @jax.jit
    def decay(step):
        traces.append(step)
        return ema_decay(step, decay=0.99, warmup=True)

    assert decay(jnp.int32(0)) == np.float32(0.1)
    assert decay(jnp.int32(10**6)) == np.float32(0.99)
    assert len(traces) == 1


# Adaptive learning-rate scaling.

BY_HIGHEST = {
    8: {8: 1.0, 7: 0.5, 6: 0.1, 5: 0.05, 4: 0.01, 3: 0.005, 2: 0.001},
    6: {6: 1.0, 5: 0.5, 4: 0.1, 3: 0.05, 2: 0.01},
    4: {4: 1.0, 3: 0.5, 2: 0.1},
}


@pytest.mark.parametrize("max_bits", BY_HIGHEST)
def test_factor_of_every_precision(max_bits):
    table = BY_HIGHEST[max_bits]
    traced = jax.jit(precision_factor)
    for bits, wanted in table.items():
        found = precision_factor(bits, max_bits)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, wanted, rtol=1e-6)  # float32 powers
        np.testing.assert_allclose(traced(jnp.int32(bits), jnp.int32(max_bits)), wanted, rtol=1e-6)


# One learned scale per layer, as in the paper; the mean of their sizes is 0.3 / 4 unclipped.
SCALE_GRADIENTS = {"conv1": 0.02, "conv2": -0.2, "conv3": 0.0, "head": 0.08}


def scalars(values):
    return {name: jnp.float32(value) for name, value in values.items()}


def factor_by_hand(bits, max_bits):
    distance = max_bits - bits
    if distance % 2:
        return 5 * 10.0 ** (-(distance + 1) // 2)
    return 10.0 ** (-distance // 2)


def rate_by_hand(variant, rate, gradients, bits, max_bits=8, clip=1.0):
    """Section 4 of the method: lambda_b, with what each variant makes of the printed formula."""
    mean = np.mean([min(np.max(np.abs(np.clip(g, -clip, clip))), 1.0) for g in gradients])
    value = {
        "floor": max(rate - mean, 0.0),
        "literal": rate - mean,
        "relative": rate * (1 - mean),
        "constant": rate,
    }[variant]
    return factor_by_hand(bits, max_bits) * value, mean


def alrs_update(gradients, *, bits, learning_rate, max_bits=8, **options):
    optimizer = alrs(max_bits=max_bits, **options)
    state = optimizer.init(gradients)
    return optimizer.update(gradients, state, bits=bits, learning_rate=learning_rate)


@pytest.mark.parametrize("variant", ["floor", "literal", "relative", "constant"])
@pytest.mark.parametrize("bits", [8, 5, 2])
@pytest.mark.parametrize("learning_rate", [5e-4, 0.3])
def test_first_step_moves_every_scale_by_lambda_b_against_its_gradient(
    variant, bits, learning_rate
):
    updates, state = alrs_update(
        scalars(SCALE_GRADIENTS), bits=bits, learning_rate=learning_rate, variant=variant
    )
    wanted, mean = rate_by_hand(variant, learning_rate, SCALE_GRADIENTS.values(), bits)
    np.testing.assert_allclose(state.mean_gradient, mean, rtol=1e-6)
    np.testing.assert_allclose(state.learning_rate, wanted, rtol=1e-5)  # a float32 difference
    for name, gradient in SCALE_GRADIENTS.items():
        # Adam's first direction is g / (|g| + 1e-8).
        np.testing.assert_allclose(updates[name], -wanted * np.sign(gradient), rtol=1e-5)


def test_where_gradients_exceed_the_rate_the_variants_part():
    rates = {
        variant: float(
            alrs_update(scalars(SCALE_GRADIENTS), bits=2, learning_rate=5e-4, variant=variant)[
                1
            ].learning_rate
        )
        for variant in ("floor", "literal", "relative", "constant")
    }
    assert rates["literal"] < 0 == rates["floor"] < rates["relative"] < rates["constant"]


@pytest.mark.parametrize("max_bits", [8, 4])
def test_factor_counts_from_the_given_highest_precision(max_bits):
    _, state = alrs_update(
        scalars({"a": 0.25, "b": 0.75}), bits=3, learning_rate=0.8, max_bits=max_bits
    )
    wanted = BY_HIGHEST[max_bits][3] * 0.8 * 0.5
    np.testing.assert_allclose(state.learning_rate, wanted, rtol=1e-6)


def test_default_variant_is_relative():
    gradients = scalars(SCALE_GRADIENTS)
    pair = [
        alrs_update(gradients, bits=4, learning_rate=0.1, **options)[1].learning_rate
        for options in ({}, {"variant": "relative"})
    ]
    assert pair[0] == pair[1]


@pytest.mark.parametrize("clip", [1.0, 0.1, 3.0])
def test_gradients_are_clipped_within_the_mean_only(clip):
    gradients = {"a": 0.05, "b": -7.0, "c": 2.0, "d": 0.5}
    updates, state = alrs_update(
        scalars(gradients), inner=optax.identity(), bits=6, learning_rate=0.9, clip=clip
    )
    wanted, mean = rate_by_hand("relative", 0.9, gradients.values(), 6, clip=clip)
    np.testing.assert_allclose(state.mean_gradient, mean, rtol=1e-6)
    for name, gradient in gradients.items():  # the optimizer itself sees them as they are
        np.testing.assert_allclose(updates[name], -wanted * gradient, rtol=1e-5)


def test_mean_gradient_never_exceeds_one():
    _, state = alrs_update(
        scalars({"a": 50.0, "b": -60.0}), bits=8, learning_rate=0.5, clip=10.0, variant="literal"
    )
    assert state.mean_gradient == 1
    assert state.learning_rate == -0.5


def test_a_leaf_of_several_scales_is_one_layer():
    gradients = {"a": jnp.array([0.1, -0.4, 0.2]), "b": jnp.array([[0.2]])}
    _, state = alrs_update(gradients, bits=8, learning_rate=1.0)
    np.testing.assert_allclose(state.mean_gradient, 0.3, rtol=1e-6)


def test_layers_can_be_told_apart_in_another_way():
    gradients = {"w": jnp.array([0.1, 0.0, 0.4]), "x": jnp.array([-0.3, 0.0, 0.2])}

    def by_position(tree):
        return jnp.max(jnp.abs(jnp.stack(list(tree.values()))), axis=0)

    _, state = alrs_update(gradients, bits=8, learning_rate=1.0, per_layer=by_position)
    np.testing.assert_allclose(state.mean_gradient, (0.3 + 0.0 + 0.4) / 3, rtol=1e-6)


def adam_by_hand(gradients, rates):
    """Returns the sum of Adam's steps, each times its own rate."""
    first = second = total = 0.0
    for count, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        corrected = np.sqrt(second / (1 - 0.999**count)) + 1e-8
        total -= rate * first / (1 - 0.9**count) / corrected
    return total


# (gradients of the two scales, precision, scheduled rate) of successive updates.
HISTORY = [
    ({"a": 0.3, "b": -0.1}, 8, 0.4),
    ({"a": -0.2, "b": 0.02}, 4, 0.35),
    ({"a": 0.05, "b": 0.6}, 7, 0.3),
    ({"a": 2.0, "b": -0.4}, 2, 0.25),
]


@pytest.mark.parametrize("around", ["alone", "chain", "partition", "multi_transform"])
def test_scales_and_weights_over_several_updates(around):
    scale_rule = alrs(max_bits=8)
    if around == "chain":
        scale_rule = optax.chain(optax.identity(), scale_rule)
    params = scalars({"a": 1.0, "b": 1.0})
    optimizer = scale_rule
    if around in ("partition", "multi_transform"):
        optimizer = getattr(optax, around)(
            {"weights": optax.adam(0.01), "scales": scale_rule},
            {"a": "scales", "b": "scales", "w": "weights"},
        )
        params |= {"w": jnp.ones(3)}
    w_gradients = np.random.default_rng(0).normal(size=(len(HISTORY), 3)).astype(np.float32)
    state, traces = optimizer.init(params), []

    @jax.jit
    def step(params, state, gradients, bits, learning_rate):
        traces.append(bits)
        with jax.numpy_dtype_promotion("standard"):  # of optax.adam for the weights
            updates, state = optimizer.update(
                gradients, state, params, bits=bits, learning_rate=learning_rate
            )
        return optax.apply_updates(params, updates), state

    for (gradients, bits, rate), w_gradient in zip(HISTORY, w_gradients, strict=True):
        given = scalars(gradients) | ({"w": jnp.asarray(w_gradient)} if "w" in params else {})
        params, state = step(params, state, given, jnp.int32(bits), jnp.float32(rate))
    assert len(traces) == 1  # bits and rate are traced: one program for all
    rates = [
        rate_by_hand("relative", rate, gradients.values(), bits)[0]
        for gradients, bits, rate in HISTORY
    ]
    for name in ("a", "b"):
        wanted = 1 + adam_by_hand([gradients[name] for gradients, *_ in HISTORY], rates)
        np.testing.assert_allclose(params[name], wanted, rtol=1e-5)  # bias correction in float32
    if "w" in params:  # by Adam's own rate, whatever the precision
        wanted = 1 + adam_by_hand(w_gradients, [0.01] * len(HISTORY))
        np.testing.assert_allclose(params["w"], wanted, rtol=1e-5)
    found = optax.tree_utils.tree_get(state, "learning_rate")
    np.testing.assert_allclose(found, rates[-1], rtol=1e-5)
    mean = optax.tree_utils.tree_get(state, "mean_gradient")
    np.testing.assert_allclose(mean, (1.0 + 0.4) / 2, rtol=1e-6)


def test_inner_transformations_get_their_own_extra_arguments():
    optimizer = alrs(skip_unused_rows(scale_by_adam(), row_axes=1), max_bits=4)
    params = {"steps": jnp.ones(3)}
    used = {"steps": jnp.array([True, False, True])}
    updates, state = optimizer.update(
        {"steps": jnp.array([0.5, 0.5, -0.25])},
        optimizer.init(params),
        params,
        bits=3,
        learning_rate=0.1,
        used=used,
    )
    rate = 0.5 * 0.1 * (1 - 0.5)
    np.testing.assert_allclose(updates["steps"], [-rate, 0, rate], rtol=1e-5)
    np.testing.assert_allclose(state.learning_rate, rate, rtol=1e-6)


def test_first_state_logs_zeros_of_the_same_type():
    optimizer = alrs(max_bits=8)
    gradients = scalars(SCALE_GRADIENTS)
    before = optimizer.init(gradients)
    _, after = optimizer.update(gradients, before, bits=8, learning_rate=0.1)
    assert before.learning_rate == before.mean_gradient == 0
    kinds = (
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) for state in (before, after)
    )
    assert next(kinds) == next(kinds)


def test_unknown_variants_and_bounds_are_refused():
    with pytest.raises(ValueError, match=r"variant is 'printed'; wanted one of .*'relative'"):
        alrs(max_bits=8, variant="printed")
    for clip in (0.0, -1.0):
        with pytest.raises(ValueError, match=rf"clip is {clip}; wanted a positive bound"):
            alrs(max_bits=8, clip=clip)


# What else the learners are made of.


def test_scale_by_adam_is_that_of_optax_without_mixing_types():
    ours, theirs = scale_by_adam(), optax.scale_by_adam()
    params = random_tree(0)
    state, wanted_state = ours.init(params), theirs.init(params)
    for seed in range(1, 4):
        gradients = random_tree(seed)
        updates, state = ours.update(gradients, state, params, used=None)
        with jax.numpy_dtype_promotion("standard"):
            wanted, wanted_state = theirs.update(gradients, wanted_state, params)
        jax.tree.map(np.testing.assert_array_equal, updates, wanted)
    jax.tree.map(np.testing.assert_array_equal, state, wanted_state)


def test_scale_by_given_rate():
    optimizer = optax.chain(optax.scale(2.0), scale_by_given_rate())
    gradients = random_tree(1)
    state = optimizer.init(gradients)
    for rate in (0.5, 0.125):  # exact in float32
        updates, state = optimizer.update(gradients, state, learning_rate=rate, bits=4)
        jax.tree.map(
            lambda u, g, rate=rate: np.testing.assert_array_equal(u, -2 * rate * g),
            updates,
            gradients,
        )

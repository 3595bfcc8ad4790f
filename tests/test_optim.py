import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpq_jax.optim import ema_decay, skip_unused_rows, warmup_cosine

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


def random_tree(seed, *, norm_axes=(2, 3, 4)):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "norm": jax.random.normal(keys[0], norm_axes),
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

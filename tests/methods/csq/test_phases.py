"""Phases of CSQ: temperatures and learning rates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.methods.base import TrainingInfo
from mpq_jax.methods.csq import phases


def a_run(epochs, steps_per_epoch=7):
    return TrainingInfo(epochs, steps_per_epoch, prepare=lambda batch, key: batch["image"])


@pytest.mark.parametrize(
    ("epochs", "freeze_scheme", "binarize", "rewind", "wanted"),
    [
        (10, 0.3, 0.8, False, (3, 8)),
        (10, 0.32, 0.78, True, (3, 8)),  # to the nearest epoch
        (10, 0.5, 0.5, False, (5, 5)),
        (10, 0.02, 0.8, False, (1, 8)),  # at least one epoch for the masks
        (10, 0.61, 0.63, True, (6, 7)),  # and for bits that are to learn anew
        (10, 0.0, 0.03, False, (0, 1)),  # and for the bits of a given scheme
        (1, 0.5, 0.9, False, (1, 1)),
        (600, 0.9917, 1.0, False, (595, 600)),
    ],
)
def test_phases_begin_with_whole_epochs(epochs, freeze_scheme, binarize, rewind, wanted):
    found = phases.make_phases(
        a_run(epochs), freeze_scheme=freeze_scheme, binarize=binarize, rewind=rewind
    )
    assert (found.freeze_scheme, found.binarize) == tuple(7 * epoch for epoch in wanted)
    assert (found.end, found.steps_per_epoch, found.rewind) == (7 * epochs, 7, rewind)


@pytest.mark.parametrize(
    ("freeze_scheme", "binarize", "rewind"),
    [(0.5, 0.95, True), (0.9, 0.95, True), (0.9, 1.0, True), (0.9, 0.95, False), (1.0, 1.0, False)],
)
def test_no_phase_begins_after_the_run(freeze_scheme, binarize, rewind):
    """Rounding to epochs moves no phase out of the run, however short it is."""
    for epochs in range(2, 30):
        found = phases.make_phases(
            a_run(epochs), freeze_scheme=freeze_scheme, binarize=binarize, rewind=rewind
        )
        assert found.freeze_scheme + rewind <= found.binarize <= found.end, epochs


def temperatures(found, final, steps):
    at = jax.jit(jax.vmap(lambda step: phases.temperature_at(found, step, final=final)))
    return np.asarray(at(jnp.arange(steps, dtype=jnp.int32)))


def test_the_temperature_rises_exponentially_to_the_binarization_and_stays():
    found = phases.make_phases(a_run(10), freeze_scheme=0.5, binarize=0.6)
    values = temperatures(found, 200.0, 80)  # beyond the end of the run, too
    wanted = 200.0 ** np.minimum(np.arange(80) / 42, 1)
    np.testing.assert_allclose(values, wanted, rtol=1e-6)  # a power of float32
    assert values[0] == 1 and (values[42:] == 200).all() and (values <= 200).all()
    assert (np.diff(values[:43]) > 0).all()  # by step, not by epoch
    given = phases.make_phases(a_run(10), freeze_scheme=0.0, binarize=0.6)  # the scheme is
    np.testing.assert_array_equal(temperatures(given, 200.0, 80), values)


def test_rewinding_rises_once_to_the_freeze_and_once_more_to_the_binarization():
    found = phases.make_phases(a_run(10), freeze_scheme=0.4, binarize=0.9, rewind=True)
    values = temperatures(found, 50.0, 75)
    steps = np.arange(75)
    part = np.where(steps < 28, steps / 28, np.minimum((steps - 28) / 35, 1))
    np.testing.assert_allclose(values, 50.0**part, rtol=1e-6)  # a power of float32
    assert values[0] == values[28] == 1
    assert (values[63:] == 50).all() and (values <= 50).all()


def rates(found, *, warmup, tuning):
    shape = jax.jit(jax.vmap(phases.rate_shape(found, warmup=warmup, tuning=tuning)))
    return np.asarray(shape(jnp.arange(found.end, dtype=jnp.int32)))


def cosine(steps, length):
    return 0.5 * (1 + np.cos(np.pi * steps / length))


def test_the_rate_falls_until_the_binarization_and_is_tuned_after_it():
    found = phases.make_phases(a_run(10), freeze_scheme=0.5, binarize=0.8)
    wanted = np.concatenate([cosine(np.arange(56), 56), 0.2 * cosine(np.arange(14), 14)])
    np.testing.assert_allclose(rates(found, warmup=0.0, tuning=0.2), wanted, atol=1e-6)  # float32


def test_rewinding_starts_the_rate_anew():
    found = phases.make_phases(a_run(10), freeze_scheme=0.5, binarize=0.8, rewind=True)
    parts = (cosine(np.arange(35), 35), cosine(np.arange(21), 21), 0.1 * cosine(np.arange(14), 14))
    wanted = np.concatenate(parts)
    np.testing.assert_allclose(rates(found, warmup=0.0, tuning=0.1), wanted, atol=1e-6)  # float32


def test_the_warm_up_is_a_part_of_the_first_phase_alone():
    found = phases.make_phases(a_run(10), freeze_scheme=0.5, binarize=0.8, rewind=True)
    values = rates(found, warmup=0.2, tuning=0.1)
    without = rates(found, warmup=0.0, tuning=0.1)
    np.testing.assert_allclose(values[:7], np.arange(7) / 7, atol=1e-6)  # 7 of 35 steps
    np.testing.assert_array_equal(values[7:], without[7:])


@pytest.mark.parametrize("tuning", [0.0, 0.1])
def test_a_run_without_tuning_has_one_cosine(tuning):
    found = phases.make_phases(a_run(3), freeze_scheme=0.7, binarize=1.0)
    wanted = cosine(np.arange(21), 21)
    np.testing.assert_allclose(rates(found, warmup=0.0, tuning=tuning), wanted, atol=1e-6)

"""Whole runs of CSQ, from the start to the binarized network."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.csq_networks import (
    BINARIZE,
    DATA,
    FREEZE,
    GROWN,
    MODEL,
    PLANES,
    RUN,
    batch_of,
    copied,
    make,
    make_uniform,
    moved,
    snapshot,
    train,
    trained,
    variables_of,
)

BUILDERS = [make, make_uniform]


@pytest.mark.slow_but_first
@pytest.mark.parametrize("build", BUILDERS)
def test_one_program_serves_all_phases(build):
    assert trained(build).compiled == 1


@pytest.mark.slow_but_first
@pytest.mark.parametrize("build", BUILDERS)
def test_training_is_learning(build):
    run = trained(build)
    assert run.losses[-1] < 0.1 * run.losses[0]
    assert run.method.summary(run.last)["undecided_bits"] == 0
    found, before = (accuracies(run.method, state) for state in (run.last, run.first))
    assert abs(found["hard"] - found["soft"]) <= 0.002
    assert found["hard"] > 0.9 > 0.6 > before["hard"]


def accuracies(made_method, state):
    """Returns the soft and the hard accuracy on all images."""
    variables, predict = made_method.variables(copied(state)), jax.jit(made_method.predict)
    return {
        name: float(np.mean(np.argmax(predict(variables, hard, DATA[0]), axis=-1) == DATA[1]))
        for name, hard in made_method.eval_bits.items()
    }


def bits_of(state):
    planes = state.trainable.by_layer.values()
    return np.concatenate([np.ravel(logits > 0) for one in planes for logits in one[:2]])


@pytest.mark.parametrize("build", BUILDERS)
def test_some_bits_become_others_while_they_are_soft(build):
    """Otherwise the network could be the start, quantized."""
    run = trained(build)
    assert np.any(bits_of(run.first) != bits_of(run.last))


def test_the_scheme_grows_to_the_budget():
    run = trained()
    means = [run.method.summary(state)["mean_planes_by_layer"] for state in (run.first, run.last)]
    assert means[0] == PLANES and abs(means[1] - 2.0) <= 0.1
    assert run.method.summary(run.last)["undecided_masks"] == 0
    assert run.method.layers_at_floor(run.last) == []


def test_the_temperature_rises_twice():
    found = [metrics["temperature"] for _, metrics, _ in trained().steps]
    steps = np.arange(RUN.steps)
    again = np.minimum((steps - FREEZE) / (BINARIZE - FREEZE), 1)
    wanted = 200.0 ** np.where(steps < FREEZE, steps / FREEZE, again)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)  # a power of float32


def test_what_is_fixed_rests_and_everything_else_moves():
    run = trained()
    states = [run.first] + [state for state, _, _ in run.steps]
    ends = [0, FREEZE, BINARIZE, RUN.steps]
    for phase, (start, stop) in enumerate(itertools.pairwise(ends)):
        still = ((), (".mask",), (".mask", ".positive", ".negative"))[phase]
        after_freeze = states[start + 1]  # it may switch masks
        for path, change in moved(after_freeze.trainable, states[stop].trainable).items():
            if not path.endswith(".scale"):  # norms take it out: it has no gradient here
                assert change != path.endswith(still), (path, phase)
        for state in states[start + 2 : stop]:  # not even there and back
            changes = moved(after_freeze.trainable, state.trainable)
            assert not any(change for path, change in changes.items() if path.endswith(still))


def test_momentum_of_what_is_fixed_moves_nothing():
    """The masks' gradient is zero from the freeze on, but their momentum is not."""
    before, after = (trained().steps[at][0] for at in (FREEZE - 1, FREEZE))
    traces = jax.tree.leaves(after.opt_state.inner_states["masks"])
    assert max(np.abs(trace).max() for trace in traces if trace.dtype == np.float32) > 0
    for name in GROWN:
        old, new = before.trainable.by_layer[name].mask, after.trainable.by_layer[name].mask
        # Meeting the budget changes signs, and the distance from zero.
        np.testing.assert_array_equal(np.abs(new), np.maximum(np.abs(old), np.float32(0.1)))


def test_flags_and_events_of_a_run():
    run = trained()
    assert not run.first.fixed and not run.first.hard
    for at, (state, _, events) in enumerate(run.steps):
        assert state.step == at + 1
        assert state.fixed == (at >= FREEZE) and state.hard == (at >= BINARIZE)
        assert ("planes_switched_at_freeze" in events) == (at == FREEZE)
        assert events.get("binarized", 0.0) == float(at == BINARIZE)


def test_a_uniform_scheme_stays_as_given():
    run = trained(make_uniform)
    for at, (state, _, events) in enumerate(run.steps):
        assert state.fixed and state.hard == (at >= BINARIZE)
        assert events == ({"binarized": 1.0} if at == BINARIZE else {})
        for name in GROWN:
            masks = (one.trainable.by_layer[name].mask for one in (state, run.first))
            np.testing.assert_array_equal(*masks)
    summary = run.method.summary(run.last)
    assert summary["mean_planes_by_layer"] == summary["mean_planes_by_param"] == PLANES
    assert run.method.scheme is not None
    found = run.method.scheme(run.method.variables(copied(run.last)))
    assert found.bits["planes"].weights.tolist() == [8, PLANES, PLANES, 32, 8]
    assert found.layouts == dict.fromkeys(GROWN, "1" * PLANES)


@pytest.mark.parametrize("stop", [3, FREEZE, FREEZE + 1, BINARIZE, RUN.steps - 1])
def test_an_interrupted_run_goes_on_bit_for_bit(stop):
    """From a copy on the host, taken to pieces; the epoch's first call comes after the copy."""
    run = trained()
    leaves, structure = jax.tree.flatten(run.steps[stop - 1][0])
    state = structure.unflatten([jnp.asarray(leaf) for leaf in leaves])
    again = list(train(run.method, state, stop))
    assert [told for _, *told in again] == [told for _, *told in run.steps[stop:]]
    jax.tree.map(
        functools.partial(np.testing.assert_array_equal, strict=True), again[-1][0], run.last
    )


def test_training_consumes_its_state_but_not_the_float_variables():
    variables = copied(variables_of(MODEL))
    state = trained().method.init(variables, batch_of(0)["image"], batch_of(0)["label"])
    jax.tree.map(np.testing.assert_array_equal, state, trained().first)  # the labels do not matter
    consumed = jax.tree.leaves(state.trainable)
    trained().method.train_step(state, batch_of(0), jax.random.key(0))
    assert all(leaf.is_deleted() for leaf in consumed)  # donated: there is no second copy
    jax.tree.map(np.testing.assert_array_equal, variables, snapshot(variables_of(MODEL)))


def test_what_evaluation_asks_for_are_arrays_that_predict_takes():
    """Also when it is called without `jax.jit`."""
    for build in BUILDERS:
        asked = build().eval_bits
        assert set(asked) == {"soft", "hard"}
        assert all(isinstance(hard, jax.Array) and hard.dtype == bool for hard in asked.values())

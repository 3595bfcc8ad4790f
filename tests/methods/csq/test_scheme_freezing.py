"""Epochs of CSQ: the scheme is frozen, gates are binarized, and misses of the budget are told."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.csq_networks import (
    FREEZE,
    GROWN,
    MASKS,
    STEPS_PER_EPOCH,
    a_run,
    batch_of,
    copied,
    hard_kernels,
    logits_of_found,
    make,
    moved,
    sigmoid,
    start_of,
    with_masks,
)

from mpq_jax.methods.csq import method, network
from mpq_jax.methods.csq.network import Gates
from mpq_jax.quantizers import bit_planes as quantizer
from mpq_jax.supernet import costs


@pytest.fixture
def warnings(monkeypatch):
    """What is warned of, as text."""
    said = []
    monkeypatch.setattr(method.logging, "warning", lambda text, *args: said.append(text % args))
    return said


def told_until_the_freeze(made_method, masks):
    """Returns {epoch: events} with some masks, which no training changes."""
    state, events = with_masks(copied(start_of(make())), masks), {}
    for epoch in range(5):
        state, events[epoch] = made_method.on_epoch(state, epoch)
        state = state._replace(step=state.step + STEPS_PER_EPOCH)
    return {epoch: told for epoch, told in events.items() if told}


ALL_ON = dict.fromkeys(GROWN, [5.0] * 4)


def test_a_budget_out_of_reach_is_told_of_once_at_each_temperature(warnings):
    """The epochs begin at temperatures 1, 3.8, 14 and 53: the second and third pass 10 and 20."""
    events = told_until_the_freeze(make(), ALL_ON)
    assert len(warnings) == 2
    for text, temperature in zip(warnings, ("14.1", "53.2"), strict=True):
        assert f"the budget of 2 planes is out of reach of training: at temperature {temperature}"
        assert f"at temperature {temperature} the gates" in text
        assert "leave a mean of 4.00 to 4.00" in text and "Raise budget_weight (now 0.1)" in text
    assert events.pop(4) == {"planes_switched_at_freeze": 4.0}
    assert events == dict.fromkeys((2, 3), {"reachable_least": 4.0, "reachable_most": 4.0})


@pytest.mark.parametrize(
    "masks",
    [
        dict.fromkeys(GROWN, [0.05, 0.05, 5.0, 5.0]),  # two are open in each layer
        dict.fromkeys(GROWN, [-5.0, 5.0, -5.0, 5.0]),  # all decided, and as wanted
        {"grown1": [5.0] * 4, "grown2": [-5.0] * 4},
    ],
)
def test_a_budget_in_reach_is_not_told_of(masks, warnings):
    events = told_until_the_freeze(make(), masks)
    assert not warnings and set(events) == {4}


def test_planes_below_one_that_is_off_do_not_count_against_a_contiguous_budget(warnings):
    """grown1 has no plane, as its highest is off, and grown2 has four: two on average."""
    masks = {"grown1": [5.0, 5.0, 5.0, -5.0], "grown2": [5.0] * 4}
    events = told_until_the_freeze(make(contiguous=True, least_planes=0), masks)
    assert not warnings
    assert events == {4: {"planes_switched_at_freeze": 0.0}}


def test_the_freeze_meets_the_budget_and_keeps_everything_else(warnings):
    made_method = make()
    masks = {"grown1": [0.01, 1, 2, 0.03], "grown2": [1, 0.02, 0.5, 3]}
    before = with_masks(start_of(made_method), masks)
    after, events = made_method.on_epoch(before, 4)
    assert events == {"planes_switched_at_freeze": 4.0} and not warnings
    nearest = {"grown1": [-0.1, 1, 2, -0.1], "grown2": [1, -0.1, -0.5, 3]}
    wanted = with_masks(before, nearest)._replace(fixed=np.array(True))
    jax.tree.map(np.testing.assert_array_equal, after, wanted)
    assert made_method.summary(after)["mean_planes_by_layer"] == 2.0


@pytest.mark.slow
@pytest.mark.parametrize("rewind_bits", [False, True])
@pytest.mark.parametrize(("least", "counts"), [(0, [0, 4]), (1, [1, 3]), (2, [2, 2])])
def test_the_freeze_leaves_every_layer_its_least_planes(least, counts, rewind_bits, warnings):
    masks = {"grown1": [-0.4, -0.5, -0.3, -0.6], "grown2": [0.5, 0.4, 0.7, 0.6]}
    state = with_masks(copied(start_of(make())), masks)
    made_method = make(least_planes=least, rewind_bits=rewind_bits)
    after, events = made_method.on_epoch(state, 4)
    assert events == {"planes_switched_at_freeze": 2.0 * least} and not warnings
    found = made_method.scheme(made_method.variables(after))
    assert found.bits["planes"].weights.tolist() == [8, *counts, 32, 8]
    assert (found.bits["integers"].weights[1] == 0) == (least == 0)
    images = batch_of(2)["image"]
    hard = jax.jit(made_method.predict)(made_method.variables(after), np.array(True), images)
    np.testing.assert_array_equal(logits_of_found(found, images), hard)


def test_bits_that_start_anew_name_all_planes_together_as_the_scheme_can():
    """Not only what the active planes were left with; the temperature is 1 again."""
    state = with_masks(start_of(make()), MASKS)
    after, left = (make(rewind_bits=b).on_epoch(state, 4)[0] for b in (True, False))
    whole = hard_kernels(with_masks(state, ALL_ON))
    gates = Gates(jnp.float32(1.0), jnp.array(True), jnp.array(False))
    for name, (codes, step) in whole.items():
        planes, planes_left = (one.trainable.by_layer[name] for one in (after, left))
        np.testing.assert_array_equal(planes.mask, planes_left.mask)
        found = np.asarray(network.kernel(planes, gates, contiguous=False))
        grown = (sigmoid(quantizer.SHARPNESS) - sigmoid(-quantizer.SHARPNESS)) * np.asarray(
            quantizer.hard_weights(planes)
        )
        np.testing.assert_allclose(found, grown, atol=1e-5)  # sums of float32 gates
        before = np.asarray(quantizer.hard_weights(planes_left))
        errors = [np.sum((kernel - codes * step) ** 2) for kernel in (found, before)]
        assert errors[0] < errors[1]
    rest = (one._replace(trainable=one.trainable._replace(planes=None)) for one in (after, left))
    jax.tree.map(np.testing.assert_array_equal, *rest)


def test_a_budget_that_no_scheme_meets_is_told_of(warnings):
    """Of two layers the mean is a multiple of a half."""
    state = with_masks(copied(start_of(make())), ALL_ON)
    after, _ = make(target=2.25).on_epoch(state, 4)
    assert len(warnings) == 1
    assert re.fullmatch(
        r"no scheme has a mean of 2.25 planes; the nearest has 2.[05]0", warnings[0]
    )
    assert after.fixed


def test_the_binarization_changes_one_flag():
    made_method = make()
    state = copied(start_of(made_method))._replace(fixed=jnp.array(True))
    after, events = made_method.on_epoch(state, 8)
    assert events == {"binarized": 1.0}
    assert {path for path, change in moved(state, after).items() if change} == {".hard"}
    for epoch in (5, 6, 7, 9):
        same, events = made_method.on_epoch(after, epoch)
        assert events == {} and not any(moved(after, same).values())


def test_freeze_and_binarization_may_come_together():
    made_method = make(freeze_scheme=0.5, binarize=0.5, rewind=False)
    after, events = made_method.on_epoch(copied(start_of(make())), 5)
    assert after.fixed and after.hard
    assert set(events) == {"planes_switched_at_freeze", "binarized"}


@pytest.mark.parametrize(
    ("epochs", "freeze_scheme", "rewind"),
    [(1, 0.5, False), (1, 0.5, True), (3, 0.9, False), (3, 0.9, True), (10, 1.0, False)],
)
def test_the_budget_is_met_however_late_the_freeze_is(epochs, freeze_scheme, rewind, warnings):
    """Also where it falls on the end of the run, at which no epoch begins."""
    run = a_run(epochs)
    binarize = 0.95 if rewind else 1.0
    made_method = make(run=run, freeze_scheme=freeze_scheme, binarize=binarize, rewind=rewind)
    state = copied(start_of(make()))
    for epoch in range(epochs):
        state, _ = made_method.on_epoch(state, epoch)
        state = state._replace(step=state.step + run.steps_per_epoch)
    planes = made_method.scheme(made_method.variables(state)).bits["planes"]
    assert float(costs.mean_bits(made_method.table, planes, by="layer")) == 2.0


def test_what_is_fixed_counts_as_decided():
    """Where the temperature rises anew from 1, masks are no less zeros and ones."""
    made_method = make()
    masks = dict.fromkeys(GROWN, [0.1, 0.1, -0.1, -0.1])
    state = with_masks(copied(start_of(made_method)), masks)._replace(step=jnp.int32(FREEZE + 1))
    open_masks = {
        fixed: made_method.summary(state._replace(fixed=jnp.array(fixed)))["undecided_masks"]
        for fixed in (False, True)
    }
    assert open_masks == {False: 1.0, True: 0.0}
    hard = state._replace(fixed=jnp.array(True), hard=jnp.array(True))
    assert made_method.summary(hard)["undecided_bits"] == 0

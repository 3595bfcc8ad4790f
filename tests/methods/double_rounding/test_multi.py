"""The multi-precision network: training is the loop written by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
from helpers.double_rounding_training import (
    BASE,
    CHOICES,
    HIGHEST,
    KEY,
    LAYERS,
    MODEL,
    PLACE,
    RULES,
    RUN,
    SHAPE,
    TABLE,
    Reference,
    check_step,
    flat_of,
    flatten,
    made,
    make_batch,
    make_variables,
    names_of,
    snapshot,
)
from helpers.random_variables import drawn_variables

from mpq_jax.methods import double_rounding
from mpq_jax.methods.base import TrainingInfo
from mpq_jax.methods.double_rounding import Options, learner, multi
from mpq_jax.program import paths
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import FIRST_LAST_FLOAT, Rule, bit_rules
from mpq_jax.training import metrics as recording

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def variables():
    return make_variables()


@pytest.fixture(scope="module")
def batch():
    return make_batch()


UNIFORM = {bits: dict.fromkeys(LAYERS, bits) for bits in CHOICES}
CASES = {
    "published": BASE,
    "joint": dataclasses.replace(BASE, update="joint", scale_rate="off", distill_weight=0.3),
    "distilled, floored, literal": dataclasses.replace(
        BASE, switch="floor", distill_weight=0.4, label_smoothing=0.1, scale_rate="literal"
    ),
    "unshared, one norm, constant": dataclasses.replace(
        BASE,
        scales="unshared",
        bn_banks="shared",
        scale_rate="constant",
        scale_step_gradient=False,
        distill_weight=1.0,
    ),
}


@pytest.fixture(scope="module", params=CASES)
def trained(request, variables, batch):
    """Three steps of each case, and what the reference makes of them."""
    options = CASES[request.param]
    given = snapshot(variables)
    method = made(options)
    state = method.init(variables, batch["image"], batch["label"])
    reference, start, history, programs = Reference(options), snapshot(state), [], []
    for index in range(3):
        before = snapshot(state.variables)
        with recording.CompileCounter() as counter:
            state, metrics = method.train_step(state, batch, jax.random.key(index))
        programs.append(counter.counts)
        wanted = reference.train_step(before, batch, UNIFORM)
        arrays = reference.theta | reference.stats
        history.append((flat_of(state.variables, options.bn_banks), metrics, arrays, wanted))
    unharmed = jax.tree.all(jax.tree.map(np.array_equal, snapshot(variables), given))
    return options, method, (start, state), history, programs, unharmed


def test_training_is_the_loop_written_by_hand(trained):
    for step in trained[3]:
        check_step(*step)


def test_every_array_that_is_used_moves_and_no_other(trained):
    options, _, (start, state), *_ = trained
    before, _ = flat_of(start.variables, options.bn_banks)
    after, _ = flat_of(state.variables, options.bn_banks)
    moved = {key for key, value in after.items() if np.any(value != before[key])}
    used = set().union(*(names_of(bits, options).values() for bits in UNIFORM.values()))
    assert moved == used
    idle = {f"{layer}/w_step@{bits}" for layer in LAYERS for bits in (3, 2)}
    assert set(after) - used == (set() if options.scales == "unshared" else idle)
    ends = [TABLE.names.index(name) for name in ("stem", "head")]  # float: nothing to learn
    for kind in ("weight_step_sizes", "act_step_sizes"):
        pair = (getattr(s.variables.trainable, kind)[np.array(ends)] for s in (start, state))
        np.testing.assert_array_equal(next(pair), next(pair))


def test_one_program_serves_all_steps_and_precisions(trained):
    options, programs = trained[0], trained[4]
    forwards = 2 if options.distill_weight else 1  # without a teacher, and with one
    assert programs[0]["_gradient"] == forwards
    assert programs[0]["_apply_update"] == 1
    assert not programs[1] and not programs[2]


def test_callers_variables_survive_and_epochs_bring_no_events(trained):
    _, method, (_, state), *_, unharmed = trained
    assert unharmed
    same, events = method.on_epoch(state, 1)
    assert same is state and events == {}
    assert state.step == 3
    assert list(method.eval_bits) == ["w4a4", "w3a3", "w2a2"]
    np.testing.assert_array_equal(method.eval_bits["w3a3"].acts, [32, 3, 3, 32])
    assert method.net.quantizer is trained[0].quantizer


def test_steps_stay_positive_however_large_their_rate(variables, batch):
    options = dataclasses.replace(BASE, scale_learning_rate=5.0, scale_rate="constant")
    start = made(BASE).init(variables, batch["image"]).variables
    own = learner.make_learner(made(BASE).net, options, RUN, max_bits=HIGHEST)
    everywhere = jax.tree.map(lambda leaf: jnp.ones(leaf.shape[:1], bool), start.trainable)
    uphill = learner.Gradient(
        jax.tree.map(lambda leaf: jnp.ones((1, *leaf.shape)), start.trainable),
        start.batch_stats,
        everywhere._replace(
            weight_step_sizes=jnp.ones_like(start.trainable.weight_step_sizes, bool),
            act_step_sizes=jnp.ones_like(start.trainable.act_step_sizes, bool),
        ),
    )
    opt_state = own.init_optimizer(start.trainable)
    after, *_ = own.apply_update(start, opt_state, uphill, jnp.int32(4), jnp.int32(0))
    for steps in (after.trainable.weight_step_sizes, after.trainable.act_step_sizes):
        assert np.all((np.asarray(steps) > 0) & (np.asarray(steps) < 1e-6))


# One update, at one precision.


@pytest.fixture(scope="module")
def two_updates(variables, batch):
    """Returns state before and after an update at 3 bits that follows one at all precisions."""
    method = made(BASE)
    levels = multi.levels_of(method.table)
    own = learner.make_learner(method.net, BASE, RUN, max_bits=HIGHEST)
    start = method.init(variables, batch["image"]).variables
    example = own.prepare(batch, KEY)
    state = start, own.init_optimizer(start.trainable)
    snapshots = []
    for configs in (levels, {3: levels[3]}):
        *state, _ = multi.sequential_updates(own, BASE, *state, example, configs, jnp.int32(0))
        snapshots.append(snapshot(tuple(state)))
    return snapshots


def test_other_precisions_keep_norms_statistics_scales_and_optimizer_state(two_updates):
    (before, opt_before), (after, opt_after) = two_updates
    row, column = CHOICES.index(3), TABLE.candidates.index(3)

    def moved_rows(old, new):
        return np.argwhere((old != new).reshape(len(CHOICES), -1).any(axis=1)).tolist()

    for old_tree, new_tree in (
        (before.trainable.params, after.trainable.params),
        (before.batch_stats, after.batch_stats),
    ):
        old_flat, new_flat = flatten(old_tree), flatten(new_tree)
        for path in old_flat:
            if paths.parent(path) in ("norm1", "norm2"):
                assert moved_rows(old_flat[path], new_flat[path]) == [[row]]
            else:
                assert np.any(old_flat[path] != new_flat[path])
    changed = np.argwhere(before.trainable.act_step_sizes != after.trainable.act_step_sizes)
    assert changed.tolist() == [[place, column] for place in PLACE.values()]
    changed = np.argwhere(before.trainable.weight_step_sizes != after.trainable.weight_step_sizes)
    max_bits = TABLE.candidates.index(HIGHEST)
    assert changed.tolist() == [[place, max_bits] for place in PLACE.values()]
    # The state of Adam for rows of norms: moments and counter of each row.
    pairs = zip(
        jax.tree.leaves(opt_before.inner_states["bn_banks"]),
        jax.tree.leaves(opt_after.inner_states["bn_banks"]),
        strict=True,
    )
    moved = [moved_rows(old, new) for old, new in pairs]
    assert moved and all(rows == [[row]] for rows in moved)


def test_precision_that_has_one_column_of_unshared_scales_moves_it_alone(variables, batch):
    options = CASES["unshared, one norm, constant"]
    method = made(options)
    state = method.init(variables, batch["image"])
    bits = multi.levels_of(method.table)[2]
    one = jax.tree.map(lambda leaf: leaf[None], bits)
    used = method.net.update_mask(state.variables.trainable.params, one)
    wanted = [[place, TABLE.candidates.index(2)] for place in PLACE.values()]
    assert np.argwhere(used.weight_step_sizes).tolist() == wanted
    assert np.argwhere(used.act_step_sizes).tolist() == wanted


# What a user sees.


def test_digits_are_learned_at_every_precision():
    data = sklearn.datasets.load_digits()
    images = jnp.asarray(data.images[:128, ..., None] / 8 - 1, jnp.float32)
    batch = {"image": images, "label": jnp.asarray(data.target[:128] % 3, jnp.int32)}
    run = TrainingInfo(epochs=1, steps_per_epoch=25, prepare=lambda batch, key: batch["image"])
    table = trace_layers(MODEL, (8, 8, 1), rules=RULES)
    options = Options(learning_rate=0.02, scale_learning_rate=1e-3)
    method = double_rounding.FAMILY.make(MODEL, table, options, run)
    variables = drawn_variables(MODEL, (8, 8, 1), 1)
    state = method.init(variables, images, batch["label"])
    history = []
    for index in range(run.steps):
        state, metrics = method.train_step(state, batch, jax.random.key(index))
        history.append({name: float(value) for name, value in metrics.items()})
    for bits in CHOICES:
        assert history[-1][f"loss_w{bits}"] < 0.8 * history[0][f"loss_w{bits}"]
    predict = jax.jit(lambda bits: method.predict(method.variables(state), bits, images))
    logits = [predict(bits) for bits in method.eval_bits.values()]
    assert len(np.unique(np.stack(logits), axis=0)) == len(CHOICES)


def test_precision_trained_alone(variables, batch):
    rules = bit_rules((4,), first_last=FIRST_LAST_FLOAT)
    table = trace_layers(MODEL, SHAPE, rules=rules)
    method = double_rounding.FAMILY.make(MODEL, table, BASE, RUN)
    assert list(method.eval_bits) == ["w4a4"]
    np.testing.assert_array_equal(method.eval_bits["w4a4"].weights, [32, 4, 4, 32])
    state = method.init(variables, batch["image"], batch["label"])
    shape = state.variables.trainable.params["norm2"]["scale"].shape
    assert shape == (3,)  # one row is none
    # The same as a network of several precisions of which only the highest is trained.
    several = made(BASE).init(variables, batch["image"])
    reference = Reference(BASE)
    wanted = reference.train_step(several.variables, batch, {4: UNIFORM[4]})
    state, metrics = method.train_step(state, batch, KEY)
    assert set(metrics) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, atol=1e-5)
    params = state.variables.trainable.params
    for found, key in (
        (params["conv2"]["kernel"], "conv2/kernel"),
        (params["norm2"]["scale"], "norm2/scale@4"),
        (state.variables.trainable.weight_step_sizes[2, 1], "conv2/w_step@4"),
    ):
        np.testing.assert_allclose(found, reference.theta[key], rtol=1e-4, atol=1e-5)


def test_network_without_bits_is_told_what_is_missing(variables, batch):
    method = made(BASE)
    state = method.init(variables, batch["image"])
    with pytest.raises(ValueError, match="needs to be told its bits"):
        method.predict(method.variables(state), None, batch["image"])
    floats = [Rule(weights=32, acts=32, float_weights=True, float_acts=True)]
    table = trace_layers(MODEL, SHAPE, rules=floats)
    with pytest.raises(ValueError, match="no layer of the table has quantized weights"):
        double_rounding.FAMILY.make(MODEL, table, BASE, RUN)

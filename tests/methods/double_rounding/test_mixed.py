"""The mixed-precision supernet: starts, traces, and training by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.double_rounding_training import (
    BASE,
    CHOICES,
    LAYERS,
    MIXED,
    MODEL,
    PLACE,
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
    roulette_by_hand,
    snapshot,
)

from mpq_jax.methods import double_rounding
from mpq_jax.methods.double_rounding import mixed, multi
from mpq_jax.program import paths
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import FIRST_LAST_FLOAT, bit_rules
from mpq_jax.training import metrics as recording


@pytest.fixture(scope="module")
def variables():
    return make_variables()


@pytest.fixture(scope="module")
def batch():
    return make_batch()


@pytest.fixture(scope="module")
def several(variables, batch):
    """A multi-precision network whose rows have all become different."""
    method = made(BASE)
    start = method.init(variables, batch["image"]).variables
    generator = np.random.default_rng(1)

    def change(x):
        return jnp.asarray(x * generator.uniform(0.7, 1.3, x.shape), jnp.float32)

    trainable, batch_stats = jax.tree.map(change, (start.trainable, start.batch_stats))
    return method, start._replace(trainable=trainable, batch_stats=batch_stats)


@pytest.fixture(scope="module")
def mixed_start(several, batch):
    method = made(MIXED)
    given = snapshot(several[1])
    state = method.init(several[1], batch["image"], batch["label"])
    assert method.layers_at_floor(state) == []
    return method, state, given


def test_uniform_predictions_start_as_those_of_the_multi_precision_network(
    several, mixed_start, batch
):
    (multi_method, network), (method, state, _) = several, mixed_start
    table = TABLE.with_bn_banks("transition")
    assert method.table == table
    assert state.step == 0

    def predictions(method, variables):
        predict = jax.jit(lambda bits: method.predict(variables, bits, batch["image"]))
        return {name: np.asarray(predict(bits)) for name, bits in method.eval_bits.items()}

    found = predictions(method, method.variables(state))
    wanted = predictions(multi_method, network)
    assert list(found) == list(wanted) == ["w4a4", "w3a3", "w2a2"]
    for name, logits in wanted.items():
        np.testing.assert_array_equal(found[name], logits)
    assert len(np.unique(np.stack(list(wanted.values())), axis=0)) == len(CHOICES)


def test_rows_are_repeated_whatever_the_previous_layers_bits(several, mixed_start):
    network, state = several[1], mixed_start[1]
    pairs = (
        (network.trainable.params, state.variables.trainable.params),
        (network.batch_stats, state.variables.batch_stats),
    )
    for source, repeated in pairs:
        source, repeated = flatten(source), flatten(repeated)
        for path in (path for path in repeated if paths.parent(path) in ("norm1", "norm2")):
            for own in range(3):
                for previous in range(3):
                    np.testing.assert_array_equal(repeated[path][own, previous], source[path][own])


def test_traces_are_those_of_the_float_kernels_with_the_norms_of_the_highest_bits(
    several, mixed_start, batch
):
    network, state = several[1], mixed_start[1]

    def float_model(row):
        def gathered(tree):
            return paths.map_leaves(
                tree,
                lambda path, x: x[row] if paths.parent(path) in ("norm1", "norm2") else x,
            )

        return {
            "params": gathered(network.trainable.params),
            "batch_stats": gathered(network.batch_stats),
        }

    def traces(row):
        return mixed.hessian_traces(
            made(MIXED).net, MIXED, float_model(row), batch["image"], batch["label"]
        )

    np.testing.assert_array_equal(state.traces, traces(0).mean)
    np.testing.assert_array_equal(state.trace_errors, traces(0).standard_error)
    assert np.all(state.traces != traces(2).mean)


def test_probabilities_follow_from_the_traces_as_published(mixed_start):
    _, state, _ = mixed_start
    wanted = roulette_by_hand(TABLE, np.asarray(state.traces))
    np.testing.assert_allclose(state.probabilities, wanted, rtol=1e-6)


@pytest.mark.slow
def test_mixed_training_is_the_loop_written_by_hand(mixed_start, several, batch, monkeypatch):
    method, state, given = mixed_start
    state = jax.tree.map(jnp.array, state)  # the fixture's is not to be consumed
    reference = Reference(MIXED)
    drawn, update = [], multi.sequential_updates

    def record(learner, options, variables, opt_state, example, configs, step):
        drawn.append({base: snapshot(bits) for base, bits in configs.items()})
        return update(learner, options, variables, opt_state, example, configs, step)

    monkeypatch.setattr(multi, "sequential_updates", record)
    programs, mixes = [], set()
    for index in range(4):
        before = snapshot(state.variables)
        with recording.CompileCounter() as counter:
            state, metrics = method.train_step(state, batch, jax.random.key(index))
        programs.append(counter.counts)
        configs = {
            base: {layer: int(bits.weights[PLACE[layer]]) for layer in LAYERS}
            for base, bits in drawn[-1].items()
        }
        mixes |= {tuple(bits.values()) for bits in configs.values()}
        wanted = reference.train_step(before, batch, configs)
        check_step(
            flat_of(state.variables, "transition"),
            metrics,
            reference.theta | reference.stats,
            wanted,
        )
    assert len(mixes) > 3 and any(first != second for first, second in mixes)
    assert programs[0]["_gradient"] == programs[0]["_apply_update"] == 1
    assert not any(programs[1:])
    assert jax.tree.all(jax.tree.map(np.array_equal, snapshot(several[1]), given))
    before, after = mixed_start[1], state
    np.testing.assert_array_equal(after.probabilities, before.probabilities)
    np.testing.assert_array_equal(after.traces, before.traces)


def test_start_from_a_float_model(variables, batch):
    method = made(MIXED)
    given = snapshot(variables)
    state = method.init(variables, batch["image"], batch["label"])
    traces = mixed.hessian_traces(made(MIXED).net, MIXED, variables, batch["image"], batch["label"])
    np.testing.assert_array_equal(state.traces, traces.mean)
    for tree, source in (
        (state.variables.trainable.params, variables["params"]),
        (state.variables.batch_stats, variables["batch_stats"]),
    ):
        flat = flatten(source)
        for path, leaf in flatten(tree).items():
            rows = (3, 3) if paths.parent(path) in ("norm1", "norm2") else ()
            np.testing.assert_array_equal(
                leaf, np.broadcast_to(flat[path], rows + flat[path].shape)
            )
    jax.tree.map(np.testing.assert_array_equal, snapshot(variables), given)


def test_traces_need_labels(variables, batch):
    method = made(MIXED)
    with pytest.raises(ValueError, match=r"need labels: call init\(variables, images, labels\)"):
        method.init(variables, batch["image"])


def test_a_supernet_needs_a_choice():
    table = trace_layers(MODEL, SHAPE, rules=bit_rules((4,), first_last=FIRST_LAST_FLOAT))
    with pytest.raises(ValueError, match="no layer of the table has a choice of bits"):
        double_rounding.MIXED_FAMILY.make(MODEL, table, MIXED, RUN)


def test_the_first_epoch_logs_what_the_roulette_was_made_from(mixed_start):
    method, state, _ = mixed_start
    same, events = method.on_epoch(state, 0)
    assert same is state and method.on_epoch(state, 1) == (state, {})
    bits = np.asarray(state.probabilities) @ np.array(TABLE.candidates)
    for index, name in enumerate(TABLE.names):
        assert events[f"trace/{name}"] == float(state.traces[index])
        assert events[f"trace_error/{name}"] == float(state.trace_errors[index])
        np.testing.assert_allclose(events[f"roulette_bits/{name}"], bits[index], rtol=1e-6)

"""Training with RFQuant, step by step, against a reference written anew."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_variables import drawn_variables
from helpers.rfquant_networks import (
    CHOICES,
    CONV,
    HEAD,
    KEY,
    MODEL,
    NET,
    RUN,
    SHAPE,
    STEM,
    TABLE,
    config,
    pulled_codes,
)

from mpq_jax.methods import rfquant
from mpq_jax.methods.base import TrainingInfo
from mpq_jax.methods.rfquant.options import Options
from mpq_jax.program import paths
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet import bn_banks
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import Rule
from mpq_jax.supernet.state import SupernetState, TrainableParams
from mpq_jax.training import metrics as recording

# Constant rates, and every term large enough to matter from the first steps on.
BASE = Options(
    learning_rate=0.05,
    end_learning_rate=0.05,
    warmup=0.0,
    step_learning_rate=1e-3,
    weight_decay=0.02,
    clip_value=0.05,
    idm_weight=0.5,
    qe_start=0.0,
    freeze_ratio_start=1.0,  # the only layer, at every event: from the second epoch on
    freeze_ratio_end=1.0,
    subnet_loop="calls",
)


@pytest.fixture(scope="module")
def variables():
    return drawn_variables(MODEL, SHAPE, 0)


@pytest.fixture(scope="module")
def batch():
    labels = np.arange(16, dtype=np.int32) % 3
    images = np.random.default_rng(0).normal(size=(16, 8, 8, 1))
    images += np.linspace(-1, 1, 8)[:, None] * (labels - 1)[:, None, None, None]
    return {"image": jnp.asarray(images, jnp.float32), "label": jnp.asarray(labels)}


def snapshot(state):
    return jax.tree.map(np.array, state)


def drawn(key, mask, count):
    """The subnets of a step: its key gives one for the images, for the bits, for dropout."""
    keys = jax.random.split(jax.random.split(key, 3)[1], count)
    return [bit_configs.sample(k, TABLE.candidates, jnp.asarray(mask)) for k in keys]


# Training. One run of six epochs of one step is shared by the tests that follow.


@pytest.fixture(scope="module")
def history(variables, batch):
    """States before and after every step, their keys, the counter, and what became of the input."""
    given = jax.tree.map(np.array, variables)
    made = rfquant.make(MODEL, TABLE, BASE, RUN)
    states, keys, totals, logged = [], [], [], []
    with recording.CompileCounter() as counter:
        state = made.init(variables, batch["image"])
        for epoch in range(6):
            state, happened = made.on_epoch(state, epoch)
            before, key = snapshot(state), jax.random.key(epoch)
            state, metrics = made.train_step(state, batch, key)
            states.append((before, snapshot(state)))
            keys.append(key)
            totals.append(sum(counter.counts.values()))
            logged.append((happened, metrics))
    unharmed = jax.tree.map(np.array_equal, variables, given)
    return made, states, keys, (counter, totals, logged), unharmed


def test_the_callers_variables_survive_training(history):
    assert jax.tree.all(history[-1])


def test_metrics_are_finite_scalars(history):
    for _, metrics in history[3][2]:
        assert all(np.shape(value) == () and np.isfinite(value) for value in metrics.values())
        assert {"loss_max", "loss_subnets", "kl_subnets", "idm_subnets", "qe_subnets"} <= set(
            metrics
        )


def test_every_program_compiles_once_whatever_is_frozen(history):
    counter, totals, logged = history[3]
    assert [events.get("frozen_layers") for events, _ in logged] == [None, *[1.0] * 5]
    missing = [np.argwhere(TABLE.mask & ~before.mask).tolist() for before, _ in history[1]]
    assert missing == [[], *[[[CONV, 0, 3]]] * 5]
    programs = ("_begin", "_max_subnet", "_random_subnet", "_finish", "freeze_most_unstable")
    assert {counter.counts[name] for name in programs} == {1}
    assert totals[-1] == totals[1]  # the first event comes in the second epoch


def test_freezing_changes_what_is_drawn_without_recompiling(history, batch):
    made, states, keys, (counter, *_), _ = history
    before = states[0][0]
    mask = np.zeros_like(before.mask)
    mask[STEM, :, 0] = mask[HEAD, :, 0] = True
    mask[CONV, 0, 2] = mask[CONV, 1, 3] = True  # 3 bits of weights, 2 of activations
    with recording.CompileCounter() as again:
        state = jax.tree.map(jnp.array, before)._replace(mask=jnp.asarray(mask))
        after, _ = made.train_step(state, batch, keys[0])
    assert not {name for name in again.counts if name.startswith("_")}
    old, new = (v.batch_stats["block"]["norm"]["mean"] for v in (before.variables, after.variables))
    moved = np.any(old != np.asarray(new), axis=-1)
    assert np.argwhere(moved).tolist() == [[1, 2]]  # the largest allowed bits are the only ones


def rows_of(configs):
    return {
        (CHOICES.index(int(c.weights[CONV])), CHOICES.index(int(c.acts[CONV]))) for c in configs
    }


def test_rows_that_no_subnet_used_are_left_alone(history):
    """By momentum, weight decay and Adam alike, also where earlier steps had used them."""
    _, states, keys, _, _ = history
    resting, used_before = 0, set()
    for (before, after), key in zip(states, keys, strict=True):
        configs = [config(4, 4), *drawn(key, before.mask, 3)]
        used = rows_of(configs)
        old, new = before.variables, after.variables
        for row in np.ndindex(3, 3):
            pairs = [
                (
                    old.batch_stats["block"]["norm"][name][row],
                    new.batch_stats["block"]["norm"][name][row],
                )
                for name in ("mean", "var")
            ] + [
                (
                    old.trainable.params["block"]["norm"][name][row],
                    new.trainable.params["block"]["norm"][name][row],
                )
                for name in ("scale", "bias")
            ]
            for a, b in pairs:
                assert np.array_equal(a, b) == (row not in used)
        for axis, name in enumerate(("weight_step_sizes", "act_step_sizes")):
            for choice in range(3):
                a, b = (getattr(v.trainable, name)[CONV, 1 + choice] for v in (old, new))
                assert (a == b) == (choice not in {row[axis] for row in used})
        resting += len(used_before - used)
        used_before |= used
    assert resting > 0  # rows with momentum had to rest


def decay_at(step):
    return min(0.9997, (1 + step) / (10 + step))


def test_average_is_the_exponential_moving_average_with_warm_up(history):
    made, states, _, _, _ = history
    first = states[0][0]
    parts = lambda v: (v.trainable, v.batch_stats)  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, parts(first.average), parts(first.variables))
    average = parts(first.average)
    for step, (_, after) in enumerate(states):
        d = decay_at(step)
        average = jax.tree.map(
            lambda a, x, d=d: d * a + (1 - d) * x, average, parts(after.variables)
        )
        jax.tree.map(
            # float32 against float64
            lambda a, x: np.testing.assert_allclose(x, a, rtol=1e-5, atol=1e-7),
            average,
            parts(after.average),
        )
    assert made.variables(states[-1][1]) is states[-1][1].average


def cross_entropy(logits, labels, smoothing):
    log_p = jax.nn.log_softmax(logits)
    hard = -jnp.mean(log_p[jnp.arange(len(labels)), labels])
    return (1 - smoothing) * hard - smoothing * jnp.mean(log_p)


def quantization_error(w, step, bits):
    """Of one kernel, with 2 bits as the lowest ones."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    code = jax.lax.stop_gradient(jnp.clip(jnp.round(w / step), low, high))
    pulled = jnp.isin(code, jnp.array(sorted(pulled_codes(bits, 2)), jnp.float32))
    distance = jnp.clip(w, low * step, high * step) - code * step
    return jnp.sum(jnp.mean(jnp.where(pulled, distance, 0) ** 2, (0, 1, 2)))


def summed_loss(trainable, variables, batch, pairs, options, step):
    """The loss of all subnets of a step, in one expression; with the statistics after it.

    `pairs` are the bits that the random subnets drew for the layer between the fixed ones.
    """
    stats, steps = variables.batch_stats, jax.lax.stop_gradient(trainable.weight_step_sizes)
    w = trainable.params["block"]["conv"]["kernel"]
    twos = sum(b == 2 for b, _ in pairs)
    progress = step / RUN.steps
    total, taken_back, teacher = jnp.zeros(()), jnp.zeros(()), None
    for b, a in [(4, 4), *pairs]:
        bits = config(b, a)
        subnet = NET.select(
            SupernetState(trainable, stats, variables.signed),
            bits,
            scale_step_gradient=options.scale_step_gradient,
        )
        out = NET.forward(
            subnet,
            batch["image"],
            train=True,
            scale_step_gradient=options.scale_step_gradient,
        )
        stats = bn_banks.scatter(TABLE, stats, bits, out.batch_stats)
        place = "block/norm" if options.idm_features == "norm_output" else "block"
        hard = cross_entropy(out.logits, batch["label"], options.label_smoothing)
        if teacher is None:
            total += hard
            teacher = jax.lax.stop_gradient((out.logits, out.features[place]))
            continue
        p = jax.nn.softmax(teacher[0])
        kl = jnp.mean(jnp.sum(p * (jnp.log(p) - jax.nn.log_softmax(out.logits)), -1))
        total += (1 - options.soft_label_weight) * hard + options.soft_label_weight * kl
        s = steps[CONV, TABLE.candidates.index(b)]
        total += 0.1 * 0.5 * (1 - np.cos(np.pi * progress)) * quantization_error(w, s, b)
        if b == 2:
            total += options.idm_weight * jnp.mean((out.features[place] - teacher[1]) ** 2)
            norm = 0.5 * jnp.sum(jnp.clip(w, -2 * s, s) ** 2)
            share = twos if options.two_bit_count == "once" else 1
            taken_back += -options.weight_decay / share * norm
    if options.gradient == "mean":
        total = total / (len(pairs) + 1)
    return total + taken_back, stats  # weight decay is not averaged, so what it loses is not either


def first_update(trainable, gradient, options):
    """The first step of SGD-Nesterov and of Adam, after clipping, in closed form."""
    clip = options.clip_value

    def sgd(path, w, g):
        g = jnp.clip(g, -clip, clip) if clip else g
        decay = options.weight_decay if path in ("stem/kernel", "block/conv/kernel") else 0.0
        return w - options.learning_rate * (1 + options.momentum) * (g + decay * w)

    def adam(s, g):
        g = jnp.clip(g, -clip, clip) if clip else g
        return s - options.step_learning_rate * g / (jnp.abs(g) + 1e-8)

    flat = paths.flatten(gradient.params)
    return TrainableParams(
        paths.map_leaves(trainable.params, lambda path, w: sgd(path, w, flat[path])),
        adam(trainable.weight_step_sizes, gradient.weight_step_sizes),
        adam(trainable.act_step_sizes, gradient.act_step_sizes),
    )


SWITCHED = dataclasses.replace(
    BASE,
    random_subnets=2,
    subnet_loop="unrolled",
    gradient="mean",
    two_bit_count="each",
    idm_features="block_output",
    label_smoothing=0.1,
    soft_label_weight=0.3,
    scale_step_gradient=True,
    clip_value=0.0,
    ema_warmup=False,
    ema_decay=0.75,
)


def two_bits_twice(mask, count):
    """Returns a key under which two subnets have 2-bit weights but not the same activations."""
    for seed in range(1000):
        configs = drawn(jax.random.key(seed), mask, count)
        pairs = [(int(c.weights[CONV]), int(c.acts[CONV])) for c in configs]
        if sum(w == 2 for w, _ in pairs) == 2 and len(set(pairs)) == count:
            return jax.random.key(seed), pairs
    raise AssertionError("no such draw")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [BASE, pytest.param(SWITCHED, marks=pytest.mark.slow)], ids=["sum", "mean"]
)
def test_a_step_follows_one_gradient_of_the_summed_loss(history, variables, batch, options):
    if options is BASE:
        made = history[0]
    else:
        made = rfquant.make(MODEL, TABLE, options, RUN)
    state = made.init(variables, batch["image"])
    key, pairs = two_bits_twice(state.mask, options.random_subnets)
    step = 20  # of 30: the quantization-error loss has weight
    variables = jax.tree.map(jnp.copy, state.variables)
    after, _ = made.train_step(state._replace(step=jnp.array(step, jnp.int32)), batch, key)

    @jax.jit
    def reference(trainable):
        gradient, stats = jax.grad(
            lambda p: summed_loss(p, variables, batch, pairs, options, step), has_aux=True
        )(trainable)
        return first_update(trainable, gradient, options), stats, gradient

    trainable, stats, gradient = reference(variables.trainable)
    wanted, found = paths.flatten(trainable.params), paths.flatten(after.variables.trainable.params)
    for path, leaf in wanted.items():
        # float32 gradients summed in another order, times a rate of 0.05
        np.testing.assert_allclose(found[path], leaf, rtol=1e-5, atol=2e-6, err_msg=path)
    for name in ("weight_step_sizes", "act_step_sizes"):
        pair = getattr(after.variables.trainable, name), getattr(trainable, name)
        np.testing.assert_allclose(*pair, rtol=1e-5, atol=1e-6)
    for path, leaf in paths.flatten(stats).items():
        found = paths.flatten(after.variables.batch_stats)[path]
        np.testing.assert_allclose(found, leaf, rtol=1e-5, atol=1e-6)
    if options.clip_value:
        largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient))
        assert largest > 2 * options.clip_value  # the bound was felt
    else:
        average = jax.tree.map(
            lambda old, new: 0.75 * old + 0.25 * new,
            variables.trainable,
            after.variables.trainable,
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
            after.average.trainable,
            average,
        )


def assert_same_step(found, wanted):
    """Compares states after one step whose float32 sums had another order."""
    pairs = zip(jax.tree.leaves(found.variables), jax.tree.leaves(wanted.variables), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["scan", pytest.param("unrolled", marks=pytest.mark.slow)])
def test_all_loops_over_the_subnets_take_the_same_step(history, batch, loop):
    made = rfquant.make(MODEL, TABLE, dataclasses.replace(BASE, subnet_loop=loop), RUN)
    before, after = history[1][2]
    state, metrics = made.train_step(jax.tree.map(jnp.array, before), batch, history[2][2])
    assert_same_step(state, after)
    wanted = history[3][2][2][1]
    assert set(metrics) == set(wanted)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-4, atol=1e-6)  # float32


@pytest.mark.slow
def test_a_batch_spread_over_eight_devices_takes_the_same_step(history, batch):
    made, states, keys, (_, _, logged), _ = history
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    before, after = states[2]
    state = jax.device_put(before, jax.sharding.NamedSharding(mesh, spec()))
    spread = jax.device_put(batch, jax.sharding.NamedSharding(mesh, spec("data")))
    state, metrics = made.train_step(state, spread, keys[2])
    assert_same_step(state, after)  # sums over devices come in another order
    np.testing.assert_allclose(metrics["loss_max"], logged[2][1]["loss_max"], rtol=1e-5)


SWITCHES = [
    ({"random_subnets": 0}, "loss_subnets"),
    ({"random_subnets": 0, "subnet_loop": "scan"}, "loss_subnets"),
    ({"soft_label_weight": 0.0}, "kl_subnets"),
    ({"idm_weight": 0.0}, "idm_subnets"),
    ({"qe_weight": 0.0}, "qe_subnets"),
    ({"two_bit_weight": 0.0}, "two_bit_subnets"),
    ({"clip_value": 0.0}, None),
    ({"ema_decay": 0.0}, None),
    ({"norm_banks": False}, None),
    ({"momentum": 0.0, "weight_decay": 0.0}, None),
]


@pytest.mark.slow
@pytest.mark.parametrize(("change", "gone"), SWITCHES, ids=lambda value: str(value))
def test_every_element_can_be_switched_off(variables, batch, change, gone):
    """Traces a step without compiling it: the states fit, and the element's metric is gone."""
    made = rfquant.make(MODEL, TABLE, dataclasses.replace(BASE, **change), RUN)
    state = jax.eval_shape(made.init, variables, batch["image"])
    after, metrics = jax.eval_shape(made.train_step, state, batch, KEY)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert gone not in metrics
    assert made.variables(after) is (after.variables if "ema_decay" in change else after.average)


@pytest.mark.slow
@pytest.mark.parametrize(("change", "gone"), SWITCHES, ids=lambda value: str(value))
def test_training_with_an_element_switched_off(variables, batch, change, gone):
    made = rfquant.make(MODEL, TABLE, dataclasses.replace(BASE, **change), RUN)
    state = made.init(variables, batch["image"])
    for step in range(3):
        state, metrics = made.train_step(state, batch, jax.random.key(step))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))
    assert gone not in metrics


def test_with_all_elements_off_a_step_is_plain_quantized_training(variables, batch):
    options = Options(
        random_subnets=0,
        clip_value=0.0,
        ema_decay=0.0,
        norm_banks=False,
        momentum=0.0,
        weight_decay=0.0,
        learning_rate=0.1,
        end_learning_rate=0.1,
        warmup=0.0,
        freeze_ratio_start=0.0,
        freeze_ratio_end=0.0,
        subnet_loop="unrolled",
    )
    made = rfquant.make(MODEL, TABLE, options, RUN)
    state = made.init(variables, batch["image"])
    assert made.on_epoch(state, 5)[1] == {}
    before = snapshot(state)
    after, metrics = made.train_step(state, batch, KEY)
    start = jax.tree.map(jnp.array, before.variables)
    net = dataclasses.replace(NET, table=TABLE.with_bn_banks("shared"))

    @jax.jit
    def gradient(params):
        def loss(params):
            trainable = start.trainable._replace(params=params)
            subnet = net.select(start._replace(trainable=trainable), config(4, 4))
            out = net.forward(subnet, batch["image"], train=True)
            return cross_entropy(out.logits, batch["label"], 0.0)

        return jax.value_and_grad(loss)(params)

    loss, wanted = gradient(start.trainable.params)
    np.testing.assert_allclose(metrics["loss_max"], loss, rtol=1e-6)
    jax.tree.map(
        lambda new, old, g: np.testing.assert_allclose(new, old - 0.1 * g, atol=1e-6),
        after.variables.trainable.params,
        start.trainable.params,
        wanted,
    )


@pytest.mark.slow_but_first
@pytest.mark.parametrize("epochs", [1, 2, 40])
def test_runs_of_any_length_can_be_made_and_traced(variables, batch, epochs):
    run = TrainingInfo(epochs, 1, RUN.prepare)
    made = rfquant.make(MODEL, TABLE, Options(), run)
    state = jax.eval_shape(made.init, variables, batch["image"])
    jax.eval_shape(made.train_step, state, batch, KEY)


def test_a_table_without_choices_is_refused():
    table = trace_layers(MODEL, (8, 8, 1), rules=[Rule(weights=4, acts=4)])
    with pytest.raises(ValueError, match="no layer of the table has a choice"):
        rfquant.make(MODEL, table, BASE, RUN)


def test_evaluation_names_uniform_bits_and_predict_needs_them(history, batch):
    made, states = history[:2]
    assert list(made.eval_bits) == ["w4a4", "w3a3", "w2a2"]
    average = made.variables(jax.tree.map(jnp.array, states[-1][1]))
    with pytest.raises(ValueError, match="bits"):
        made.predict(average, None, batch["image"])
    predict = jax.jit(made.predict)
    before = snapshot(average)
    logits = [predict(average, bits, batch["image"]) for bits in made.eval_bits.values()]
    assert not np.array_equal(logits[0], logits[2])
    jax.tree.map(np.testing.assert_array_equal, average, before)

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
from helpers.random_variables import drawn_variables

from mpq_jax.methods import METHODS, double_rounding
from mpq_jax.methods.base import Run
from mpq_jax.methods.double_rounding import MixedOptions, Options, learner, mixed, multi
from mpq_jax.program import paths
from mpq_jax.supernet import supernet
from mpq_jax.supernet.layer_table import FIRST_LAST_FLOAT, Rule, bit_rules, trace_layers
from mpq_jax.training import metrics as recording

CHOICES = (4, 3, 2)  # with factors 1, 0.5 and 0.1
HIGHEST = 4
KEY = jax.random.key(0)
SHAPE = (4, 4, 2)
LAYERS = ("conv1", "conv2")
RUN = Run(epochs=4, steps_per_epoch=2, prepare=lambda batch, key: batch["image"])


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        def norm(x, name):
            return nn.relu(nn.BatchNorm(use_running_average=not train, name=name)(x))

        x = nn.Conv(3, (3, 3), strides=2, use_bias=False, name="stem")(x)
        x = norm(x, "stem_norm")
        x = norm(nn.Conv(3, (3, 3), use_bias=False, name="conv1")(x), "norm1")
        x = norm(nn.Conv(3, (3, 3), use_bias=False, name="conv2")(x), "norm2")
        return nn.Dense(3, name="head")(x.mean((1, 2)))


MODEL = Net()
RULES = bit_rules(CHOICES, first_last=FIRST_LAST_FLOAT)
TABLE = trace_layers(MODEL, SHAPE, rules=RULES)
PLACE = {name: TABLE.names.index(name) for name in LAYERS}
# Rates, decay and gradients large enough to matter from the first update on.
BASE = Options(
    learning_rate=0.02,
    end_learning_rate=0.005,
    scale_learning_rate=0.02,
    weight_decay=0.05,
)


@pytest.fixture(scope="module")
def variables():
    return drawn_variables(MODEL, SHAPE, 0)


@pytest.fixture(scope="module")
def batch():
    labels = np.arange(6, dtype=np.int32) % 3
    images = np.random.default_rng(0).normal(size=(6, *SHAPE))
    images += (labels - 1)[:, None, None, None]
    return {"image": jnp.asarray(images, jnp.float32), "label": jnp.asarray(labels)}


def snapshot(tree):
    return jax.tree.map(np.array, tree)


@functools.cache
def made(options):
    """The method by its options: they are hashable, and compiling takes seconds."""
    family = double_rounding.MIXED_FAMILY if options == MIXED else double_rounding.FAMILY
    return family.make(MODEL, TABLE, options, RUN)


def flatten(tree):
    return paths.flatten(jax.tree.map(jnp.asarray, tree))


# Options.


@pytest.mark.parametrize("kind", [Options, MixedOptions])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"update": "both"}, r"update is 'both'; wanted one of \('sequential', 'joint'\)"),
        ({"scales": "one"}, "scales is 'one'.*'unshared'"),
        ({"switch": "shift"}, "switch is 'shift'.*'floor'"),
        ({"scale_rate": "printed"}, "scale_rate is 'printed'.*'literal'.*'off'"),
        ({"bn_banks": "pair"}, "bn_banks is 'pair'.*'weights'"),
        ({"distill_weight": 1.5}, "distill_weight is 1.5; wanted a number from 0 to 1"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"warmup": 2.0}, "warmup is 2.0"),
        ({"scales": "unshared", "switch": "floor"}, "'unshared' and switch is 'floor'; wanted one"),
        ({"update": "joint"}, 'update is "joint" and scale_rate is \'relative\'.*"off"'),
    ],
)
def test_bad_options_are_refused(kind, change, message):
    with pytest.raises(ValueError, match=message):
        kind(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"roulette": "hessian"}, "roulette is 'hessian'; known: .*'published'"),
        ({"switch_probability": 1.1}, "switch_probability is 1.1; wanted"),
        ({"switch_probability": -0.1}, "switch_probability is -0.1"),
        ({"trace_probes": 1}, "trace_probes is 1 and trace_batch 128; wanted at least 2"),
        ({"trace_batch": 0}, "trace_batch 0"),
    ],
)
def test_bad_options_of_the_mixed_supernet_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MixedOptions(**change)


def test_norms_per_transition_are_of_the_mixed_supernet_alone():
    with pytest.raises(ValueError, match="bn_banks is 'transition'"):
        Options(bn_banks="transition")
    assert MixedOptions().bn_banks == "transition"


def test_defaults_are_as_published():
    options = Options()
    assert (options.update, options.scales, options.switch) == ("sequential", "shared", "round")
    assert (options.learning_rate, options.scale_learning_rate) == (5e-4, 5e-4)
    assert (options.end_learning_rate, options.warmup, options.weight_decay) == (0.0, 0.0, 5e-5)
    assert options.distill_weight == 0 and options.bn_banks == "weights"


def test_both_methods_are_listed():
    assert METHODS["double_rounding"] is double_rounding.FAMILY
    assert METHODS["double_rounding_mixed"] is double_rounding.MIXED_FAMILY
    assert double_rounding.FAMILY.options is Options
    assert double_rounding.MIXED_FAMILY.options is MixedOptions


# The reference: one flat dict of learned arrays, in which "name@bits" belongs to these bits, and
# a forward pass in plain jax.numpy. Ends and their norm are float and common to all bits.


def names_of(bits, options):
    """Returns the keys of what a configuration {layer: bits} uses, by their name in the net."""
    names = {name: name for name in ("stem/kernel", "head/kernel", "head/bias")}
    names |= {f"stem_norm/{part}": f"stem_norm/{part}" for part in ("scale", "bias")}
    previous = "conv1"
    for index, layer in enumerate(LAYERS, start=1):
        names[f"{layer}/kernel"] = f"{layer}/kernel"
        row = {
            "shared": "",
            "weights": f"@{bits[layer]}",
            "transition": f"@{bits[layer]},{bits[previous]}",
        }[options.bn_banks]
        names |= {f"norm{index}/{part}": f"norm{index}/{part}{row}" for part in ("scale", "bias")}
        own = bits[layer] if options.scales == "unshared" else HIGHEST
        names[f"{layer}/w_step"] = f"{layer}/w_step@{own}"
        names[f"{layer}/x_step"] = f"{layer}/x_step@{bits[layer]}"
    return names


def stats_names_of(bits, options):
    names = names_of(bits, options)
    return {
        name.replace("scale", part): key.replace("scale", part)
        for name, key in names.items()
        if name.endswith("/scale")
        for part in ("mean", "var")
    }


def flat_of(variables, bn_banks):
    """Returns the learned arrays and the statistics of a supernet as such flat dicts."""

    def rows_of(tree):
        flat = {}
        for path, leaf in flatten(tree).items():
            if bn_banks == "shared" or paths.parent(path) not in ("norm1", "norm2"):
                flat[path] = leaf
                continue
            for i, own in enumerate(CHOICES):
                if bn_banks == "weights":
                    flat[f"{path}@{own}"] = leaf[i]
                else:
                    flat |= {f"{path}@{own},{b}": leaf[i, j] for j, b in enumerate(CHOICES)}
        return flat

    trainable = rows_of(variables.trainable.params)
    for layer in LAYERS:
        for bits in CHOICES:
            column = TABLE.candidates.index(bits)
            steps = variables.trainable
            trainable[f"{layer}/w_step@{bits}"] = steps.weight_step_sizes[PLACE[layer], column]
            trainable[f"{layer}/x_step@{bits}"] = steps.act_step_sizes[PLACE[layer], column]
    return snapshot(trainable), snapshot(rows_of(variables.batch_stats))


def straight_through(v, code, low, high):
    """Returns `code`, whose derivative in v is 1 within [low, high] and 0 elsewhere."""
    inside = (v >= low) & (v <= high)
    passing = v + jax.lax.stop_gradient(code - v)
    return jnp.where(inside, passing, jax.lax.stop_gradient(code))


def scaled_gradient(x, factor):
    return x * factor + jax.lax.stop_gradient(x - x * factor)


def quantized_kernel(w, step, bits, rule):
    """Section 2 of the method; `bits` are traced, floats."""
    ratio = 2.0 ** (HIGHEST - bits)
    low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    step = scaled_gradient(step, jnp.where(rule["scaled"], 1 / jnp.sqrt(w.size * high), 1.0))
    width = jnp.where(rule["unshared"], step, step * ratio)
    top = 2.0 ** (HIGHEST - 1)
    stored = jnp.round(jnp.clip(w * (ratio / width), -top, top - 1))
    lower = jnp.where(rule["floored"], jnp.floor(stored / ratio), jnp.round(stored / ratio))
    code = jax.lax.stop_gradient(jnp.clip(lower, low, high))
    return straight_through(w / width, code, low, high) * width


def quantized_input(x, step, bits, rule):
    high = 2.0**bits - 1
    step = scaled_gradient(step, jnp.where(rule["scaled"], 1 / jnp.sqrt(x.size * high), 1.0))
    v = x / step
    code = jax.lax.stop_gradient(jnp.round(jnp.clip(v, 0.0, high)))
    return straight_through(v, code, 0.0, high) * step


def convolved(x, kernel, stride=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def forward(theta, images, bits, rule):
    """Returns the logits in training mode, and mean and variance of every norm's input."""
    seen = {}

    def norm(x, name):
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        seen[f"{name}/mean"], seen[f"{name}/var"] = mean, var
        row = (1, 1, 1, -1)
        x = (x - mean.reshape(row)) / jnp.sqrt(var.reshape(row) + 1e-5)
        scale, bias = (theta[f"{name}/{part}"].reshape(row) for part in ("scale", "bias"))
        return jnp.maximum(x * scale + bias, 0.0)

    x = norm(convolved(images, theta["stem/kernel"], 2), "stem_norm")
    for index, layer in enumerate(LAYERS, start=1):
        kernel = quantized_kernel(
            theta[f"{layer}/kernel"], theta[f"{layer}/w_step"], bits[layer], rule
        )
        x = quantized_input(x, theta[f"{layer}/x_step"], bits[layer], rule)
        x = norm(convolved(x, kernel), f"norm{index}")
    logits = x.mean((1, 2)) @ theta["head/kernel"] + theta["head/bias"].reshape(1, -1)
    return logits, seen


@jax.jit
@functools.partial(jax.grad, has_aux=True)
def reference_gradient(theta, batch, bits, rule, teacher):
    logits, seen = forward(theta, batch["image"], bits, rule)
    log_p = jax.nn.log_softmax(logits)
    target = jax.nn.one_hot(batch["label"], 3) * (1 - rule["smoothing"]) + rule["smoothing"] / 3
    cross_entropy = -jnp.mean(jnp.sum(target * log_p, axis=-1))
    log_q = jax.nn.log_softmax(teacher)
    divergence = jnp.mean(jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1))
    loss = (1 - rule["share"]) * cross_entropy + rule["share"] * divergence
    return loss, (logits, seen, cross_entropy, divergence)


class Reference:
    """The training written as a loop over precisions and a loop over arrays."""

    def __init__(self, options):
        self.options = options
        self.theta, self.stats = {}, {}
        self.adam = {}  # name -> (first moment, second moment, updates)
        self.step = 0

    def gradient(self, bits, batch, teacher):
        options, names = self.options, names_of(bits, self.options)
        rule = {
            "scaled": jnp.array(options.scale_step_gradient),
            "unshared": jnp.array(options.scales == "unshared"),
            "floored": jnp.array(options.switch == "floor"),
            "smoothing": jnp.float32(options.label_smoothing),
            "share": jnp.float32(0.0 if teacher is None else options.distill_weight),
        }
        theta = {name: jnp.asarray(self.theta[key]) for name, key in names.items()}
        level = {layer: jnp.float32(b) for layer, b in bits.items()}
        given = jnp.zeros((6, 3)) if teacher is None else teacher
        gradient, (logits, seen, loss, divergence) = reference_gradient(
            theta, batch, level, rule, given
        )
        for name, key in stats_names_of(bits, options).items():
            self.stats[key] = 0.99 * self.stats[key] + 0.01 * np.asarray(seen[name])
        gradient = {key: np.asarray(gradient[name], np.float64) for name, key in names.items()}
        return gradient, logits, (float(loss), float(divergence))

    def rates(self):
        t = self.step / RUN.steps
        falling = 0.5 * (1 + np.cos(np.pi * t))
        options = self.options
        end = options.end_learning_rate
        return end + (options.learning_rate - end) * falling, options.scale_learning_rate * falling

    def scale_rate(self, gradient, base):
        _, rate = self.rates()
        largest = [
            max(abs(float(g)) for key, g in gradient.items() if "_step" in key and layer in key)
            for layer in LAYERS
        ]
        mean = np.mean([min(g, 1.0) for g in largest])
        factor = {4: 1.0, 3: 0.5, 2: 0.1}[base]
        if self.options.scale_rate == "off":
            return rate, mean
        reading = {
            "relative": rate * (1 - mean),
            "literal": rate - mean,
            "floor": max(rate - mean, 0.0),
            "constant": rate,
        }[self.options.scale_rate]
        return factor * reading, mean

    def move(self, gradient, base):
        rate, _ = self.rates()
        scale_rate, mean = self.scale_rate(gradient, base)
        for key, g in gradient.items():
            if "kernel" in key:
                g = g + self.options.weight_decay * self.theta[key]
            first, second, count = self.adam.get(key, (0.0, 0.0, 0))
            first, second, count = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2, count + 1
            self.adam[key] = first, second, count
            direction = (first / (1 - 0.9**count)) / (np.sqrt(second / (1 - 0.999**count)) + 1e-8)
            moved = self.theta[key] - (scale_rate if "_step" in key else rate) * direction
            self.theta[key] = np.asarray(moved, np.float32)
        return scale_rate, mean

    def train_step(self, variables, batch, configs):
        """Goes through {base: {layer: bits}}; returns metrics as the library names them.

        Each step starts from the library's variables: after a drift of 1e-7, a value between two
        codes may round otherwise. The state of the optimizers is the reference's own.
        """
        self.theta, self.stats = flat_of(variables, self.options.bn_banks)
        teacher, total, metrics = None, {}, {}
        for base, bits in sorted(configs.items(), reverse=True):
            gradient, logits, (loss, divergence) = self.gradient(bits, batch, teacher)
            metrics[f"loss_w{base}"] = loss
            right = np.argmax(logits, axis=-1) == np.asarray(batch["label"])
            metrics[f"accuracy_w{base}"] = np.mean(right)
            if teacher is not None:
                metrics[f"kl_w{base}"] = divergence
            if teacher is None and self.options.distill_weight:
                teacher = logits
            if self.options.update == "joint":
                total = {k: total.get(k, 0.0) + gradient.get(k, 0.0) for k in total | gradient}
                continue
            rate, mean = self.move(gradient, base)
            metrics |= {f"scale_rate_w{base}": rate, f"scale_gradient_w{base}": mean}
        if total:
            self.move(total, HIGHEST)
        self.step += 1
        return metrics


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


def check_step(found, metrics, arrays, wanted):
    """Compares arrays and metrics after a step with those of the reference."""
    found = found[0] | found[1]
    assert set(found) == set(arrays)
    for key, value in arrays.items():
        # Float32 sums in another order; Adam's division makes the most of it.
        np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-5, err_msg=key)
    assert {name: value.shape for name, value in metrics.items()} == dict.fromkeys(wanted, ())
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


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
    assert programs[0]["_move"] == 1
    assert not programs[1] and not programs[2]


def test_callers_variables_survive_and_epochs_bring_no_events(trained):
    _, method, (_, state), *_, unharmed = trained
    assert unharmed
    same, events = method.on_epoch(state, 1)
    assert same is state and events == {}
    assert state.step == 3
    assert list(method.eval_bits) == ["w4a4", "w3a3", "w2a2"]
    np.testing.assert_array_equal(method.eval_bits["w3a3"].acts, [32, 3, 3, 32])
    assert method.quantizer is double_rounding.Options.quantizer.fget(trained[0])


def test_steps_stay_positive_however_large_their_rate(variables, batch):
    options = dataclasses.replace(BASE, scale_learning_rate=5.0, scale_rate="constant")
    start = made(BASE).init(variables, batch["image"]).variables
    parts = learner.make_learner(MODEL, made(BASE).table, options, RUN, max_bits=HIGHEST)
    everywhere = jax.tree.map(lambda leaf: jnp.ones(leaf.shape[:1], bool), start.trainable)
    uphill = learner.Gradient(
        jax.tree.map(lambda leaf: jnp.ones((1, *leaf.shape)), start.trainable),
        start.batch_stats,
        everywhere._replace(
            weight_step_sizes=jnp.ones_like(start.trainable.weight_step_sizes, bool),
            act_step_sizes=jnp.ones_like(start.trainable.act_step_sizes, bool),
        ),
    )
    opt_state = parts.init_optimizer(start.trainable)
    after, *_ = parts.move(start, opt_state, uphill, jnp.int32(4), jnp.int32(0))
    for steps in (after.trainable.weight_step_sizes, after.trainable.act_step_sizes):
        assert np.all((np.asarray(steps) > 0) & (np.asarray(steps) < 1e-6))


# One update, at one precision.


@pytest.fixture(scope="module")
def two_updates(variables, batch):
    """Returns state before and after an update at 3 bits that follows one at all precisions."""
    method = made(BASE)
    table, levels = method.table, multi.levels_of(method.table)
    parts = learner.make_learner(MODEL, table, BASE, RUN, max_bits=HIGHEST)
    start = method.init(variables, batch["image"]).variables
    example = parts.prepare(batch, KEY)
    state = start, parts.init_optimizer(start.trainable)
    snapshots = []
    for configs in (levels, {3: levels[3]}):
        *state, _ = multi.sequential_updates(parts, BASE, *state, example, configs, jnp.int32(0))
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
    used = supernet.update_mask(
        method.table,
        state.variables.trainable.params,
        jax.tree.map(lambda leaf: leaf[None], bits),
        quantizer=method.quantizer,
    )
    wanted = [[place, TABLE.candidates.index(2)] for place in PLACE.values()]
    assert np.argwhere(used.weight_step_sizes).tolist() == wanted
    assert np.argwhere(used.act_step_sizes).tolist() == wanted


# What a user sees.


def test_digits_are_learned_at_every_precision():
    data = sklearn.datasets.load_digits()
    images = jnp.asarray(data.images[:128, ..., None] / 8 - 1, jnp.float32)
    batch = {"image": images, "label": jnp.asarray(data.target[:128] % 3, jnp.int32)}
    run = Run(epochs=1, steps_per_epoch=25, prepare=lambda batch, key: batch["image"])
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
    with pytest.raises(ValueError, match="needs to be told its bits"):
        method.predict(variables, None, batch["image"])
    floats = [Rule(weights=32, acts=32, float_weights=True, float_acts=True)]
    table = trace_layers(MODEL, SHAPE, rules=floats)
    with pytest.raises(ValueError, match="no layer of the table has quantized weights"):
        double_rounding.FAMILY.make(MODEL, table, BASE, RUN)


# The mixed-precision supernet: how it draws.


class Deep(nn.Module):
    """Many layers of two kinds, for what needs a table only."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        for index in range(4):
            x = nn.Conv(4, (1, 1), name=f"conv{index}")(x)
            x = nn.Conv(4, (3, 3), feature_group_count=4, name=f"depthwise{index}")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


DEEP_RULES = bit_rules((8, 6, 4, 2), depthwise_min_bits=4, first_last=FIRST_LAST_FLOAT)
DEEP = trace_layers(Deep(), SHAPE, rules=DEEP_RULES)
TRACES = np.array([99.0, 1.0, 5.0, 2.0, 8.0, 1.0, 6.0, 0.5, 4.5, -50.0], np.float32)


def roulette_by_hand(table, traces):
    """Section 5: uniform below the mean trace of the layers that choose, else by the bits."""
    threshold = np.mean(
        [t for layer, t in zip(table.layers, traces, strict=True) if layer.searchable]
    )
    rows = []
    for layer, trace in zip(table.layers, traces, strict=True):
        total, count = sum(layer.weight_candidates), len(layer.weight_candidates)
        share = {b: 1 / count if trace < threshold else b / total for b in layer.weight_candidates}
        rows.append([share.get(b, 0.0) for b in table.candidates])
    return np.array(rows)


PROBABILITIES = roulette_by_hand(DEEP, TRACES)


def test_common_choices():
    found = mixed.common_choices(DEEP)
    np.testing.assert_array_equal(found, PROBABILITIES > 0)
    rules = [
        Rule("conv0", weights=(8, 4, 2), acts=(8, 6, 2)),
        Rule("conv1", weights=(8, 4), acts=(6, 2)),
        Rule("conv2", weights=(8, 4), acts=6),
        *DEEP_RULES,
    ]
    with pytest.raises(ValueError, match="weights and input of conv1 have no bits in common"):
        mixed.common_choices(trace_layers(Deep(), SHAPE, rules=rules))
    table = trace_layers(Deep(), SHAPE, rules=[rules[0], *DEEP_RULES])
    bits = np.array(table.candidates)
    assert bits[mixed.common_choices(table)[1]].tolist() == [8, 2]
    table = trace_layers(Deep(), SHAPE, rules=[rules[2], *DEEP_RULES])  # its weights alone choose
    bits = np.array(table.candidates)
    assert bits[mixed.common_choices(table)[table.names.index("conv2")]].tolist() == [8, 4]


DRAWS = 4000


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None, None))
def left_base(key, base, sigma):
    probabilities = jnp.asarray(PROBABILITIES, jnp.float32)
    return mixed.leave_base(key, DEEP, base, probabilities, sigma)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("base", [8, 2])
def test_share_of_layers_that_leave_the_base(base, sigma):
    keys = jax.random.split(jax.random.key(base), DRAWS)
    drawn = snapshot(left_base(keys, DEEP.uniform(base, base), jnp.float32(sigma)))
    np.testing.assert_array_equal(drawn.weights, drawn.acts)
    at_base = np.asarray(DEEP.uniform(base, base).weights)
    for place, layer in enumerate(DEEP.layers):
        for choice, bits in enumerate(DEEP.candidates):
            wanted = (1 - sigma * layer.searchable) * (bits == at_base[place])
            wanted += sigma * layer.searchable * PROBABILITIES[place, choice]
            found = np.mean(drawn.weights[:, place] == bits)
            spread = np.sqrt(wanted * (1 - wanted) / DRAWS)
            assert abs(found - wanted) <= 4.5 * spread + 1e-6
    for place, layer in enumerate(DEEP.layers):  # and none that its rules forbid
        assert set(drawn.weights[:, place]) <= set(layer.weight_candidates)


def test_layers_leave_independently():
    base = DEEP.uniform(2, 2)
    drawn = snapshot(left_base(jax.random.split(KEY, DRAWS), base, jnp.float32(0.5)))
    left = drawn.weights != np.asarray(base.weights)
    correlation = np.corrcoef(left[:, 1:-1].T)
    assert np.abs(correlation - np.eye(8)).max() < 4.5 / np.sqrt(DRAWS)


def draws_of(options, run, steps, monkeypatch):
    """Returns what the training draws at some steps, without training: {step: [configs]}."""
    recorded = []

    def record(parts, options, variables, opt_state, example, configs, step):
        recorded.append((int(step), {base: snapshot(bits) for base, bits in configs.items()}))
        return variables, opt_state, {}

    monkeypatch.setattr(multi, "sequential_updates", record)
    method = double_rounding.MIXED_FAMILY.make(Deep(), DEEP, options, run)
    batch = {"image": jnp.zeros((1, *SHAPE)), "label": jnp.zeros(1, jnp.int32)}
    probabilities = jnp.asarray(PROBABILITIES, jnp.float32)
    for step in steps:
        for seed in range(40):
            traces = jnp.asarray(TRACES, jnp.float32)
            state = mixed.TrainState(
                jnp.int32(step), {}, {}, probabilities, traces, jnp.zeros_like(traces)
            )
            state, _ = method.train_step(state, batch, jax.random.key(seed))
            assert state.step == step + 1
    return recorded


def test_sigma_grows_linearly_from_epoch_to_epoch(monkeypatch):
    run = Run(epochs=4, steps_per_epoch=3, prepare=lambda batch, key: batch["image"])
    options = MixedOptions(switch_probability=0.8)
    steps = (0, 2, 3, 11)
    recorded = draws_of(options, run, steps, monkeypatch)
    assert all(list(configs) == [8, 6, 4, 2] for _, configs in recorded)
    for step in steps:
        sigma = 0.8 * (step // 3 + 1) / 4
        left, wanted, variance = 0, 0.0, 0.0
        for at, configs in recorded:
            if at != step:
                continue
            for base, bits in configs.items():
                at_base = np.asarray(DEEP.uniform(base, base).weights)
                np.testing.assert_array_equal(bits.weights, bits.acts)
                np.testing.assert_array_equal(bits.weights[[0, -1]], [32, 32])
                left += np.sum(bits.weights != at_base)
                for place in range(1, len(DEEP) - 1):
                    stays = PROBABILITIES[place, DEEP.candidates.index(at_base[place])]
                    leaves = sigma * (1 - stays)
                    wanted, variance = wanted + leaves, variance + leaves * (1 - leaves)
        assert abs(left - wanted) < 4.5 * np.sqrt(variance)
    drawn = {bits.weights.tobytes() for _, configs in recorded for bits in configs.values()}
    assert len(drawn) > 200  # steps and bases have draws of their own


def test_without_switching_every_layer_stays_at_its_base(monkeypatch):
    run = Run(epochs=1, steps_per_epoch=1, prepare=lambda batch, key: batch["image"])
    for _, configs in draws_of(MixedOptions(switch_probability=0.0), run, [0], monkeypatch):
        for base, bits in configs.items():
            np.testing.assert_array_equal(bits.weights, DEEP.uniform(base, base).weights)


# The mixed-precision supernet: where it starts, and how it learns.

MIXED = MixedOptions(
    **{f.name: getattr(BASE, f.name) for f in dataclasses.fields(Options) if f.name != "bn_banks"},
    switch_probability=1.0,
    trace_probes=4,
    trace_batch=3,
)


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
            MODEL, made(MIXED).table, MIXED, float_model(row), batch["image"], batch["label"]
        )

    np.testing.assert_array_equal(state.traces, traces(0).mean)
    np.testing.assert_array_equal(state.trace_errors, traces(0).standard_error)
    assert np.all(state.traces != traces(2).mean)


def test_probabilities_follow_from_the_traces_as_published(mixed_start):
    _, state, _ = mixed_start
    wanted = roulette_by_hand(TABLE, np.asarray(state.traces))
    np.testing.assert_allclose(state.probabilities, wanted, rtol=1e-6)


def test_mixed_training_is_the_loop_written_by_hand(mixed_start, several, batch, monkeypatch):
    method, state, given = mixed_start
    state = jax.tree.map(jnp.array, state)  # the fixture's is not to be consumed
    reference = Reference(MIXED)
    drawn, update = [], multi.sequential_updates

    def record(parts, options, variables, opt_state, example, configs, step):
        drawn.append({base: snapshot(bits) for base, bits in configs.items()})
        return update(parts, options, variables, opt_state, example, configs, step)

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
    assert programs[0]["_gradient"] == programs[0]["_move"] == 1
    assert not any(programs[1:])
    assert jax.tree.all(jax.tree.map(np.array_equal, snapshot(several[1]), given))
    before, after = mixed_start[1], state
    np.testing.assert_array_equal(after.probabilities, before.probabilities)
    np.testing.assert_array_equal(after.traces, before.traces)


def test_start_from_a_float_model(variables, batch):
    method = made(MIXED)
    given = snapshot(variables)
    state = method.init(variables, batch["image"], batch["label"])
    traces = mixed.hessian_traces(
        MODEL, made(MIXED).table, MIXED, variables, batch["image"], batch["label"]
    )
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


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_layers_leave_the_base_together_where_they_are_tied(sigma):
    entry = {name: 2 * index for index, name in enumerate(DEEP.names)}
    ties = (
        (entry["conv0"], entry["conv0"] + 1, entry["depthwise1"] + 1),
        (entry["conv1"], entry["conv3"]),
    )
    table = dataclasses.replace(DEEP, tied_groups=ties)
    probabilities = mixed.common_choices(table) / mixed.common_choices(table).sum(1, keepdims=True)

    def draw(key):
        base = table.uniform(8, 8)
        shares = jnp.asarray(probabilities, jnp.float32)
        return mixed.leave_base(key, table, base, shares, jnp.float32(sigma))

    drawn = np.stack(jax.vmap(draw)(jax.random.split(KEY, 500)), axis=-1)
    place = (drawn[..., None] == np.array(table.candidates)).argmax(-1)
    assert table.mask[np.arange(len(table))[:, None], np.arange(2), place].all()
    for group in ties:
        flat = drawn.reshape(500, -1)[:, list(group)]
        assert (flat == flat[:, :1]).all()
        share = np.mean(flat[:, 0] != 8)
        allowed = table.mask.reshape(-1, len(table.candidates))[group[0]].sum()
        wanted = sigma * (1 - 1 / allowed)
        assert abs(share - wanted) < 4.5 * np.sqrt(wanted * (1 - wanted) / 500)

"""A tiny network, and training with Double Rounding written anew in plain jax.numpy."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from helpers.random_variables import drawn_variables

from mpq_jax.methods import double_rounding
from mpq_jax.methods.base import TrainingInfo
from mpq_jax.methods.double_rounding import MixedOptions, Options
from mpq_jax.program import paths
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import FIRST_LAST_FLOAT, bit_rules

CHOICES = (4, 3, 2)  # with factors 1, 0.5 and 0.1
HIGHEST = 4
KEY = jax.random.key(0)
SHAPE = (4, 4, 2)
LAYERS = ("conv1", "conv2")
RUN = TrainingInfo(epochs=4, steps_per_epoch=2, prepare=lambda batch, key: batch["image"])


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


def make_variables():
    return drawn_variables(MODEL, SHAPE, 0)


def make_batch():
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
        by_variant = {
            "relative": rate * (1 - mean),
            "literal": rate - mean,
            "floor": max(rate - mean, 0.0),
            "constant": rate,
        }[self.options.scale_rate]
        return factor * by_variant, mean

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


MIXED = MixedOptions(
    **{f.name: getattr(BASE, f.name) for f in dataclasses.fields(Options) if f.name != "bn_banks"},
    switch_probability=1.0,
    trace_probes=4,
    trace_batch=3,
)

"""Tiny networks, options and training runs for the tests of CSQ."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from helpers.random_variables import drawn_variables

from mpq_jax.methods import csq
from mpq_jax.methods.base import Method, TrainingInfo
from mpq_jax.methods.csq import Options, UniformOptions
from mpq_jax.parallel import mesh as sharding
from mpq_jax.program import paths
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import Rule, bit_rules
from mpq_jax.training import metrics as recording

SHAPE, PLANES = (4, 4, 2), 4
GROWN = ("grown1", "grown2")
IMAGES, BATCH = 48, 8
STEPS_PER_EPOCH = IMAGES // BATCH


class Net(nn.Module):
    """Layers of every sort: see `RULES`."""

    @nn.compact
    def __call__(self, x, *, train):
        def layer(x, name):
            x = nn.Conv(4, (3, 3), use_bias=False, name=name)(x)
            norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"{name}_norm")
            return nn.relu(norm(x))

        x = layer(x, "stem")
        for name in GROWN:
            x = x + layer(x, name)
        x = nn.relu(nn.Dense(8, name="wide")(x.reshape(len(x), -1)))
        return nn.Dense(3, name="head")(x)


MODEL: Any = Net()
# Stem and head have 8 bits, and the stem a float input; of "wide" only the input has a choice.
RULES = [Rule("wide", weights=32, float_weights=True), *bit_rules((PLANES, 2))]


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(5, use_bias=False, name="dense")(x))  # of 8 inputs


class Mlp(nn.Module):
    """No norm; a nested layer without bias, and one that is called twice."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, name="entry")(x.reshape(len(x), -1)))
        x = Inner(name="inner")(x)
        twice = nn.Dense(5, use_bias=False, name="twice")
        x = nn.relu(twice(nn.relu(twice(x))))
        return nn.Dense(3, name="head")(x)


MLP: Any = Mlp()
MLP_RULES = [
    Rule("entry", weights=8, acts=8, float_acts=True),
    Rule("head", weights=32, acts=32, float_weights=True, float_acts=True),
    Rule(weights=(3, 2), acts=(3, 2)),
]

# Everything on which a test depends, whatever the defaults become.
SHARED: dict[str, Any] = dict(
    binarize=0.8,
    temperature=200.0,
    contiguous=False,
    start="preserving",
    clip_rms=0.0,
    acts="lsq",
    act_bits=4,
    learning_rate=0.05,
    plane_learning_rate=30.0,  # so that bits flip within 60 steps
    scale_learning_rate=0.01,
    step_learning_rate=1e-3,
    plane_optimizer="sgd",
    tuning_rate=0.2,
    momentum=0.9,
    warmup=0.0,
    weight_decay=5e-4,
    label_smoothing=0.0,
)
OWN: dict[str, Any] = dict(
    target=2.0,
    average="layer",
    least_planes=1,
    budget_weight=0.1,
    budget_anneal=0.0,
    mask_learning_rate=1.0,
    mask_start=0.5,
    freeze_scheme=0.4,
    rewind=True,
    rewind_bits=False,
)
BASE = SHARED | OWN


def a_run(epochs=10, steps_per_epoch=STEPS_PER_EPOCH, images=None):
    return TrainingInfo(
        epochs, steps_per_epoch, prepare=lambda batch, key: batch["image"], images=images
    )


RUN = a_run()


@functools.cache
def made(family, options, run=RUN, model=MODEL, rules=tuple(RULES)):
    """The method by all that it is made of: they are hashable, and compiling takes seconds."""
    return family.make(model, trace_layers(model, SHAPE, rules=rules), options, run)


def make(run=RUN, model: Any = MODEL, rules=RULES, **changes: Any):
    return made(csq.FAMILY, Options(**BASE | changes), run, model, tuple(rules))


def make_uniform(run=RUN, rules=RULES, **changes: Any):
    chosen: dict[str, Any] = SHARED | {"planes": PLANES} | changes
    return made(csq.UNIFORM_FAMILY, UniformOptions(**chosen), run, MODEL, tuple(rules))


def drawn_data():
    """Three classes, told apart by a pattern under noise."""
    generator = np.random.default_rng(0)
    labels = np.arange(IMAGES, dtype=np.int32) % 3
    patterns = generator.normal(size=(3, *SHAPE))
    images = patterns[labels] + 0.7 * generator.normal(size=(IMAGES, *SHAPE))
    order = generator.permutation(IMAGES)
    return images[order].astype(np.float32), labels[order]


DATA = drawn_data()


def batch_of(step):
    place = step % STEPS_PER_EPOCH * BATCH
    return {
        name: jnp.asarray(array[place : place + BATCH])
        for name, array in zip(("image", "label"), DATA, strict=True)
    }


@functools.cache
def variables_of(model):
    return drawn_variables(model, SHAPE, 0)


def start_of(made_method, model: Any = MODEL):
    """The first state; not to be trained as it is, since training consumes it."""
    return _start(made_method.init, model)


@functools.cache
def _start(init, model):
    return init(variables_of(model), batch_of(0)["image"])


def copied(tree):
    """A copy that training may consume."""
    return jax.tree.map(jnp.array, tree)


def snapshot(tree):
    return jax.tree.map(np.array, tree)


def train(made_method, state, first=0, run=RUN):
    """Trains from a step to the end; yields (state on the host, metrics, events) of every step."""
    for step in range(first, run.steps):
        epoch, place = divmod(step, run.steps_per_epoch)
        state, events = made_method.on_epoch(state, epoch) if place == 0 else (state, {})
        state, metrics = made_method.train_step(state, batch_of(step), jax.random.key(step))
        yield snapshot(state), {name: float(x) for name, x in metrics.items()}, events


def sigmoid(x):
    return 0.5 * (1 + np.tanh(np.asarray(x, np.float64) / 2))


def with_planes_of(state, change):
    """Returns the state or variables with changed bit planes: change(path, planes)."""
    planes = {name: change(name, one) for name, one in state.trainable.by_layer.items()}
    return state._replace(trainable=state.trainable._replace(planes=paths.unflatten(planes)))


def with_masks(state, masks):
    return with_planes_of(
        state, lambda name, one: one._replace(mask=jnp.asarray(masks[name], jnp.float32))
    )


def flatten(tree):
    return paths.flatten(tree)


def layers_of(table):
    return {layer.name: layer for layer in table.layers}


def hard_kernels(state, names=GROWN, contiguous=False):
    """Returns integers and the width of one, of every layer with planes."""
    found = {}
    for name in names:
        planes = state.trainable.by_layer[name]
        mask = np.asarray(planes.mask)
        on = mask >= 0
        if contiguous:
            on = np.cumprod(on[::-1])[::-1].astype(bool)
        digits = (np.asarray(planes.positive) > 0).astype(int) - (np.asarray(planes.negative) > 0)
        lowest = int(np.argmax(on))
        places = np.where(on, 2 ** np.maximum(np.arange(len(mask)) - lowest, 0), 0)
        codes = np.einsum("b,b...->...", places, digits)
        found[name] = codes, float(planes.scale) * 2**lowest / (2 ** len(mask) - 1)
    return found


def shaken(state, seed=0):
    """Returns the state with drawn bits, all of them decided."""
    generator = np.random.default_rng(seed)

    def draw(x):
        return jnp.asarray(generator.choice([-1, 1], x.shape) * generator.uniform(0.2, 1, x.shape))

    def change(name, one):
        return one._replace(
            positive=draw(one.positive).astype(jnp.float32),
            negative=draw(one.negative).astype(jnp.float32),
        )

    return with_planes_of(state, change)


MASKS = {"grown1": [0.3, -0.4, 0.5, 0.6], "grown2": [-0.1, 0.2, -0.3, 0.4]}


def logits_of_found(found, images, model=MODEL):
    assert found.net.model == model
    return np.asarray(found.net.predict(found.state, found.net.table.max_config, images))


class Trained(NamedTuple):
    """A whole run: its method, the state before it, what every step returned, and compilations."""

    method: Method
    first: Any
    steps: list[tuple[Any, dict[str, float], dict[str, float]]]
    compiled: int

    @property
    def last(self):
        return self.steps[-1][0]

    @property
    def losses(self):
        """Means of the epochs."""
        every = [metrics["loss"] for _, metrics, _ in self.steps]
        return np.mean(np.reshape(every, (RUN.epochs, STEPS_PER_EPOCH)), axis=1)


@functools.cache
def trained(build=make):
    made_method = build()
    first = snapshot(start_of(made_method))
    with recording.CompileCounter() as counter:
        steps = list(train(made_method, copied(start_of(made_method))))
    return Trained(made_method, first, steps, counter.counts["_train_step"])


FREEZE, BINARIZE = 4 * STEPS_PER_EPOCH, 8 * STEPS_PER_EPOCH


def moved(before, after):
    """Returns which leaves differ, by path."""
    pairs = zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return {
        jax.tree_util.keystr(path): not np.array_equal(one, other) for (path, one), other in pairs
    }


def run_on(mesh, rows):
    """Trains on a mesh, of which this process reads some rows of every batch.

    Returns the losses, and all arrays of the last state, its summary and the found network.
    """
    made_method = make(rewind_bits=True)
    state, losses = sharding.replicate(start_of(made_method), mesh), []
    for step in range(RUN.steps):
        epoch, place = divmod(step, STEPS_PER_EPOCH)
        if place == 0:
            state, _ = made_method.on_epoch(state, epoch)
        own = {name: np.asarray(array)[rows] for name, array in batch_of(step).items()}
        batch = sharding.global_batch(own, mesh)
        state, metrics = made_method.train_step(state, batch, jax.random.key(step))
        losses.append(float(metrics["loss"]))
    found = made_method.scheme(made_method.variables(state))
    handed_over = state, made_method.summary(state), found.state, found.bits
    return losses, jax.tree.leaves(snapshot(handed_over))


MLP_RUN = a_run(epochs=4, steps_per_epoch=5)
RATES = {"params": 0.1, "positive": 1.0, "negative": 1.0, "mask": 1.0, "scale": 0.05}
MLP_BASE: dict[str, Any] = dict(
    act_bits=32,
    learning_rate=RATES["params"],
    plane_learning_rate=RATES["positive"],
    mask_learning_rate=RATES["mask"],
    scale_learning_rate=RATES["scale"],
    label_smoothing=0.1,
    target=1.5,
    freeze_scheme=0.5,
    binarize=0.75,
    rewind=False,
)

"""One training step of a method on a network with products of activations."""

import jax
import numpy as np
from helpers.attention import IMAGES, LABELS, PRODUCTS, SHAPE, TinyVit

from mpq_jax.methods.base import TrainingInfo
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import Rule, bit_rules

MODEL = TinyVit()
RUN = TrainingInfo(epochs=2, steps_per_epoch=1, prepare=lambda batch, key: batch["image"])
CHOICE = Rule(kind="product", weights=(8, 4, 2), acts=(8, 4, 2))
FIXED = Rule(kind="product", weights=8, acts=4)


def table_of(product, *, candidates=(8, 4, 2)):
    return trace_layers(MODEL, SHAPE, rules=[product, *bit_rules(candidates)])


def one_step(method, variables):
    """Step sizes before and after a step, of first and second operands; and the last state."""
    state = method.init(variables, IMAGES, LABELS)

    def steps_of(state):
        held = method.variables(state).trainable
        held = getattr(held, "around", held)
        return [np.array(x) for x in (held.act_step_sizes, held.weight_step_sizes)]

    before = steps_of(state)
    state, metrics = method.train_step(state, {"image": IMAGES, "label": LABELS}, jax.random.key(0))
    assert all(np.isfinite(value) for value in metrics.values())
    return before, steps_of(state), state


def places_of(table):
    return [table.names.index(name) for name in PRODUCTS]

"""Networks of drawn weights and one configuration, for tests of exports; made without compiling."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from helpers.random_variables import drawn_variables

from mpq_jax.export import signature
from mpq_jax.export.exported_model import ExportedModel
from mpq_jax.program import paths
from mpq_jax.program.network import example_batch
from mpq_jax.quantizers import lsq
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import bit_rules
from mpq_jax.supernet.state import SupernetState, TrainableParams
from mpq_jax.supernet.supernet import Supernet

BITS = (8, 7, 6, 5, 4, 3, 2)
REACH = 2.0  # largest value of a layer's input that is not clipped


def make_exported(model, shape, *, seed=0, turned=0.0, rules=None, quantizer=lsq.QUANTIZER):
    """A network whose layers take turns at `BITS` and at signed and unsigned inputs.

    `shape` is that of an image, or describes a batch.

    `turned` is the fraction of the norms' factors that are negative.
    """
    generator = np.random.default_rng(seed)

    def leaf(name, values):
        kind = name.rpartition("/")[2]
        if kind == "scale" and turned:
            values = np.asarray(values) * generator.choice(
                [-1, 1], values.shape, p=[turned, 1 - turned]
            )
        if kind == "mean":
            values = 0.3 * generator.normal(size=values.shape)
        return jnp.asarray(values, jnp.float32)

    variables = paths.map_leaves(drawn_variables(model, shape, seed), leaf)
    traced = trace_layers(model, shape, rules=rules or bit_rules(BITS))
    layers, signed = [], []
    for index, layer in enumerate(traced.layers):
        weights, acts = layer.weight_candidates, layer.act_candidates
        layers.append(
            layer._replace(
                weight_candidates=(weights[index % len(weights)],),
                act_candidates=(acts[(3 * index + 1) % len(acts)],),
            )
        )
        signed.append(index % 2 == 0)
    table = dataclasses.replace(traced, layers=tuple(layers), bn_banks="shared")
    net = Supernet(model, table, quantizer=quantizer)
    kernels = net.kernels(variables["params"])
    steps = np.zeros((2, len(table), len(table.candidates)), np.float32)
    for place, bits in enumerate(table.candidates):
        max_bits = 2.0 ** (bits - 1)
        steps[0, :, place] = [3 * float(jnp.std(w)) / max_bits for w in kernels]
        steps[1, :, place] = REACH / max_bits / np.where(signed, 1, 2)
    trainable = TrainableParams(variables["params"], jnp.array(steps[0]), jnp.array(steps[1]))
    state = SupernetState(trainable, variables.get("batch_stats", {}), jnp.array(signed))
    bits = BitConfig(*(jnp.array(column, jnp.int32) for column in _first_candidates(table)))
    return ExportedModel(
        net=net,
        state=state,
        bits=bits,
        inputs=signature.one_example(example_batch(shape)),
        num_classes=10,
        mean=(0.5,),
        std=(0.25,),
        provenance={"class": type(model).__name__},
    )


def _first_candidates(table):
    weights = [layer.weight_candidates[0] for layer in table.layers]
    return weights, [layer.act_candidates[0] for layer in table.layers]


def some_images(exported, count=8, seed=1):
    """Drawn images, or other inputs as the model takes them; integers are 0 to 9."""
    generator = np.random.default_rng(seed)

    def draw(leaf):
        x = generator.normal(size=(count, *leaf.shape[1:]))
        if leaf.dtype == "bool":
            return x > 0
        return np.abs(3 * x).astype("int32") % 10 if leaf.dtype == "int32" else np.float32(x)

    return jax.tree.map(draw, exported.inputs)

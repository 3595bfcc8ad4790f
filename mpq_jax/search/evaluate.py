"""Scores many bit configurations in one compiled call."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mpq_jax import supernet
from mpq_jax.bits import BitConfig
from mpq_jax.layer_table import LayerTable
from mpq_jax.quantizers import lsq
from mpq_jax.quantizers.record import Quantizer

Score = Callable[[BitConfig, Array, Array], Float[Array, " configs"]]
METRICS = ("error", "loss")


def make_score(
    model: nn.Module,
    table: LayerTable,
    variables: supernet.Variables,
    *,
    metric: str = "error",
    quantizer: Quantizer = lsq.QUANTIZER,
) -> Score:
    """Returns `score(configs, images, labels)`: one number per configuration, smaller is better.

    The norms use the statistics of the batch, as published, and nothing is written back: scoring
    has no side effects. The number of configurations and of images fixes the program; their
    values never recompile it. With the images sharded over devices, so is the work.

    Args:
        model: the Linen model.
        table: its layers.
        variables: the supernet.
        metric: "error" (top-1, 0 to 1, as published) or "loss" (cross-entropy, less noisy on
            few images).
        quantizer: of kernels and inputs.
    """
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; known metrics are {METRICS}")

    def measure(logits: Array, labels: Int[Array, " batch"]) -> Float[Array, ""]:
        if metric == "error":
            return jnp.mean((jnp.argmax(logits, axis=-1) != labels).astype(jnp.float32))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    @jax.jit
    def score_configs(variables, configs, images, labels):
        def score_one(bits):
            selected = supernet.select(table, variables, bits, quantizer=quantizer)
            out = supernet.apply(model, table, selected, images, train=True, quantizer=quantizer)
            return measure(out.logits, labels)

        # lax.map, not vmap: a batch of kernels would turn every convolution into a grouped one.
        return jax.lax.map(score_one, configs)

    return lambda configs, images, labels: score_configs(variables, configs, images, labels)

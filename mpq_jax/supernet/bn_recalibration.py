"""Re-estimates BatchNorm statistics for one bit configuration from training images."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mpq_jax.program import linen
from mpq_jax.quantizers import lsq
from mpq_jax.quantizers.base import Quantizer
from mpq_jax.supernet import supernet
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable

PyTree = Any
MOMENTS = "moments"  # name under which they are recorded during a call


@functools.partial(jax.jit, static_argnames=("model", "table", "quantizer"))
def recalibrate(
    model: nn.Module,
    table: LayerTable,
    variables: supernet.SupernetState,
    bits: BitConfig,
    images: Float[Array, "batches batch ..."],
    *,
    quantizer: Quantizer = lsq.QUANTIZER,
) -> supernet.SupernetState:
    """Returns the supernet with the norm statistics of one configuration estimated anew.

    Every batch is normalized by its own statistics, as in training. Means and variances are
    merged exactly over the batches (law of total variance), so one large batch's moments are
    those of all images, however they are spread over devices. Rows of other bits stay as they
    are, and nothing of the old statistics enters the new ones.

    Args:
        model: the Linen model.
        table: its layers.
        variables: the supernet.
        bits: the configuration.
        images: normalized training images (RFQuant takes about 7,000).
        quantizer: of kernels and inputs.
    """
    selected = supernet.select(table, variables, bits, quantizer=quantizer)
    plain = norm_statistics(model, table, selected, images, quantizer=quantizer)
    stats = supernet.scatter_batch_stats(table, variables.batch_stats, bits, plain)
    return variables._replace(batch_stats=stats)


def norm_statistics(
    model: nn.Module,
    table: LayerTable,
    selected: supernet.Subnet,
    images: Float[Array, "batches batch ..."],
    *,
    quantizer: Quantizer,
) -> PyTree:
    """Returns the statistics of all norms of one subnet on some images; see `recalibrate`."""

    def moments(batch) -> dict[str, Array]:
        return _norm_moments(model, table, selected, batch, quantizer=quantizer)

    found = jax.lax.map(moments, images)
    merged = linen.flatten(selected.batch_stats)
    for name, norm_moments in found.items():
        means, variances = norm_moments[:, 0], norm_moments[:, 1]
        merged[f"{name}/mean"] = jnp.mean(means, axis=0)
        merged[f"{name}/var"] = jnp.mean(variances, axis=0) + jnp.var(means, axis=0)
    return linen.unflatten(merged)


def _norm_moments(model, table, selected, images, *, quantizer) -> dict[str, Array]:
    """Returns mean and variance of every norm's input on one batch, [2, channels], by path."""

    def intercept(next_call, args, kwargs, context):
        if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__":
            x = linen.input_of(args, kwargs).astype(jnp.float32)
            feature_axis = context.module.axis % x.ndim
            axes = tuple(axis for axis in range(x.ndim) if axis != feature_axis)
            linen.record(context.module, MOMENTS, jnp.stack([jnp.mean(x, axes), jnp.var(x, axes)]))
        return next_call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        out = supernet.apply(model, table, selected, images, train=True, quantizer=quantizer)
    return linen.named(out.records, MOMENTS)

"""Re-estimation of BatchNorm statistics: recorded moments of each batch, merged exactly."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from mpq_jax.program import linen, paths

PyTree = Any
MOMENTS = "moments"  # name under which moments are recorded during a call


def record_moments(call: linen.ModuleCall) -> Any:
    """Records mean and variance of a norm's input on one batch, [2, channels]."""
    if linen.is_batch_norm(call.module):
        x = call.x.astype(jnp.float32)
        feature_axis = call.module.axis % x.ndim
        axes = tuple(axis for axis in range(x.ndim) if axis != feature_axis)
        call.record(MOMENTS, jnp.stack([jnp.mean(x, axes), jnp.var(x, axes)]))
    return call.run()


def merge(batch_stats: PyTree, moments: dict[str, Array]) -> PyTree:
    """Replaces statistics by those of all batches together (law of total variance).

    Args:
        batch_stats: statistics of the model; those of norms without moments stay.
        moments: [batches, 2, channels] of each norm, by path.
    """
    merged = paths.flatten(batch_stats)
    for name, of_batches in moments.items():
        means, variances = of_batches[:, 0], of_batches[:, 1]
        merged[f"{name}/mean"] = jnp.mean(means, axis=0)
        merged[f"{name}/var"] = jnp.mean(variances, axis=0) + jnp.var(means, axis=0)
    return paths.unflatten(merged)

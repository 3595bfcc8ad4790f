"""Re-estimation of norm statistics: those of each batch, merged exactly."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mpq_jax.program import paths
from mpq_jax.program.trace import Program
from mpq_jax.supernet.placement import Edit

PyTree = Any


def estimate(call: Callable[[Any, Any], Any], batch_stats: PyTree, batches: PyTree) -> PyTree:
    """Estimates the statistics of all norms on some batches.

    Every norm computes its batch statistics itself, in training mode. They are found in the
    program, where they update the running ones; so masks, axes and several calls are respected, and
    statistics that training does not update stay as they are.

    Args:
        call: `(batch, edit) -> Output` of the network in training mode.
        batch_stats: the running statistics.
        batches: inputs, [batches, batch, ...].
    """

    def moments(batch: Any) -> dict[str, Array]:
        counts: dict[str, int] = {}

        def edit(program: Program) -> Edit:
            found = program.sites.moments
            counts.update({path: len(places) for path, places in found.items()})
            return Edit(
                {},
                {},
                {
                    f"{path}#{call}": place
                    for path, places in found.items()
                    for call, place in enumerate(places)
                },
            )

        records = call(batch, edit).records
        return {
            path.removeprefix("batch_stats/"): jnp.stack(
                [records[f"{path}#{call}"] for call in range(count)]
            )
            for path, count in counts.items()
        }

    return merge(batch_stats, jax.lax.map(moments, batches))


def merge(batch_stats: PyTree, moments: dict[str, Array]) -> PyTree:
    """Replaces statistics by those of all batches together (law of total variance).

    Args:
        batch_stats: statistics of the model; those without moments stay.
        moments: batch statistics [batches, calls, ...], by the path of the running one.
    """
    merged = paths.flatten(batch_stats)
    for path, of_calls in moments.items():
        values = of_calls.reshape(-1, *of_calls.shape[2:])
        merged[path] = jnp.mean(values, axis=0)
        means = moments.get(f"{paths.parent(path)}/mean")
        if path.endswith("/var") and means is not None:
            merged[path] += jnp.var(means.reshape(values.shape), axis=0)
    return paths.unflatten(merged)

"""Running variances of norms as PyTorch keeps them: those of the batch by n - 1 instead of n."""

import math
from typing import Any

from jaxtyping import Array

from mpq_jax.program.equations import array
from mpq_jax.program.evaluate import Change, Place, equation_at
from mpq_jax.program.trace import Program
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.placement import placed_sites


def changes(table: LayerTable, program: Program, *, shares: int) -> dict[Place, Change]:
    """Returns the changes that correct what running variances are updated with.

    The batch is still normalized by its own variance, as in PyTorch too.

    Args:
        table: the layers; only norms behind one of them are corrected.
        program: a call in training mode.
        shares: number of equal parts of the batch, of which the program sees one.
    """
    counts: dict[str, int] = {}
    for placed in placed_sites(table, program):
        norm = table.layers[placed.first].norm
        if norm is not None:
            output = program.sites.outputs[placed.number]
            shape = array(
                equation_at(program.jaxpr.jaxpr, output.equation).outvars[output.position]
            ).shape
            counts[f"batch_stats/{norm}/var"] = shares * math.prod(shape[:-1])
    return {
        place: Change("", _times(counts[path] / (counts[path] - 1)))
        for path, places in program.sites.moments.items()
        if counts.get(path, 0) > 1
        for place in places
    }


def _times(factor: float):
    def scale(variance: Array, _: Any) -> Array:
        return variance * factor

    return scale

"""What the layers of a float model read, from which first step sizes and signs are taken."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mpq_jax.program.evaluate import evaluate
from mpq_jax.program.trace import Program
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.placement import placed_products, placed_sites


def read_inputs(
    table: LayerTable, program: Program, arguments: Sequence[Any]
) -> tuple[list[Array], dict[int, Array]]:
    """Records what every layer reads in a call of the float model.

    What several calls of a layer read is joined; a layer that reads nothing has no input.

    Args:
        table: the layers.
        program: the call.
        arguments: its arguments.

    Returns:
        What each layer reads, float32, and the second operands of products by layer.
    """
    sites, products = placed_sites(table, program), placed_products(table, program)
    records = {
        str(placed.number): placed.site.data for placed in sites if placed.site.data is not None
    }
    for placed in products:
        for number, place in enumerate(placed.product.operands):
            records[_operand(placed.layer, number)] = place
    _, recorded = evaluate(program.jaxpr, arguments, {}, {}, records)
    read: list[list[Array]] = [[] for _ in table.layers]
    for placed in sites:
        if placed.site.data is None:
            continue  # it looks rows up
        x = recorded[str(placed.number)].astype(jnp.float32)
        x = jnp.moveaxis(x, placed.site.stacked, range(len(placed.site.stacked)))
        for position in np.ndindex(placed.layers.shape):
            read[placed.layers[position]].append(x[position] if position else x)
    second = {}
    for placed in products:
        first, second[placed.layer] = (
            recorded[_operand(placed.layer, number)].astype(jnp.float32) for number in range(2)
        )
        read[placed.layer].append(first)
    return [_joined(calls) for calls in read], second


def _operand(layer: int, number: int) -> str:
    return f"operand {number} of {layer}"


def _joined(calls: list[Array]) -> Array:
    if not calls:
        return jnp.zeros((1,), jnp.float32)
    return calls[0] if len(calls) == 1 else jnp.concatenate([x.ravel() for x in calls])

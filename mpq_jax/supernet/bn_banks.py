"""BatchNorm banks: parameters and statistics of a norm, once per precision.

A banked leaf has leading row axes (`table.bank_axes`); the bits of a configuration name its row.
The model sees a plain BatchNorm: `gather` picks the rows, `scatter` writes statistics back.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mpq_jax.program import paths
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable

PyTree = Any
Rows = dict[str, tuple[Array, ...]]  # indices along the row axes, by the path of the norm


def rows_of(table: LayerTable, bits: BitConfig) -> Rows:
    """Finds the row of every banked norm that the bits name."""
    bank_bits = jnp.array(table.bank_bits, jnp.int32)
    weights, acts = jnp.asarray(bits.weights), jnp.asarray(bits.acts)

    def naming(axis: str, layer: int) -> Array:
        if axis == "acts":
            return acts[layer]
        return weights[table.previous[layer] if axis == "previous" else layer]

    return {
        norm: tuple(jnp.argmax(naming(axis, layer) == bank_bits) for axis in table.bank_axes)
        for norm, layer in table.bank_norms.items()
    }


def tile(table: LayerTable, tree: PyTree) -> PyTree:
    """Copies the leaves of every banked norm into all of its rows."""
    rows = (len(table.bank_bits),) * len(table.bank_axes)
    return paths.map_leaves(
        tree,
        lambda path, leaf: (
            jnp.broadcast_to(leaf, (*rows, *leaf.shape))
            if paths.parent(path) in table.bank_norms
            else leaf
        ),
    )


def gather(table: LayerTable, tree: PyTree, bits: BitConfig) -> PyTree:
    """Picks the rows that the bits name, so that the leaves are those of the model."""
    rows = rows_of(table, bits)
    return paths.map_leaves(
        tree,
        lambda path, leaf: leaf[rows[norm]] if (norm := paths.parent(path)) in rows else leaf,
    )


def scatter(table: LayerTable, banked: PyTree, bits: BitConfig, plain: PyTree) -> PyTree:
    """Writes a subnet's statistics into the rows that its bits name; other rows stay."""
    rows = rows_of(table, bits)
    flat = paths.flatten(plain)
    return paths.map_leaves(
        banked,
        lambda path, leaf: (
            leaf.at[rows[norm]].set(flat[path])
            if (norm := paths.parent(path)) in rows
            else flat[path]
        ),
    )


def expand(table: LayerTable, tree: PyTree) -> PyTree:
    """Repeats rows until every banked leaf has all row axes of the table.

    So norms per precision become norms per pair of precisions, whose rows all start as those of
    the layer's own precision.

    Args:
        table: the layers; its first row axes are those of the tree.
        tree: parameters or statistics.
    """
    axes, rows = len(table.bank_axes), len(table.bank_bits)

    def repeat(path: str, leaf: Array) -> Array:
        if paths.parent(path) not in table.bank_norms:
            return leaf
        *held, channels = leaf.shape  # every leaf of a norm is one number per channel
        if held != [rows] * len(held) or len(held) > axes:
            raise ValueError(
                f"{path!r} has rows {held}; wanted at most {axes} axes of {rows} rows, one for "
                f"each of the bits {table.bank_bits}"
            )
        missing = (1,) * (axes - len(held))
        return jnp.broadcast_to(
            leaf.reshape(*held, *missing, channels), (rows,) * axes + (channels,)
        )

    return paths.map_leaves(tree, repeat)


def used_rows(table: LayerTable, configs: BitConfig) -> dict[str, Array]:
    """Marks the rows that some configurations use.

    Args:
        table: the layers.
        configs: configurations, [configs, layers].

    Returns:
        Booleans over the row axes, by the path of the norm.
    """
    unused = jnp.zeros((len(table.bank_bits),) * len(table.bank_axes), bool)
    rows = jax.vmap(lambda bits: rows_of(table, bits))(configs)
    return {norm: unused.at[row].set(True) for norm, row in rows.items()}

"""The kernels of layers: parameters, slices of them, or what the model computes of several."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mpq_jax.program import paths
from mpq_jax.program.evaluate import Change, evaluate
from mpq_jax.program.layers import shapes_of
from mpq_jax.program.network import Network
from mpq_jax.program.trace import Program
from mpq_jax.supernet.layer_table import Layer, LayerTable
from mpq_jax.supernet.placement import Edit, placed_sites

PyTree = Any


def of_layers(table: LayerTable, params: PyTree, computed: dict[str, Array]) -> list[Array]:
    """Lists the kernel of every layer, in the order of the table; a zero for products.

    Args:
        table: the layers.
        params: parameters of the model.
        computed: kernels that the model computes, by layer.
    """
    flat = paths.flatten(params)

    def kernel(layer: Layer) -> Array:
        if layer.is_product:
            return jnp.zeros(())
        if layer.kernel is None:
            return computed[layer.name]
        return flat[layer.kernel][layer.position] if layer.position else flat[layer.kernel]

    return [kernel(layer) for layer in table.layers]


def pick_computed(table: LayerTable, kernels: Sequence[Array]) -> dict[str, Array]:
    """Picks those kernels that the model computes, by layer, from one per layer of the table."""
    pairs = zip(table.layers, kernels, strict=True)
    return {layer.name: kernel for layer, kernel in pairs if layer.is_computed}


def compute(
    table: LayerTable, network: Network, call: Callable[[PyTree, Any], Program], params: PyTree
) -> dict[str, Array]:
    """Computes the kernels that a model makes of several parameters, by layer.

    The rest of the model is dead code to the compiler.

    Args:
        table: the layers.
        network: the model.
        call: `(variables, inputs) -> program` of a call in evaluation mode.
        params: parameters of the model.

    Raises:
        ValueError: the table does not know the inputs of the model.
    """
    if not any(layer.is_computed for layer in table.layers):
        return {}
    if table.example is None:
        raise ValueError("the table was not made by trace_layers, so kernels are not known")
    shapes = table.example.inputs, shapes_of(network, table.example.inputs).get("batch_stats", {})
    inputs, statistics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    variables = {"params": params, "batch_stats": statistics}
    program = call(variables, inputs)
    records = {
        table.layers[placed.first].name: placed.site.kernel
        for placed in placed_sites(table, program)
        if table.layers[placed.first].is_computed
    }
    arguments = jax.tree.leaves((variables, inputs))
    return evaluate(program.jaxpr, arguments, {}, {}, records)[1]


def replace(table: LayerTable, program: Program, computed: dict[str, Array]) -> Edit:
    """Puts kernels in the place of those that the model computes.

    Args:
        table: the layers.
        program: a call of the model.
        computed: the kernels, by layer.
    """
    placed = [
        (site, layer)
        for site in placed_sites(table, program)
        if (layer := table.layers[site.first]).is_computed
    ]

    def replaced(x: Array, w: Array) -> Array:
        return w.astype(x.dtype)

    return Edit(
        {site.site.kernel: Change(layer.name, replaced) for site, layer in placed},
        {layer.name: computed[layer.name] for _, layer in placed},
        {},
    )

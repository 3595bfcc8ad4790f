"""Where the layers of a table are in a traced program."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mpq_jax.program import paths
from mpq_jax.program.evaluate import Change, Place
from mpq_jax.program.layers import product_names, site_names
from mpq_jax.program.sites import Product, Site, scope_output
from mpq_jax.program.trace import Program
from mpq_jax.supernet.layer_table import LayerTable


class Edit(NamedTuple):
    """What an evaluation changes and records; see `evaluate.evaluate`."""

    changes: dict[Place, Change]
    arrays: dict[str, Any]
    records: dict[str, Place]


NO_EDIT = Edit({}, {}, {})


class PlacedSite(NamedTuple):
    """A site of a program, and the layers that it computes.

    Attributes:
        number: index of the site in the program.
        site: the site.
        layers: indices of its layers in the table, in the shape of the loops that slice the kernel.
    """

    number: int
    site: Site
    layers: np.ndarray

    @property
    def first(self) -> int:
        """Index of its first layer; all have the same rules but for their bits."""
        return int(self.layers.flat[0])

    def spread(self, values: Any) -> Any:
        """Picks the values of its layers, with one axis for each loop around the site.

        Args:
            values: one value per layer of the table; NumPy's as well, outside of loops.
        """
        if not self.site.loops:
            return values[self.first]
        picked = values[jnp.array(self.layers)]
        shape = [
            length if depth in self.site.stacked else 1
            for depth, length in enumerate(self.site.loops)
        ]
        return jnp.broadcast_to(picked.reshape(shape), self.site.loops)


class PlacedProduct(NamedTuple):
    """A product of activations of a program that is a layer.

    Attributes:
        product: the product.
        layer: index of the layer in the table.
    """

    product: Product
    layer: int

    def spread(self, values: Any) -> Any:
        """Picks the value of its layer, with one axis for each loop around it."""
        value = values[self.layer]
        return jnp.broadcast_to(value, self.product.loops) if self.product.loops else value


@functools.lru_cache(maxsize=256)
def placed_products(table: LayerTable, program: Program) -> tuple[PlacedProduct, ...]:
    """Finds the products of a table in a program of the same model."""
    names = product_names(program)
    return tuple(
        PlacedProduct(program.sites.products[names.index(layer.name)], index)
        for index, layer in enumerate(table.layers)
        if layer.is_product
    )


@functools.lru_cache(maxsize=256)
def placed_sites(table: LayerTable, program: Program) -> tuple[PlacedSite, ...]:
    """Finds the layers of a table in a program of the same model."""
    indices: dict[str, list[int]] = {}
    for number, layer in enumerate(table.layers):
        if not layer.is_product:
            indices.setdefault(layer.site_name, []).append(number)
    return tuple(
        PlacedSite(number, site, np.array(indices[name]).reshape(site.slices))
        for number, (site, name) in enumerate(
            zip(program.sites.sites, site_names(program), strict=True)
        )
        if name in indices
    )


class Feature(NamedTuple):
    """A feature of a layer in a program.

    Attributes:
        place: its value, or those of all slices of a loop.
        stacked: axes of these slices in what is recorded at the place.
        position: indices of the layer's slice along them.
    """

    place: Place
    stacked: tuple[int, ...] = ()
    position: tuple[int, ...] = ()

    def of(self, recorded: Array) -> Array:
        """Picks the feature from what was recorded at its place."""
        if not self.position:
            return recorded
        return jnp.moveaxis(recorded, self.stacked, range(len(self.stacked)))[self.position]


@functools.lru_cache(maxsize=256)
def find_features(table: LayerTable, program: Program, label: str) -> dict[str, Feature]:
    """Finds the features of layers with a choice, by path.

    They are the outputs of the norm behind the layer (or of the layer, where it has none), and of
    the module around that norm, where the model names its modules.
    """
    found, features = program.sites, {}
    wanted = {index: path for path, index in table.features.items()}
    for placed in placed_sites(table, program):
        for position, index in np.ndenumerate(placed.layers):
            path = wanted.get(index)
            if path is not None:
                has_norm = table.layers[index].norm == path
                outputs = found.norm_outputs if has_norm else found.outputs
                place = outputs[placed.number]
                features[path] = Feature(place, placed.site.stacked, position)
    for path in {paths.parent(norm) for norm in table.searchable_norms} - {""}:
        place = scope_output(found, f"{label}/{path}")
        if place is not None and path not in features:
            features[path] = Feature(place)
    return features


class LayerInput(NamedTuple):
    """An input of a layer that does not stay float.

    Attributes:
        place: the value.
        placed: the site or product that reads it.
        layer: index of the layer, or of the first one of a site with several.
        is_second: whether it is the second operand of a product.
    """

    place: Place
    placed: PlacedSite | PlacedProduct
    layer: int
    is_second: bool = False


def layer_inputs(table: LayerTable, program: Program) -> Iterator[LayerInput]:
    """Yields all inputs of layers that do not stay float."""
    for placed in placed_sites(table, program):
        if placed.site.data is not None and not table.layers[placed.first].float_acts:
            yield LayerInput(placed.site.data, placed, placed.first)
    for placed in placed_products(table, program):
        layer = table.layers[placed.layer]
        are_float = layer.float_acts, layer.float_weights
        for number, place in enumerate(placed.product.operands):
            if not are_float[number]:
                yield LayerInput(place, placed, placed.layer, is_second=number == 1)

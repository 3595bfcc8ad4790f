"""Layers: the sites of a program by the variable that is their kernel, under the model's names."""

import functools
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from mpq_jax.program import paths
from mpq_jax.program.network import Network
from mpq_jax.program.sites import Site
from mpq_jax.program.trace import Program

KERNEL_NAMES = ("kernel", "embedding", "weight", "w")  # a layer is called like what holds them
PARAMS = "params/"
PRODUCT = "product"  # kind of a product of activations, and the last part of its name


class LayerCall(NamedTuple):
    """A layer: a kernel and the sites that read it, or a product of activations.

    A variable that a loop slices is one layer for each slice; a product in a loop is one layer.

    Attributes:
        name: path of the module, or of the variable where that is not clear; a slice has its
            indices behind it, `blocks/dense[2]`.
        kind: "conv", "depthwise", "dense", "embedding" or "product".
        kernel_shape: shape of the kernel; () of a product.
        params: number of weights; a kernel that is computed in a loop has some for each turn.
        macs: multiply-accumulates per example, of all its calls.
        inputs: values per example that it reads; of a product, its first operand.
        second_inputs: values per example of the second operand of a product.
        channels: output channels; 0: a product has none.
        shares_input_with: index of the first layer that reads the same values.
        kernel: path of the variable, without "params/"; None: the kernel is computed.
        position: indices of its slice along the leading axes of the variable.
        sites: indices of its sites in the program.
        norm: path of the norm behind it.
        first: whether it reads the inputs of the model, without another layer in between.
        last: whether it makes outputs of the model, without another layer in between.
    """

    name: str
    kind: str
    kernel_shape: tuple[int, ...]
    params: int
    macs: int
    inputs: int
    channels: int = 0
    second_inputs: int = 0
    shares_input_with: int = 0
    kernel: str | None = None
    position: tuple[int, ...] = ()
    sites: tuple[int, ...] = ()
    norm: str | None = None
    first: bool = False
    last: bool = False


def find_layers(
    program: Program,
    shapes: dict[str, tuple[int, ...]],
    batch: int,
    *,
    covers: Callable[[LayerCall], bool] = lambda product: False,
) -> list[LayerCall]:
    """Lists the layers of a program in call order.

    Args:
        program: a program in evaluation mode.
        shapes: shape of each variable, by its path.
        batch: number of examples in the inputs.
        covers: which products of activations are layers.
    """
    found = program.sites
    calls = [
        (site.key, None if site.loops else site.reads, call)
        for site, call in _site_calls(program, shapes, batch)
    ]
    calls += [
        (product.key, None, call)
        for product, call in zip(found.products, product_calls(program, batch), strict=True)
        if covers(call)
    ]
    first_reader: dict[Any, int] = {}
    return [
        call._replace(
            shares_input_with=number if reads is None else first_reader.setdefault(reads, number)
        )
        for number, (_, reads, call) in enumerate(sorted(calls, key=lambda entry: entry[0]))
    ]


def _site_calls(
    program: Program, shapes: dict[str, tuple[int, ...]], batch: int
) -> Iterator[tuple[Site, LayerCall]]:
    """Yields the layers that have a kernel, each with the first site that reads values."""
    found = program.sites
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(site_names(program)):
        groups.setdefault(name, []).append(index)
    for name, members in groups.items():
        sites = [found.sites[index] for index in members]
        slices, first = sites[0].slices, sites[0]
        reading = [site for site in sites if site.data is not None]
        count, shape = math.prod(slices) * batch, kernel_shape(first, shapes)
        whole = LayerCall(
            name,
            next((site.kind for site in sites if site.macs), first.kind),
            shape,
            params=math.prod(shape) * (1 if first.leaf else math.prod(first.loops)),
            macs=sum(site.macs * math.prod(site.loops) for site in sites) // count,
            inputs=sum(site.inputs * math.prod(site.loops) for site in reading) // count,
            channels=first.channels,
            kernel=first.leaf and first.leaf.removeprefix(PARAMS),
            sites=tuple(members),
            norm=next((found.norms[i] for i in members if i in found.norms), None),
        )
        is_last = bool(found.last.intersection(members))
        for position in itertools.product(*map(range, slices)):
            depths = [
                site.depth if any(position) else site.first_depth for site in reading or sites
            ]
            yield (
                first._replace(reads=reading[0].reads if reading else None),
                whole._replace(
                    name=name + "".join(f"[{i}]" for i in position),
                    position=position,
                    first=0 in depths,
                    last=is_last and all(i + 1 == n for i, n in zip(position, slices, strict=True)),
                ),
            )


def product_calls(program: Program, batch: int) -> list[LayerCall]:
    """Lists the products of activations, in call order."""
    return [
        LayerCall(
            name,
            PRODUCT,
            (),
            params=0,
            macs=product.macs * math.prod(product.loops) // batch,
            inputs=product.inputs[0] * math.prod(product.loops) // batch,
            second_inputs=product.inputs[1] * math.prod(product.loops) // batch,
            first=product.depth == 0,
        )
        for name, product in zip(product_names(program), program.sites.products, strict=True)
    ]


@functools.lru_cache(maxsize=256)
def product_names(program: Program) -> tuple[str, ...]:
    """Names the products of activations by the module that the layers before them share."""
    of_sites = site_names(program)
    counts: Counter[str] = Counter()
    names: list[str] = []
    for product in program.sites.products:
        modules = [paths.parent(of_sites[index]).split("/") for index in product.nearest]
        shared = "/".join(os.path.commonprefix(modules))
        counts[shared] += 1
        number = "" if counts[shared] == 1 else f"#{counts[shared]}"
        names.append("/".join(filter(None, (shared, f"{PRODUCT}{number}"))))
    return tuple(names)


def kernel_shape(site: Site, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the shape of a site's kernel, in the layout of its variable if it is one."""
    if site.leaf is None:
        return site.kernel_shape
    return tuple(shapes[site.leaf][len(site.stacked) :])


@functools.lru_cache(maxsize=256)
def site_names(program: Program) -> tuple[str, ...]:
    """Names the layer that each site of a program belongs to; the same in all programs of a model.

    A kernel that is computed gives its layer the name of the module that calls it.
    """
    sites = program.sites.sites
    leaves = {site.leaf for site in sites if site.leaf is not None}
    held_by = Counter(paths.parent(leaf) for leaf in leaves)
    named: dict[str, str] = {}
    for leaf in leaves:
        path = leaf.removeprefix(PARAMS)
        holder, last = paths.parent(path), path.rpartition("/")[2]
        alone = held_by[paths.parent(leaf)] == 1 and last in KERNEL_NAMES
        named[leaf] = holder if alone and holder else path
    names: list[str] = []
    taken = Counter(named.values())
    for site in sites:
        if site.leaf is not None:
            names.append(named[site.leaf])
            continue
        name = min(paths.parent(leaf.removeprefix(PARAMS)) for leaf in site.leaves) or site.kind
        taken[name] += 1
        names.append(name if taken[name] == 1 else f"{name}#{taken[name]}")
    return tuple(names)


def variable_shapes(variables: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every variable, by its path."""
    return {path: tuple(leaf.shape) for path, leaf in paths.flatten(variables).items()}


def shapes_of(network: Network, inputs: Any) -> Any:
    """Describes the initial variables of a network, without computing them."""

    def init(key):
        zeros = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), inputs)
        return network.init(key, zeros)

    return jax.eval_shape(init, jax.random.key(0))

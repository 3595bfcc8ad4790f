"""Layers: the sites of a program by the variable that is their kernel, under the model's names."""

import functools
import itertools
import math
from collections import Counter
from typing import Any, NamedTuple

import jax

from mpq_jax.program import paths
from mpq_jax.program.network import Network
from mpq_jax.program.sites import Site
from mpq_jax.program.trace import Program

KERNEL_NAMES = ("kernel", "embedding", "weight", "w")  # a layer is called like what holds them
PARAMS = "params/"


class LayerCall(NamedTuple):
    """A layer: a kernel, and the sites that read it.

    A variable that a loop slices is one layer for each slice.

    Attributes:
        name: path of the module, or of the variable where that is not clear; a slice has its
            indices behind it, `blocks/dense[2]`.
        kind: "conv", "depthwise", "dense" or "embedding".
        kernel_shape: shape of the kernel.
        macs: multiply-accumulates per example, of all its calls.
        shares_input_with: index of the first layer that reads the same values.
        inputs: values per example that it reads.
        channels: output channels.
        kernel: path of the variable, without "params/"; None: the kernel is computed.
        index: indices of its slice along the leading axes of the variable.
        sites: indices of its sites in the program.
        norm: path of the norm behind it.
        first: whether it reads the inputs of the model, without another layer in between.
        last: whether it makes outputs of the model, without another layer in between.
    """

    name: str
    kind: str
    kernel_shape: tuple[int, ...]
    macs: int
    shares_input_with: int
    inputs: int
    channels: int
    kernel: str | None = None
    index: tuple[int, ...] = ()
    sites: tuple[int, ...] = ()
    norm: str | None = None
    first: bool = False
    last: bool = False


def find_layers(
    program: Program, shapes: dict[str, tuple[int, ...]], batch: int
) -> list[LayerCall]:
    """Lists the layers of a program in call order.

    Args:
        program: a program in evaluation mode.
        shapes: shape of each variable, by its path.
        batch: number of examples in the inputs.
    """
    found = program.sites
    names = site_names(program)
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(name, []).append(index)
    first_reader: dict[int, int] = {}
    layers: list[LayerCall] = []
    for name, members in groups.items():
        sites = [found.sites[index] for index in members]
        slices = itertools.product(*map(range, sites[0].slices))
        shape = kernel_shape(sites[0], shapes)
        work = sum(site.macs * math.prod(site.loops) for site in sites)
        reading = [site for site in sites if site.data is not None]
        count = math.prod(sites[0].slices)
        for position in slices:
            number = len(layers)
            shared = number
            if reading and not reading[0].loops:
                shared = first_reader.setdefault(reading[0].reads, number)
            layers.append(
                LayerCall(
                    name + "".join(f"[{i}]" for i in position),
                    next((site.kind for site in sites if site.macs), sites[0].kind),
                    shape,
                    macs=work // count // batch,
                    shares_input_with=shared,
                    inputs=sum(s.inputs * math.prod(s.loops) for s in reading) // count // batch,
                    channels=sites[0].channels,
                    kernel=sites[0].leaf and sites[0].leaf.removeprefix(PARAMS),
                    index=position,
                    sites=tuple(members),
                    norm=next((found.norms[i] for i in members if i in found.norms), None),
                    first=any(site.depth == 0 for site in sites),
                    last=bool(found.last.intersection(members)),
                )
            )
    return layers


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

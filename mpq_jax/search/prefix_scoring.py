"""Scores configurations that begin alike: what they share is computed once.

Searches that change one layer at a time ask for configurations that agree in all layers but one.
Here a set of configurations is a tree: each segment of the model is run once for each different
beginning, so of a change in a late layer only the end of the model is computed. The scores are
those of `scoring.make_score`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mpq_jax.program import network
from mpq_jax.search import segments
from mpq_jax.search.segments import Segments
from mpq_jax.supernet import scoring
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.scoring import BatchScore
from mpq_jax.supernet.state import SupernetState
from mpq_jax.supernet.supernet import Supernet

MEMORY = 2**31  # bytes of intermediate activations that are held at once
TOGETHER = {"cpu": 1}  # inputs of one call by backend: on CPU, larger convolutions are no faster
MOST_TOGETHER = 8  # of other backends
WORTH_SHARING = 0.9  # part of the work that may be left


class _Node(NamedTuple):
    """A beginning of the model: the activations that it ends with, and who shares it."""

    x: Any
    members: np.ndarray


_Group = tuple[int, list[_Node]]  # a configuration whose bits they share in the next segment


def make_prefix_score(
    net: Supernet,
    state: SupernetState,
    cut: Segments,
    *,
    metric: str = "error",
    memory: int = MEMORY,
    together: int | None = None,
    quantized: dict[str, Array] | None = None,
) -> BatchScore:
    """Returns `score(configs, images, labels)` like `scoring.make_score`, by shared prefixes.

    Each segment is compiled once, and once more for several inputs at a time.

    Args:
        net: the supernet.
        state: its state.
        cut: the model's segments, from `segments.find_segments`; those of training mode use the
            norm statistics of the images ("batch"), those of evaluation mode the stored ones.
        metric: see `scoring.make_score`.
        memory: bytes of activations to hold at once, about; what does not fit is computed later.
        together: how many activations a segment is run on at once, where several beginnings meet
            the same bits. 1: never; None: 1 on CPU, where it costs time, 8 elsewhere.
        quantized: kernels from `scoring.quantize_all`; None: they are made here.
    """
    scoring.check(metric, "stored", None)
    if quantized is None:
        quantized = scoring.quantize_all(net, state.trainable)
    measure = jax.jit(scoring.METRICS[metric])
    most = together or TOGETHER.get(jax.default_backend(), MOST_TOGETHER)
    last = len(cut.parts) - 1

    @functools.partial(jax.jit, static_argnums=0)
    def run_segment(depth: int, state, quantized, bits: BitConfig, inputs: tuple[Array, ...]):
        subnet = net.select_quantized(state, quantized, bits)

        def run(x: Array) -> Array:
            return segments.run(net, cut, depth, subnet, x)

        if len(inputs) == 1:
            return (run(inputs[0]),)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs)
        return tuple(jax.vmap(run)(stacked))  # kernels are shared: one large convolution

    def run_all(depth: int, bits: BitConfig, inputs: list[Array]) -> list[Array]:
        outputs: list[Array] = []
        while len(outputs) < len(inputs):
            left = len(inputs) - len(outputs)
            size = most if left >= most else 1
            chosen = tuple(inputs[len(outputs) : len(outputs) + size])
            outputs += run_segment(depth, state, quantized, bits, chosen)
        return outputs

    def score(configs: BitConfig, images: Any, labels: Array) -> Float[Array, " configs"]:
        bits = np.stack([np.asarray(configs.weights), np.asarray(configs.acts)], axis=-1)
        scores: list[Array] = [jnp.zeros(())] * len(bits)
        teacher = jnp.zeros(())
        if metric == "kl":
            teacher = images
            for depth in range(last + 1):
                (teacher,) = run_all(depth, net.table.max_config, [teacher])

        def begun(depth: int, nodes: list[_Node]) -> list[tuple[int, list[_Group]]]:
            """Returns what is to be run next, in parts that fit into memory."""
            groups = _groups(nodes, bits[:, cut.parts[depth].layers])
            size = cut.parts[min(depth + 1, last)].size * network.batch_size(images) * 4
            return [(depth, part) for part in _parts(groups, max(1, memory // (last + 1) // size))]

        pending = begun(0, [_Node(images, np.arange(len(bits)))])
        while pending:
            depth, groups = pending.pop()
            ended: list[_Node] = []
            for one, nodes in groups:
                chosen = BitConfig(jnp.asarray(bits[one, :, 0]), jnp.asarray(bits[one, :, 1]))
                outputs = run_all(depth, chosen, [node.x for node in nodes])
                ended += [_Node(x, node.members) for x, node in zip(outputs, nodes, strict=True)]
            if depth < last:
                pending += begun(depth + 1, ended)
                if len(pending) > 1:
                    jax.block_until_ready([node.x for node in ended])  # or memory runs ahead
                continue
            for node in ended:
                value = measure(node.x, labels, teacher)
                for member in node.members:
                    scores[member] = value
        return jnp.asarray(np.array(jax.device_get(scores), np.float32))

    return score


def shared_work(table: LayerTable, cut: Segments, configs: BitConfig) -> float:
    """Returns the part of all multiplications that is left where beginnings are shared, 0 to 1.

    Args:
        table: the layers.
        cut: the model's segments.
        configs: configurations, [configs, layers].
    """
    bits = np.stack([np.asarray(configs.weights), np.asarray(configs.acts)], axis=-1)
    macs = [sum(table.layers[i].macs for i in part.layers) for part in cut.parts]
    begun, left = np.zeros(len(bits), np.int64), 0.0
    for part, work in zip(cut.parts, macs, strict=True):
        own = bits[:, part.layers].reshape(len(bits), -1)
        _, begun = np.unique(np.column_stack([begun, own]), axis=0, return_inverse=True)
        left += work * (begun.max() + 1)
    return left / (sum(macs) * len(bits))


def make_fast_score(
    net: Supernet,
    state: SupernetState,
    example_inputs: Any,
    *,
    metric: str = "error",
    norms: str = "batch",
    calibration: Any | None = None,
    memory: int = MEMORY,
) -> BatchScore:
    """Returns the faster of both scores for each set of configurations; see `make_score`.

    Beginnings are shared where that saves a tenth of the work at least, and the model has cuts and
    norms that need no images of their own.

    Args:
        net: the supernet.
        state: its state.
        example_inputs: inputs as `trace_layers` takes them.
        metric: see `scoring.make_score`, as for the next three.
        norms: statistics of the norms.
        calibration: images for them.
        memory: see `make_prefix_score`.
    """
    scoring.check(metric, norms, calibration)
    quantized = scoring.quantize_all(net, state.trainable)
    one_by_one = scoring.make_score(
        net,
        state,
        metric=metric,
        norms=norms,
        calibration=calibration,
        quantized=quantized,
    )
    if norms == "recalibrated":
        return one_by_one
    cut = segments.find_segments(net, example_inputs, train=norms == "batch")
    if len(cut.parts) == 1:
        return one_by_one
    shared = make_prefix_score(
        net,
        state,
        cut,
        metric=metric,
        memory=memory,
        quantized=quantized,
    )

    def score(configs: BitConfig, images: Any, labels: Array) -> Float[Array, " configs"]:
        worth_it = shared_work(net.table, cut, configs) < WORTH_SHARING
        return (shared if worth_it else one_by_one)(configs, images, labels)

    return score


def _groups(nodes: list[_Node], bits: np.ndarray) -> list[_Group]:
    """Returns the beginnings that go on differently, those with equal bits together.

    Args:
        nodes: beginnings that end before a segment.
        bits: int [configs, layers of the segment, 2].
    """
    _, kind = np.unique(bits.reshape(len(bits), -1), axis=0, return_inverse=True)
    groups: dict[int, _Group] = {}
    for node in nodes:
        kinds = kind[node.members]
        for one in np.unique(kinds):
            members = node.members[kinds == one]
            groups.setdefault(int(one), (int(members[0]), []))[1].append(_Node(node.x, members))
    return list(groups.values())


def _parts(groups: list[_Group], most: int) -> list[list[_Group]]:
    """Returns the groups in parts of at most so many beginnings."""
    parts: list[list[_Group]] = [[]]
    room = most
    for one, nodes in groups:
        while nodes:
            if not room:
                parts.append([])
                room = most
            chosen, nodes = nodes[:room], nodes[room:]
            parts[-1].append((one, chosen))
            room -= len(chosen)
    return parts

"""Networks of drawn integers, and their packed files."""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers.random_variables import drawn_variables

from mpq_jax.export import safetensors_file
from mpq_jax.export.exported_model import ExportedModel
from mpq_jax.export.packed import network, reader, writer
from mpq_jax.program import paths
from mpq_jax.program.network import example_batch
from mpq_jax.quantizers import double_rounding
from mpq_jax.supernet.layer_table import LayerTable, trace_layers
from mpq_jax.supernet.rules import FIRST_LAST_8BIT, FIRST_LAST_FLOAT, Rule, bit_rules
from mpq_jax.supernet.state import SupernetState, TrainableParams
from mpq_jax.supernet.supernet import Supernet

SHAPE = (8, 8, 2)
IMAGES = jnp.asarray(np.random.default_rng(1).normal(size=(4, *SHAPE)), jnp.float32)
# Of logits, where two programs sum in another order; the kernels and their integers are equal.
LOGITS = {"rtol": 1e-5, "atol": 1e-5}


class Net(nn.Module):
    """A user's own model: three convolutions with norms, two dense layers with biases."""

    affine: bool = True
    channels: Sequence[int] = (8, 16)

    @nn.compact
    def __call__(self, x, *, train):
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            use_bias=self.affine,
            use_scale=self.affine,
        )
        narrow, wide = self.channels
        x = nn.relu(norm(name="stem_norm")(nn.Conv(narrow, (3, 3), name="stem")(x)))
        x = nn.Conv(wide, (3, 3), strides=2, use_bias=False, name="wide")(x)
        x = nn.relu(norm(name="wide_norm")(x))
        x = nn.relu(norm(name="point_norm")(nn.Conv(wide, (1, 1), name="point")(x)))
        x = nn.relu(nn.Dense(16, name="hidden")(x.mean((1, 2))))
        return nn.Dense(3, name="head")(x)


class Case(NamedTuple):
    """What is saved.

    Attributes:
        rules: of the layers.
        bn_banks: how norms are kept.
        affine: whether norms have a scale and a bias.
        every: layers whose kernels take every integer of their range.
        learned: bits of kernels beside the rules, as training learns them; 0 of a kernel of zeros.
    """

    rules: tuple[Rule, ...]
    bn_banks: str
    affine: bool = True
    every: tuple[str, ...] = ("wide", "point", "hidden")
    learned: dict[str, int] = {}


ENDS_FLOAT = functools.partial(bit_rules, first_last=FIRST_LAST_FLOAT)
ENDS_8BIT = functools.partial(bit_rules, first_last=FIRST_LAST_8BIT)
CASES = {
    "8642": Case(ENDS_FLOAT((8, 6, 4, 2)), "weights"),
    "8-bit ends, transition": Case(ENDS_8BIT((8, 6, 4, 2)), "transition"),
    "432, shared": Case(ENDS_8BIT((4, 3, 2)), "shared"),
    "10 bits, pair": Case(ENDS_FLOAT(range(10, 1, -1)), "pair", every=("wide",)),
    "norms of statistics alone": Case(ENDS_FLOAT(range(8, 1, -1)), "weights", affine=False),
    "one precision": Case((Rule(weights=8, acts=8),), "weights"),
    "own bits": Case(
        (Rule(weights=8, acts=8),),
        "shared",
        every=("wide", "hidden"),
        learned={"wide": 9, "point": 0, "hidden": 3},
    ),
}


class Saved(NamedTuple):
    """A network in memory and in a file.

    Attributes:
        exported: the network as it was saved.
        integers: the integers of each layer, as they were drawn.
        path: the file.
        sizes: what `save` returned.
        packed: what `load` returned.
    """

    exported: ExportedModel
    integers: dict[str, np.ndarray]
    path: pathlib.Path
    sizes: reader.Sizes
    packed: network.PackedNetwork

    @property
    def net(self) -> Supernet:
        return self.exported.net

    @property
    def state(self) -> SupernetState:
        return self.exported.state

    @property
    def table(self) -> LayerTable:
        return self.exported.table


def integer_range(bits):
    """The smallest and the largest signed integer of a number of bits."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if bits else (0, 0)


def drawn_integers(generator, layer, *, every: bool):
    """Draws the integers of a kernel; every integer of the range occurs where it is asked."""
    low, high = integer_range(layer.max_bits)
    integers = generator.integers(low, high + 1, layer.params)
    if every:
        integers[: high + 1 - low] = np.arange(low, high + 1)
    return generator.permutation(integers).reshape(layer.kernel_shape)


def weights_of(generator, integers, step, max_bits):
    """Draws weights that round to the integers, some of them on ties or beyond the range."""
    if max_bits == 0:
        return np.zeros(integers.shape, np.float32)
    low, high = integer_range(max_bits)
    offsets = generator.uniform(-0.49, 0.49, integers.shape)
    ties = (integers % 2 == 0) & (generator.random(integers.shape) < 0.3)  # they go to the even one
    offsets = np.where(ties, generator.choice([-0.5, 0.5], integers.shape), offsets)
    far = generator.random(integers.shape) < 0.5
    beyond = np.where(integers == low, -5.3, np.where(integers == high, 5.3, 0.0))
    offsets = np.where(far & (beyond != 0), beyond, offsets)
    return ((integers + offsets) * step).astype(np.float32)


def draw_network(model, table, shape, *, every=(), seed=0):
    """Draws a supernet in which all rows differ, and the integers that its kernels round to."""
    generator = np.random.default_rng(seed)
    net = Supernet(model, table, quantizer=double_rounding.QUANTIZER)
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    wanted = jax.eval_shape(net.init, drawn_variables(model, shape, 0), images)

    def fill(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            return jnp.asarray(generator.uniform(0.6, 1.4, leaf.shape), jnp.float32)
        return jnp.asarray(0.1 * generator.normal(size=leaf.shape), jnp.float32)

    params = jax.tree_util.tree_map_with_path(fill, wanted.trainable.params)
    flat, integers = paths.flatten(params), {}
    grid = (len(table), len(table.candidates))
    weight_step_sizes = generator.uniform(0.001, 0.02, grid).astype(np.float32)
    for index, layer in enumerate(table.layers):
        if layer.float_weights:
            continue
        exact = index % 2 == 1  # ties of a step that is a power of two are ties in float32
        step = np.float32((2.0**-7 if exact else 0.0123) * 2.0 ** (8 - layer.max_bits))
        weight_step_sizes[index, table.candidates.index(layer.max_bits)] = step
        integers[layer.name] = drawn_integers(generator, layer, every=layer.name in every)
        w = weights_of(generator, integers[layer.name], step, layer.max_bits)
        if not exact:
            w = np.where(np.abs(w / step % 1 - 0.5) < 0.005, integers[layer.name] * step, w)
        flat[f"{layer.name}/kernel"] = jnp.asarray(w, jnp.float32)
    trainable = TrainableParams(
        paths.unflatten(flat),
        jnp.asarray(weight_step_sizes),
        jnp.asarray(generator.uniform(0.02, 0.4, grid), jnp.float32),
    )
    stats = jax.tree_util.tree_map_with_path(fill, wanted.batch_stats)
    signed = jnp.asarray(generator.random(len(table)) < 0.5)
    return net, SupernetState(trainable, stats, signed), integers


def parse(path):
    """Reads a safetensors file by its specification: returns its header and its tensors' bytes."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.pop("__metadata__")
    spans = {name: tensor.pop("data_offsets") for name, tensor in header.items()}
    return metadata, header, {name: body[start:end] for name, (start, end) in spans.items()}


def save_network(path, model, table, *, every=(), seed=0, shape=SHAPE, **changes):
    """Draws a network, and saves it with all its precisions and with its norms as they are."""
    net, state, integers = draw_network(model, table, shape, every=every, seed=seed)
    exported = ExportedModel(net, state, None, example_batch(shape), 3)._replace(**changes)
    sizes = writer.save(path, exported, norms="kept")
    return Saved(exported, integers, path, sizes, network.load(path, model=model))


def make_plain_net(tmp_path_factory):
    """Saves a network of the first case, which stands for all where they do not differ."""
    table = trace_layers(Net(), SHAPE, rules=CASES["8642"].rules).with_bn_banks("weights")
    return save_network(
        tmp_path_factory.mktemp("plain") / "integers.safetensors",
        Net(),
        table,
        mean=(0.25, 0.5),
        std=(0.125, 0.75),
        provenance={"config": {"method": "double_rounding", "bits": {"candidates": [8, 6, 4, 2]}}},
    )


def rewritten(source, target, *, metadata=None, **changes):
    """Copies a file with other tensors (None: without it) and metadata, with a sound checksum."""
    tensors = safetensors.numpy.load_file(source)
    tensors = {name: x for name, x in (tensors | changes).items() if x is not None}
    held = parse(source)[0] | (metadata or {})
    held["crc32"] = f"{safetensors_file.checksum(tensors, held):08x}"
    safetensors.numpy.save_file(tensors, target, metadata=held)
    return target


def refused(path, match, model=None):
    with pytest.raises(ValueError, match=match) as caught:
        network.load(path, model=model)
    assert str(path) in str(caught.value)

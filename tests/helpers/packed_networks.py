"""Networks of drawn codes, for the tests of files of integers."""

import functools
import json
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
from mpq_jax.export.packed import integers
from mpq_jax.program import paths
from mpq_jax.quantizers import double_rounding
from mpq_jax.supernet import supernet
from mpq_jax.supernet.layer_table import (
    FIRST_LAST_8BIT,
    FIRST_LAST_FLOAT,
    LayerTable,
    Rule,
    bit_rules,
    trace_layers,
)

SHAPE = (8, 8, 2)
IMAGES = jnp.asarray(np.random.default_rng(1).normal(size=(4, *SHAPE)), jnp.float32)
# Of logits, where two programs sum in another order; the kernels and codes are equal.
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
        found: bits of kernels beside the rules, as training finds them; 0 of a kernel of zeros.
    """

    rules: tuple[Rule, ...]
    bn_banks: str
    affine: bool = True
    every: tuple[str, ...] = ("wide", "point", "hidden")
    found: dict[str, int] = {}


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
        found={"wide": 9, "point": 0, "hidden": 3},
    ),
}


class Saved(NamedTuple):
    """A network in memory and in a file.

    Attributes:
        model, table, variables: the network.
        codes: layer -> its stored integers, as they were drawn.
        path: the file.
        sizes: what `save` returned.
        artifact: what `load` returned.
    """

    model: nn.Module
    table: LayerTable
    variables: supernet.SupernetState
    codes: dict[str, np.ndarray]
    path: str
    sizes: integers.Sizes
    artifact: integers.Artifact


def code_range(bits):
    """The smallest and the largest signed integer of a number of bits."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if bits else (0, 0)


def drawn_codes(generator, layer, *, every: bool):
    """Draws the codes of a kernel; every integer of the range occurs where it is asked."""
    low, high = code_range(layer.max_bits)
    codes = generator.integers(low, high + 1, layer.params)
    if every:
        codes[: high + 1 - low] = np.arange(low, high + 1)
    return generator.permutation(codes).reshape(layer.kernel_shape)


def weights_of(generator, codes, step, max_bits):
    """Draws weights that round to the codes, some of them on ties or beyond the range."""
    if max_bits == 0:
        return np.zeros(codes.shape, np.float32)
    low, high = code_range(max_bits)
    offsets = generator.uniform(-0.49, 0.49, codes.shape)
    ties = (codes % 2 == 0) & (generator.random(codes.shape) < 0.3)  # they go to the even code
    offsets = np.where(ties, generator.choice([-0.5, 0.5], codes.shape), offsets)
    far = generator.random(codes.shape) < 0.5
    beyond = np.where(codes == low, -5.3, np.where(codes == high, 5.3, 0.0))
    offsets = np.where(far & (beyond != 0), beyond, offsets)
    return ((codes + offsets) * step).astype(np.float32)


def draw_network(model, table, shape, *, every=(), seed=0):
    """Draws a supernet in which all rows differ, and the codes that its kernels round to."""
    generator = np.random.default_rng(seed)
    make = functools.partial(supernet.init, model, table, quantizer=double_rounding.QUANTIZER)
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    wanted = jax.eval_shape(make, drawn_variables(model, shape, 0), images)

    def fill(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            return jnp.asarray(generator.uniform(0.6, 1.4, leaf.shape), jnp.float32)
        return jnp.asarray(0.1 * generator.normal(size=leaf.shape), jnp.float32)

    params = jax.tree_util.tree_map_with_path(fill, wanted.trainable.params)
    flat, codes = paths.flatten(params), {}
    grid = (len(table), len(table.candidates))
    weight_step_sizes = generator.uniform(0.001, 0.02, grid).astype(np.float32)
    for index, layer in enumerate(table.layers):
        if layer.float_weights:
            continue
        exact = index % 2 == 1  # ties of a step that is a power of two are ties in float32
        step = np.float32((2.0**-7 if exact else 0.0123) * 2.0 ** (8 - layer.max_bits))
        weight_step_sizes[index, table.candidates.index(layer.max_bits)] = step
        codes[layer.name] = drawn_codes(generator, layer, every=layer.name in every)
        w = weights_of(generator, codes[layer.name], step, layer.max_bits)
        if not exact:
            w = np.where(np.abs(w / step % 1 - 0.5) < 0.005, codes[layer.name] * step, w)
        flat[f"{layer.name}/kernel"] = jnp.asarray(w, jnp.float32)
    trainable = supernet.TrainableParams(
        paths.unflatten(flat),
        jnp.asarray(weight_step_sizes),
        jnp.asarray(generator.uniform(0.02, 0.4, grid), jnp.float32),
    )
    stats = jax.tree_util.tree_map_with_path(fill, wanted.batch_stats)
    signed = jnp.asarray(generator.random(len(table)) < 0.5)
    return supernet.SupernetState(trainable, stats, signed), codes


def parse(path):
    """Reads a safetensors file by its specification: returns its header and its tensors' bytes."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.pop("__metadata__")
    spans = {name: tensor.pop("data_offsets") for name, tensor in header.items()}
    return metadata, header, {name: body[start:end] for name, (start, end) in spans.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def trained_logits(model, table, variables, bits, images):
    quantizer = double_rounding.QUANTIZER
    selected = supernet.select(table, variables, bits, quantizer=quantizer)
    out = supernet.apply(model, table, selected, images, train=False, quantizer=quantizer)
    return out.logits


def make_plain_net(tmp_path_factory):
    """Saves a network of the first case, which stands for all where they do not differ."""
    model = Net()
    table = trace_layers(model, SHAPE, rules=CASES["8642"].rules).with_bn_banks("weights")
    variables, codes = draw_network(model, table, SHAPE)
    path = tmp_path_factory.mktemp("plain") / "integers.safetensors"
    sizes = integers.save(
        path,
        table,
        variables,
        model=integers.ModelSpec(None, 3),
        mean=(0.25, 0.5),
        std=(0.125, 0.75),
        config={"method": "double_rounding", "bits": {"candidates": [8, 6, 4, 2]}},
    )
    return Saved(model, table, variables, codes, path, sizes, integers.load(path, model=model))


def rewritten(source, target, *, metadata=None, **changes):
    """Copies a file with other tensors (None: without it), sealed as `save` seals its files."""
    tensors = safetensors.numpy.load_file(source)
    tensors = {name: x for name, x in (tensors | changes).items() if x is not None}
    held, _, _ = parse(source)
    held |= {"crc32": str(safetensors_file.checksum(tensors, held["content"]))} | (metadata or {})
    safetensors.numpy.save_file(tensors, target, metadata=held)
    return target


def refused(path, match, model=None):
    with pytest.raises(ValueError, match=match) as caught:
        integers.load(path, model=model)
    assert str(path) in str(caught.value)

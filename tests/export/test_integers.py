"""References are the roundings and the file format, written from NumPy and bytes."""

import functools
import json
import math
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
from mpq_jax.export.packed import integers
from mpq_jax.models import make_model
from mpq_jax.program import paths
from mpq_jax.quantizers import double_rounding, lsq
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet import supernet
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.bn_recalibration import recalibrate
from mpq_jax.supernet.layer_table import (
    FIRST_LAST_8BIT,
    FIRST_LAST_FLOAT,
    LayerTable,
    Rule,
    bit_rules,
    trace_layers,
)
from mpq_jax.supernet.scoring import make_score
from mpq_jax.training.metrics import CompileCounter

SHAPE = (8, 8, 2)
IMAGES = jnp.asarray(np.random.default_rng(1).normal(size=(4, *SHAPE)), jnp.float32)
MARGIN = 0.03  # of the file over 8 bits per weight and the float parts
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


def with_found_bits(table, found):
    layers = [
        layer._replace(weight_candidates=(found[layer.name],)) if layer.name in found else layer
        for layer in table.layers
    ]
    return LayerTable(tuple(layers), table.bn_banks)


@pytest.fixture(scope="module", params=CASES)
def saved(request, tmp_path_factory):
    case = CASES[request.param]
    model = Net(affine=case.affine)
    table = trace_layers(model, SHAPE, rules=case.rules).with_bn_banks(case.bn_banks)
    table = with_found_bits(table, case.found)
    variables, codes = draw_network(model, table, SHAPE, every=case.every)
    path = tmp_path_factory.mktemp("saved") / "integers.safetensors"
    sizes = integers.save(path, table, variables, model=integers.ModelSpec(None, 3))
    artifact = integers.load(path, model=model)
    return Saved(model, table, variables, codes, path, sizes, artifact)


def parse(path):
    """Reads a safetensors file by its specification: returns its header and its tensors' bytes."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.pop("__metadata__")
    spans = {name: tensor.pop("data_offsets") for name, tensor in header.items()}
    return metadata, header, {name: body[start:end] for name, (start, end) in spans.items()}


# What is stored.


def test_codes_in_the_file_are_the_rounded_weights(saved):
    _, header, data = parse(saved.path)
    params = paths.flatten(saved.variables.trainable.params)
    for index, layer in enumerate(saved.table.layers):
        if layer.float_weights:
            continue
        column = saved.table.candidates.index(layer.max_bits)
        step = np.float64(saved.variables.trainable.weight_step_sizes[index, column])
        low, high = code_range(layer.max_bits)
        w = np.asarray(params[f"{layer.name}/kernel"], np.float64)
        expected = np.clip(np.rint(w / step), low, high)
        name = f"codes/{layer.name}"
        bytes_each = 1 if layer.max_bits <= 8 else 2
        assert header[name] == {"dtype": f"I{8 * bytes_each}", "shape": list(layer.kernel_shape)}
        stored = np.frombuffer(data[name], f"<i{bytes_each}").reshape(layer.kernel_shape)
        np.testing.assert_array_equal(stored, expected)
        np.testing.assert_array_equal(stored, saved.codes[layer.name])


def test_every_integer_of_the_highest_precision_occurs(saved, request):
    case = CASES[request.node.callspec.params["saved"]]
    for layer in saved.table.layers:
        if layer.name in case.every:
            low, high = code_range(layer.max_bits)
            assert set(saved.codes[layer.name].flat) == set(range(low, high + 1))


def test_nothing_of_a_quantized_kernel_is_kept_in_float(saved):
    _, header, _ = parse(saved.path)
    quantized = {layer.name for layer in saved.table.layers if not layer.float_weights}
    assert {name.removeprefix("codes/") for name in header if "codes/" in name} == quantized
    floats = {name: tensor for name, tensor in header.items() if tensor["dtype"] == "F32"}
    for layer in saved.table.layers:
        kept = [name for name in floats if name.endswith(f"{layer.name}/kernel")]
        assert len(kept) == layer.float_weights
    assert {tensor["dtype"] for tensor in header.values()} <= {"I8", "I16", "F32", "BOOL"}
    assert all("opt" not in name and "momentum" not in name for name in header)


def test_sizes_add_up(saved):
    metadata, header, data = parse(saved.path)
    codes = sum(len(data[name]) for name in header if name.startswith("codes/"))
    total = sum(map(len, data.values()))
    bytes_each = {n: 1 if max(abs(c.min()), c.max()) <= 128 else 2 for n, c in saved.codes.items()}
    assert codes == sum(c.size * bytes_each[name] for name, c in saved.codes.items())
    assert saved.sizes == (codes, total - codes, saved.path.stat().st_size)
    assert saved.artifact.sizes == saved.sizes
    numbers = [np.size(leaf) for leaf in jax.tree.leaves(saved.variables.trainable)]
    numbers += [np.size(leaf) for leaf in jax.tree.leaves(saved.variables.batch_stats)]
    quantized = sum(c.size for c in saved.codes.values())
    assert saved.sizes.floats == 4 * (sum(numbers) - quantized) + len(saved.table)  # `signed`


def test_the_table_and_everything_that_is_float_come_back(saved):
    assert saved.artifact.table == saved.table
    assert saved.artifact.precisions == saved.table.precisions
    before, after = (
        paths.flatten(network.trainable.params) for network in (saved.variables, as_host(saved))
    )
    assert set(before) == set(after)
    codes = {f"{name}/kernel" for name in saved.codes}
    for name in set(before) - codes:
        np.testing.assert_array_equal(after[name], before[name], strict=True)
    rest = ("weight_step_sizes", "act_step_sizes")
    for name in rest:
        np.testing.assert_array_equal(
            getattr(as_host(saved).trainable, name), getattr(saved.variables.trainable, name)
        )
    jax.tree.map(np.testing.assert_array_equal, as_host(saved)[1:], saved.variables[1:])


def as_host(saved):
    return jax.device_get(saved.artifact.variables)


# What runs.


@functools.partial(jax.jit, static_argnums=0)
def trained_subnet(table, variables, bits):
    return supernet.select(table, variables, bits, quantizer=double_rounding.QUANTIZER)


@functools.partial(jax.jit, static_argnums=(0, 1))
def trained_logits(model, table, variables, bits, images):
    quantizer = double_rounding.QUANTIZER
    selected = supernet.select(table, variables, bits, quantizer=quantizer)
    out = supernet.apply(model, table, selected, images, train=False, quantizer=quantizer)
    return out.logits


def random_configs(table, count, seed=0):
    keys = jax.random.split(jax.random.key(seed), count)
    return [bit_configs.sample(key, table.candidates, table.mask) for key in keys]


def test_switched_kernels_are_those_of_training_at_every_precision(saved):
    """Bit for bit, with everything else that makes the subnet; and by NumPy."""
    table = saved.table
    uniform = {bits: table.uniform(bits, bits) for bits in table.precisions}
    for bits in [*uniform, *random_configs(table, 4)]:
        config = uniform.get(bits) if isinstance(bits, int) else bits
        given = saved.artifact.switch(bits)
        trained = trained_subnet(table, saved.variables, config)
        assert jax.tree.structure(given) == jax.tree.structure(trained)
        jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), given, trained)
        for index, layer in enumerate(table.layers):
            if not layer.float_weights:
                check_kernel(saved, layer, index, int(config.weights[index]), given)


def check_kernel(saved, layer, index, bits, subnet):
    factor = 2 ** (layer.max_bits - bits)
    codes = np.rint(saved.codes[layer.name] / factor)  # exact quotients, halves to even
    codes = np.clip(codes, *code_range(bits)).astype(np.float32)
    column = saved.table.candidates.index(layer.max_bits)
    step = np.asarray(saved.variables.trainable.weight_step_sizes)[index, column]
    kernel = paths.flatten(subnet.params)[f"{layer.name}/kernel"]
    np.testing.assert_array_equal(kernel, codes * (step * np.float32(factor)), strict=True)


def test_fake_quant_gives_the_switched_kernels(saved):
    quantized = jax.jit(double_rounding.fake_quant, static_argnames="max_bits")
    params = paths.flatten(saved.variables.trainable.params)
    for bits in saved.table.precisions:
        switched = paths.flatten(saved.artifact.switch(bits).params)
        config = saved.table.uniform(bits, bits)
        for index, layer in enumerate(saved.table.layers):
            if layer.float_weights:
                continue
            name, column = f"{layer.name}/kernel", saved.table.candidates.index(layer.max_bits)
            step = saved.variables.trainable.weight_step_sizes[index, column]
            expected = quantized(params[name], step, config.weights[index], max_bits=layer.max_bits)
            np.testing.assert_array_equal(switched[name], expected, strict=True)


def test_logits_are_those_of_the_trained_network(saved):
    table = saved.table
    configs = {bits: table.uniform(bits, bits) for bits in table.precisions}
    configs |= dict(enumerate(random_configs(table, 4, seed=1), start=100))
    seen = []
    for name, config in configs.items():
        logits = saved.artifact.at(name if name < 100 else config)(IMAGES)
        expected = trained_logits(saved.model, table, saved.variables, config, IMAGES)
        assert logits.shape == (4, 3) and logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, expected, **LOGITS)
        seen.append(np.asarray(logits))
    if len(table.precisions) > 1:
        assert not np.allclose(seen[0], seen[1], rtol=0.01)


def test_without_bits_every_layer_has_its_highest(saved):
    layers = saved.table.layers
    max_bits = BitConfig(
        jnp.array([layer.weight_candidates[0] for layer in layers], jnp.int32),
        jnp.array([layer.act_candidates[0] for layer in layers], jnp.int32),
    )
    for other in (max_bits, max(saved.artifact.precisions)):
        given, expected = saved.artifact.switch(), saved.artifact.switch(other)
        jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), given, expected)
        logits = saved.artifact.at(other)(IMAGES)
        np.testing.assert_array_equal(saved.artifact.at()(IMAGES), logits)


@pytest.mark.parametrize("saved", ["own bits"], indirect=True)
def test_layers_may_have_bits_of_their_own(saved, tmp_path):
    """Codes of 9 bits take two bytes; those of no bits are zeros."""
    _, header, data = parse(saved.path)
    stored = {name: header[f"codes/{name}"]["dtype"] for name in saved.codes}
    assert stored == {"stem": "I8", "wide": "I16", "point": "I8", "hidden": "I8", "head": "I8"}
    assert not np.frombuffer(data["codes/point"], np.int8).any()
    assert not np.asarray(saved.artifact.switch().params["point"]["kernel"]).any()
    bits = saved.table.max_config
    assert bits.weights.tolist() == [8, 9, 0, 3, 8]
    with pytest.raises(ValueError, match=r"weights of 'point' are 8; allowed: \(0,\)"):
        saved.artifact.at(bits._replace(weights=bits.weights.at[2].set(8)))
    ones = np.ones(saved.codes["point"].shape, np.int8)
    changed = rewritten(saved.path, tmp_path / "ones", **{"codes/point": ones})
    refused(changed, "has codes of 'point' beyond 0 bits", saved.model)


def test_bits_and_files_never_recompile(saved, tmp_path):
    """A second file of the same layers included."""
    again = tmp_path / "again.safetensors"
    variables, _ = draw_network(saved.model, saved.table, SHAPE, seed=5)
    integers.save(again, saved.table, variables, model=integers.ModelSpec(None, 3))
    other = integers.load(again, model=Net(affine=saved.model.affine))
    images = IMAGES[:3]  # a shape of its own, so that nothing was compiled before
    integers._switch.clear_cache()
    with CompileCounter() as counter:
        for artifact in (saved.artifact, other):
            for bits in (*saved.table.precisions, *random_configs(saved.table, 3)):
                artifact.at(bits)(images)
    assert (counter.counts["_switch"], counter.counts["_forward"]) == (1, 1)


# One file of the first case stands for all where their differences do not matter.


@pytest.fixture(scope="module")
def plain_net(tmp_path_factory):
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


def test_the_function_is_pure_and_may_be_traced(plain_net):
    apply, later = plain_net.artifact.at(4), plain_net.artifact.at(2)
    first = apply(IMAGES)
    later(IMAGES)
    np.testing.assert_array_equal(apply(IMAGES), first)
    np.testing.assert_allclose(jax.jit(apply)(IMAGES), first, **LOGITS)
    stack = jnp.stack([IMAGES, 2 * IMAGES])
    mapped = jax.jit(lambda images: jax.lax.map(apply, images))(stack)
    np.testing.assert_allclose(mapped[0], first, **LOGITS)
    np.testing.assert_allclose(mapped[1], apply(2 * IMAGES), **LOGITS)


def test_an_artifact_goes_where_a_supernet_goes(plain_net):
    """Into recalibration and into the score of a search, with its quantizer."""
    artifact, table = plain_net.artifact, plain_net.table
    bits, batches = table.uniform(4, 4), IMAGES[None]
    recalibrated = [
        recalibrate(plain_net.model, table, variables, bits, batches, quantizer=quantizer)
        for variables, quantizer in (
            (artifact.variables, artifact.quantizer),
            (plain_net.variables, double_rounding.QUANTIZER),
        )
    ]
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        recalibrated[0].batch_stats,
        recalibrated[1].batch_stats,
    )
    labels = jnp.arange(4, dtype=jnp.int32) % 3
    population = jax.tree.map(lambda *leaves: jnp.stack(leaves), bits, table.uniform(2, 2))
    scores = [
        make_score(plain_net.model, table, variables, metric="loss", quantizer=quantizer)(
            population, IMAGES, labels
        )
        for variables, quantizer in (
            (artifact.variables, artifact.quantizer),
            (plain_net.variables, double_rounding.QUANTIZER),
        )
    ]
    np.testing.assert_allclose(*scores, rtol=1e-5)


def test_what_was_said_at_saving_comes_back(plain_net):
    artifact = plain_net.artifact
    assert (artifact.mean, artifact.std) == ((0.25, 0.5), (0.125, 0.75))
    assert artifact.config["bits"] == {"candidates": [8, 6, 4, 2]}
    metadata, _, _ = parse(plain_net.path)
    assert metadata["format"] == "mpq_jax.integers" and metadata["version"] == "1"


def test_what_was_not_said_is_none(tmp_path, plain_net):
    path = tmp_path / "new" / "folder" / "silent.safetensors"
    integers.save(
        path, plain_net.table, plain_net.variables, model=integers.ModelSpec(None, 3), config=None
    )
    artifact = integers.load(path, model=plain_net.model)
    assert (artifact.mean, artifact.std, artifact.config) == (None, None, {})


def test_models_of_the_library_are_found_by_name(tmp_path):
    """With their options, tuples among them, which JSON makes lists of."""
    options = {"stage_sizes": (1,), "width": 4}
    model = make_model("resnet18", num_classes=7, **options)
    table = trace_layers(model, (16, 16, 3), rules=ENDS_FLOAT((4, 2))).with_bn_banks("weights")
    variables, _ = draw_network(model, table, (16, 16, 3))
    path = tmp_path / "named.safetensors"
    integers.save(path, table, variables, model=integers.ModelSpec("resnet18", 7, options))
    artifact = integers.load(path)
    assert artifact.model == model
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
    expected = trained_logits(model, table, variables, table.uniform(2, 2), images)
    np.testing.assert_allclose(artifact.at(2)(images), expected, **LOGITS)


@pytest.mark.parametrize(
    ("candidates", "first_last"), [((8, 6, 4, 2), FIRST_LAST_FLOAT), ((4, 3, 2), FIRST_LAST_8BIT)]
)
def test_the_file_of_resnet20_takes_8_bits_per_weight_and_its_floats(
    tmp_path, candidates, first_last
):
    model = make_model("resnet20", num_classes=10)
    rules = bit_rules(candidates, first_last=first_last)
    table = trace_layers(model, (32, 32, 3), rules=rules).with_bn_banks("weights")
    variables, codes = draw_network(model, table, (32, 32, 3))
    path = tmp_path / "resnet20.safetensors"
    config = {"method": "double_rounding", "epochs": 200}
    spec = integers.ModelSpec("resnet20", 10)
    sizes = integers.save(
        path, table, variables, model=spec, mean=(0.5,) * 3, std=(0.25,) * 3, config=config
    )
    one_byte_each = sum(layer.params for layer in table.layers if not layer.float_weights)
    assert sizes.codes == one_byte_each == sum(c.size for c in codes.values())
    print(f"{sizes.file} bytes; 8 bits per weight and the floats: {one_byte_each + sizes.floats}")
    assert path.stat().st_size == sizes.file <= (1 + MARGIN) * (one_byte_each + sizes.floats)


# What cannot be.


def rewritten(source, target, *, metadata=None, **changes):
    """Copies a file with other tensors (None: without it), sealed as `save` seals its files."""
    tensors = safetensors.numpy.load_file(source)
    tensors = {name: x for name, x in (tensors | changes).items() if x is not None}
    held, _, _ = parse(source)
    held |= {"crc32": str(safetensors_file.checksum(tensors, held["content"]))} | (metadata or {})
    safetensors.numpy.save_file(tensors, target, metadata=held)
    return target


def test_a_rewritten_file_is_sound(plain_net, tmp_path):
    path = rewritten(plain_net.path, tmp_path / "copy")
    artifact = integers.load(path, model=plain_net.model)
    np.testing.assert_array_equal(artifact.at(4)(IMAGES), plain_net.artifact.at(4)(IMAGES))


def refused(path, match, model=None):
    with pytest.raises(ValueError, match=match) as caught:
        integers.load(path, model=model)
    assert str(path) in str(caught.value)


def test_truncated_files_are_refused(plain_net, tmp_path):
    content, path = plain_net.path.read_bytes(), tmp_path / "cut"
    body = 8 + int.from_bytes(content[:8], "little")
    for length in (0, 1, 7, 8, 100, body // 2, body - 1, body, body + 1, len(content) - 1):
        path.write_bytes(content[:length])
        refused(path, "no whole safetensors file .*it may have been cut off")


def test_longer_files_are_refused(plain_net, tmp_path):
    path = tmp_path / "long"
    path.write_bytes(plain_net.path.read_bytes() + b"\0")
    refused(path, "no whole safetensors file")


def test_a_flipped_bit_anywhere_is_noticed(plain_net, tmp_path):
    content, path = plain_net.path.read_bytes(), tmp_path / "flipped"
    body = 8 + int.from_bytes(content[:8], "little")
    places = [*range(body, len(content), 97), len(content) - 1]  # of the numbers
    for place in places + list(range(0, body, 5)):  # of the header as well
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        message = "is damaged: its checksum is wrong" if place >= body else str(path)
        refused(path, message, plain_net.model)


def test_files_of_another_kind_are_refused(tmp_path):
    text, foreign = tmp_path / "text", tmp_path / "foreign"
    text.write_text("weights of a network\n" * 10)
    refused(text, "no whole safetensors file")
    tensors = {"kernel": np.zeros((3, 3), np.float32)}
    for metadata, found in ((None, "None"), ({"format": "pt"}, "'pt'")):
        safetensors.numpy.save_file(tensors, foreign, metadata=metadata)
        refused(foreign, f'header says format {found}, wanted "mpq_jax.integers"')


@pytest.mark.parametrize("version", ["2", "10", "1.1", ""])
def test_files_of_another_version_are_refused(plain_net, tmp_path, version):
    path = rewritten(plain_net.path, tmp_path / "newer", metadata={"version": version})
    refused(path, f"has version {version} of the format, .* reads version 1; update mpq_jax")


def test_a_missing_file_is_no_damaged_one(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            integers.load(path)


STEPS = np.full((5, 5), 0.01, np.float32)  # of 5 layers with candidates 32, 8, 6, 4, 2
CODES = np.zeros((3, 3, 8, 16), np.int8)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"codes/wide": None}, "codes/wide"),
        ({"codes/wide": CODES[:2]}, r"shape \(2, 3, 8, 16\) for layer 'wide'.* \(3, 3, 8, 16\)"),
        ({"codes/wide": CODES.astype(np.float32)}, "float32 for layer 'wide'; wanted int8"),
        ({"codes/wide": CODES.astype(np.int16)}, "int16 for layer 'wide'; wanted int8"),
        ({"codes/more": CODES}, "codes/more"),
        ({"momentum": STEPS}, "momentum"),
        ({"weight_step_sizes": None}, "weight_step_sizes"),
        (
            {"weight_step_sizes": STEPS[:4]},
            r"'weight_step_sizes' of shape \(4, 5\); wanted \(5, 5\)",
        ),
        ({"act_step_sizes": STEPS[:, :4]}, r"'act_step_sizes' of shape \(5, 4\); wanted \(5, 5\)"),
        ({"signed": np.zeros(4, bool)}, r"'signed' of shape \(4,\); wanted \(5,\)"),
        ({"norms/wide_norm": None}, "wide_norm"),
        ({"norms/wide_norm": np.ones((4, 3, 16), np.float32)}, r"wide_norm.* \(3,\); .* \(4,\)"),
        ({"norms/wide_norm": np.ones((3, 4, 16), np.float32)}, "does not hold what its header"),
        ({"floats/params/head/kernel": None}, "holds nothing for layer 'head'"),
    ],
)
def test_tensors_that_are_not_those_of_the_header_are_refused(plain_net, tmp_path, changes, match):
    path = rewritten(plain_net.path, tmp_path / "changed", **changes)
    refused(path, match, plain_net.model)


def test_codes_beyond_their_range_are_refused(tmp_path):
    model = Net()
    table = trace_layers(model, SHAPE, rules=ENDS_FLOAT((4, 2))).with_bn_banks("shared")
    variables, _ = draw_network(model, table, SHAPE)
    path = tmp_path / "four"
    integers.save(path, table, variables, model=integers.ModelSpec(None, 3))
    for code in (-9, 8):
        changed = rewritten(path, tmp_path / "beyond", **{"codes/wide": CODES + np.int8(code)})
        refused(changed, "has codes of 'wide' beyond 4 bits", model)


def test_a_model_of_ones_own_must_be_given_to_compute(plain_net):
    unknown = integers.load(plain_net.path)
    assert unknown.table == plain_net.table and unknown.precisions == (8, 6, 4, 2)
    with pytest.raises(ValueError, match=r"not in mpq_jax.models; call load\(path, model=...\)"):
        unknown.at(8)(jnp.zeros((1, *SHAPE)))


def test_another_model_than_that_of_the_file_is_refused(plain_net):
    other = integers.load(plain_net.path, model=make_model("resnet8", num_classes=3, width=4))
    with pytest.raises(ValueError, match="not the one of the file: these layers differ: .*conv1"):
        other.at(8)(jnp.zeros((1, *SHAPE)))


def test_bits_may_be_any_integer(plain_net):
    images = jnp.ones((1, *SHAPE))
    at = plain_net.artifact.at
    np.testing.assert_array_equal(at(np.int64(4))(images), at(4)(images))


def test_unknown_bits_are_refused_with_those_there_are(plain_net):
    for bits in (5, 16, 0, -8):
        match = rf"bits is {bits}; the file holds a network of \(8, 6, 4, 2\) bits"
        with pytest.raises(ValueError, match=match):
            plain_net.artifact.at(bits)


def test_configurations_that_the_table_does_not_allow_are_refused(plain_net):
    table, artifact = plain_net.table, plain_net.artifact
    sound = table.uniform(4, 4)
    with pytest.raises(ValueError, match=r"weights of 'wide' are 5; allowed: \(8, 6, 4, 2\)"):
        artifact.at(sound._replace(weights=sound.weights.at[1].set(5)))
    with pytest.raises(ValueError, match=r"acts of 'stem' are 8; allowed: \(32,\)"):
        artifact.at(sound._replace(acts=sound.acts.at[0].set(8)))
    with pytest.raises(ValueError, match=r"shape \(3,\); wanted one .* for each of the 5 layers"):
        artifact.at(BitConfig(sound.weights[:3], sound.acts[:3]))


@pytest.mark.parametrize(
    "quantizer",
    [double_rounding.UNSHARED, double_rounding.FLOORED, double_rounding.STORED, lsq.QUANTIZER],
)
def test_networks_that_need_their_float_weights_are_refused(plain_net, tmp_path, quantizer):
    assert not integers.can_store(quantizer) and not integers.can_store(None)
    path = tmp_path / "refused"
    with pytest.raises(ValueError, match="only Double Rounding with shared scales and rounding"):
        integers.save(
            path,
            plain_net.table,
            plain_net.variables,
            model=integers.ModelSpec(None, 3),
            quantizer=quantizer,
        )
    assert not path.exists()


def test_an_interrupted_save_leaves_the_older_file(plain_net, tmp_path, monkeypatch):
    path = tmp_path / "kept"
    path.write_bytes(plain_net.path.read_bytes())
    write = pathlib.Path.write_bytes

    def fail_half_way(file, content):
        write(file, content[: len(content) // 2])
        raise OSError("no space left on device")

    other = plain_net.variables._replace(signed=~plain_net.variables.signed)
    spec = integers.ModelSpec(None, 3)
    monkeypatch.setattr(pathlib.Path, "write_bytes", fail_half_way)
    with pytest.raises(OSError, match="no space left"):
        integers.save(path, plain_net.table, other, model=spec)
    assert path.read_bytes() == plain_net.path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
    monkeypatch.undo()
    integers.save(path, plain_net.table, other, model=spec)
    artifact = integers.load(path, model=plain_net.model)
    np.testing.assert_array_equal(artifact.variables.signed, other.signed)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]


def test_configs_that_are_no_json_are_refused_before_anything_is_written(plain_net, tmp_path):
    with pytest.raises(TypeError, match="JSON"):
        integers.save(
            tmp_path / "new",
            plain_net.table,
            plain_net.variables,
            model=integers.ModelSpec(None, 3),
            config={"rate": np.float32(math.pi)},
        )
    assert not list(tmp_path.iterdir())

"""Packed files of one configuration: training's integers bit for bit, and no byte too many."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.exported_models import make_exported, some_images
from helpers.finished_runs import make_run, some_digits
from helpers.packed_networks import parse
from helpers.random_variables import drawn_variables

from mpq_jax.export import exported_model, finished_run, program
from mpq_jax.export.exported_model import ExportedModel
from mpq_jax.export.packed import bn_folding, network, reader, writer
from mpq_jax.models import make_model
from mpq_jax.program import paths
from mpq_jax.program.network import example_batch
from mpq_jax.quantizers import double_rounding, lsq
from mpq_jax.supernet import costs
from mpq_jax.supernet.layer_table import LayerTable, trace_layers
from mpq_jax.supernet.rules import bit_rules
from mpq_jax.supernet.state import SupernetState, TrainableParams
from mpq_jax.supernet.supernet import Supernet

# Folding multiplies and adds float32 numbers in another order, a few roundings in all:
ROUNDING = 1e-5  # part of the largest logit, as long as no input of a layer changes its integer


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    workdir = make_run(tmp_path_factory.mktemp("run"), "double_rounding")
    return finished_run.load(workdir, "uniform:4")


@pytest.fixture(scope="module")
def path(exported, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "network.safetensors"
    writer.save(path, exported)
    return path


@pytest.fixture(scope="module")
def reference(exported):
    """Test images, and the logits that training has for them."""
    images, _ = some_digits(exported)
    return images, training_logits(exported, images)


def training_logits(exported, images):
    return np.asarray(jax.jit(lambda x: exported_model.logits(exported, x))(images))


def fold_norms(exported):
    variables = program.flat_variables(exported_model.select(exported))
    return bn_folding.fold(variables, bn_folding.norms_of(exported))


def logits_of(path, images, model=None):
    return np.asarray(network.load(path, model=model).at()(images))


def check_close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDING * np.abs(wanted).max())


def drawn_network(model, shape, bits_of, *, quantizer=lsq.QUANTIZER):
    """A network of drawn weights with bits of one's own choice, without compiling anything."""
    table = trace_layers(model, shape, rules=bit_rules((8, 6, 5, 4, 3, 2)))
    variables = drawn_variables(model, shape, 0)
    layers = [
        layer._replace(weight_candidates=(bits,)) if bits is not None else layer
        for layer, bits in zip(table.layers, bits_of(table), strict=True)
    ]
    table = LayerTable(tuple(layers), "shared")
    net = Supernet(model, table, quantizer=double_rounding.QUANTIZER)
    kernels = [np.asarray(kernel) for kernel in net.kernels(variables["params"])]
    steps = [  # with which the integers of the layer fill their range
        np.abs(kernel).max() / max(2 ** (layer.max_bits - 1) - 1, 1)
        for layer, kernel in zip(table.layers, kernels, strict=True)
    ]
    step_sizes = np.repeat(np.array(steps, np.float32)[:, None], len(table.candidates), 1)
    trainable = TrainableParams(variables["params"], step_sizes, np.full_like(step_sizes, 0.1))
    state = SupernetState(
        jax.tree.map(jnp.asarray, trainable),
        variables.get("batch_stats", {}),
        jnp.zeros(len(table), bool),
    )
    net = Supernet(model, table, quantizer=quantizer)
    inputs = example_batch(shape)
    return ExportedModel(net, state, table.max_config, inputs, 10, provenance={"bits": "drawn"})


def test_integers_come_back_bit_for_bit(exported, path):
    file = reader.read(path)
    for layer, wanted in zip(file.layers, exported_model.quantized_layers(exported), strict=True):
        same = ("name", "kind", "bits", "input_bits", "input_signed")
        assert [getattr(layer, x) for x in same] == [getattr(wanted, x) for x in same]
        assert layer.candidates == (wanted.bits,)
        step_size = wanted.input_step_size
        assert layer.input_step_size == (None if step_size is None else float(step_size))
        assert (layer.integers is None) == (wanted.integers is None)
        if layer.integers is None:
            np.testing.assert_array_equal(file.params[f"{layer.name}/kernel"], wanted.kernel)
        else:
            np.testing.assert_array_equal(layer.integers, wanted.integers)
            values = layer.integers.astype(np.float32) * np.float32(layer.step_size)
            np.testing.assert_array_equal(values, wanted.kernel)
    assert file.provenance["bits"] == "uniform:4"
    assert (file.mean, file.std) == (exported.mean, exported.std)
    assert (file.image_shape, file.num_classes) == ((8, 8, 1), 10)


def test_the_header_is_plain_json(exported, path):
    """Read by the specification of safetensors alone."""
    metadata, _, _ = parse(path)
    assert (metadata["format"], metadata["version"]) == ("mpq_jax.packed", "2")
    layers = json.loads(metadata["layers"])
    assert layers["name"] == list(exported.table.names)
    assert layers["bits"] == [[int(bits)] for bits in exported.bits.weights]
    assert json.loads(metadata["provenance"]) == exported.provenance
    assert json.loads(metadata["norms"])["path"][0] == "stem_norm"
    spec = {"name": "resnet8", "options": {"width": 4, "dtype": "float32"}}
    assert json.loads(metadata["network"])["model"] == spec


def test_logits_are_those_of_training(path, reference):
    check_close(logits_of(path, reference[0]), reference[1])


@pytest.mark.slow
def test_norms_that_are_kept_come_back_as_they_were(exported, reference, tmp_path):
    writer.save(tmp_path / "kept", exported, norms="kept")
    packed, subnet = network.load(tmp_path / "kept"), exported_model.select(exported)
    assert not packed.file.norms
    given = packed.switch()
    jax.tree.map(np.testing.assert_array_equal, given.batch_stats, subnet.batch_stats)
    jax.tree.map(np.testing.assert_array_equal, given.params, subnet.params)
    check_close(packed.forward(given, reference[0]), reference[1])


def test_norms_of_16_bits_are_rounded_once(exported, reference, path, tmp_path):
    half = tmp_path / "network.safetensors"
    sizes, whole = writer.save(half, exported, norms="float16"), reader.read(path).sizes
    exact, file = fold_norms(exported), reader.read(half)
    assert set(file.norms) == set(exact)
    for name, found in file.norms.items():
        for rounded, numbers in zip(found, exact[name].values(), strict=True):
            bound = np.maximum(2.0**-11 * np.abs(numbers), 2.0**-25)
            assert np.all(np.abs(rounded - numbers) <= bound)
    channels = sum(len(leaves["offset"]) for leaves in exact.values())
    assert whole.floats - sizes.floats == 4 * channels
    images, wanted = reference
    assert np.mean(logits_of(half, images).argmax(-1) == wanted.argmax(-1)) >= 0.9


class TanhNorm(nn.BatchNorm):
    """A norm that computes something else besides."""

    @nn.compact
    def __call__(self, x, use_running_average=None):
        return 3 * jnp.tanh(super().__call__(x, use_running_average))


class OwnNorm(nn.Module):
    """A norm of one's own, with statistics of its own."""

    @nn.compact
    def __call__(self, x):
        mean = self.variable("batch_stats", "mean", lambda: 0.3 * jnp.ones(x.shape[-1]))
        return x - mean.value.reshape((1, 1, 1, -1))


class Odd(nn.Module):
    """What cannot be folded, beside what can; and a parameter without axes."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(4, (3, 3), strides=2, use_bias=False, name="conv0")(x)
        x = nn.BatchNorm(use_running_average=not train, axis=3, name="folded")(x)
        x = nn.Conv(6, (3, 2), (1, 2), padding="VALID", kernel_dilation=2, name="conv1")(x)
        x = nn.PReLU()(
            nn.Conv(4, (2, 2), padding=[1, (0, 2)], feature_group_count=2, name="conv2")(x)
        )
        x = nn.BatchNorm(use_running_average=True, axis=1, name="rows")(x)
        x = OwnNorm()(TanhNorm(use_running_average=True, name="tanh")(x))
        x = nn.Conv(4, (3, 3), padding="CIRCULAR", name="conv3")(x)
        return nn.Dense(3, name="head")(jnp.mean(x, (1, 2)))


@pytest.mark.slow
def test_what_cannot_be_folded_is_kept_as_it_is(tmp_path):
    exported = make_exported(Odd(), (11, 9, 2), turned=0.5)
    path = tmp_path / "network.safetensors"
    writer.save(path, exported)
    file = reader.read(path)
    assert set(file.norms) == {"folded", "tanh", "OwnNorm_0"}
    assert {paths.parent(name) for name in file.batch_stats} == {"rows"}
    assert file.params["PReLU_0/negative_slope"].shape == ()
    assert file.layers[-1].input_dilation == () and file.layers[0].input_dilation == (1, 1)
    found = [(x.strides, x.padding, x.dilation, x.groups) for x in file.layers]
    assert found == [
        ((2, 2), ((1, 1), (1, 1)), (1, 1), 1),
        ((1, 2), ((0, 0), (0, 0)), (2, 2), 1),
        ((1, 1), ((1, 1), (0, 2)), (1, 1), 2),
        ((1, 1), ((0, 0), (0, 0)), (1, 1), 1),
        ((), (), (), 1),
    ]
    images = some_images(exported)
    check_close(logits_of(path, images, Odd()), training_logits(exported, images))


@pytest.mark.slow
def test_a_network_computes_in_the_type_that_it_was_trained_in(tmp_path):
    workdir = make_run(tmp_path / "run", "rfquant", **{"model.dtype": "bfloat16"})
    exported = finished_run.load(workdir, "uniform:4")
    path = tmp_path / "network.safetensors"
    writer.save(path, exported)
    assert network.load(path).model == exported.net.model
    images, _ = some_digits(exported)
    wanted = training_logits(exported, images)
    found = logits_of(path, images)
    assert np.mean(found.argmax(-1) == wanted.argmax(-1)) > 0.9  # norms are rounded once, not twice


def bytes_beside_kernels(exported):
    """Bytes of numbers that the cost model leaves out: norms, biases and step sizes."""
    folded = fold_norms(exported)
    norms = sum(len(leaves["offset"]) for leaves in folded.values())
    params = paths.flatten(exported.state.trainable.params)
    biases = sum(
        leaf.size
        for name, leaf in params.items()
        if not name.endswith("kernel") and paths.parent(name) not in folded
    )
    inputs = sum(not layer.float_acts for layer in exported.table.layers)
    return 8 * norms + 4 * biases + 4 * (len(exported.table) + inputs)


def mixed_bits(table):
    return [
        None if layer.max_bits == 8 and not layer.searchable else 2 + index % 7
        for index, layer in enumerate(table.layers)
    ]


@pytest.mark.slow
def test_a_file_of_85_kb_is_as_large_as_its_numbers(tmp_path):
    # 4.5 % are the header's: names and kinds of layers, and the origin of the file.
    exported = drawn_network(make_model("resnet20", num_classes=10), (32, 32, 3), mixed_bits)
    path = tmp_path / "network.safetensors"
    sizes = writer.save(path, exported)
    kernels = float(costs.model_bytes(exported.table, exported.bits))
    numbers = kernels + bytes_beside_kernels(exported)
    streams = len(exported.table) - 1  # each may be filled up to a whole byte
    assert kernels > 85_000 and kernels <= sizes.integers <= kernels + streams
    assert numbers <= sizes.integers + sizes.floats <= numbers + streams
    assert sizes.file == path.stat().st_size <= 1.045 * numbers


@pytest.mark.slow  # millions of weights
@pytest.mark.parametrize(
    ("name", "norms"),
    [("resnet18", "float32"), ("mobilenet_v2", "float16"), ("efficientnet_lite0", "float16")],
)
def test_large_files_are_as_large_as_the_cost_model_says(tmp_path, name, norms):
    exported = drawn_network(make_model(name, num_classes=1000), (224, 224, 3), mixed_bits)
    sizes = writer.save(tmp_path / "network.safetensors", exported, norms=norms)
    kernels = float(costs.model_bytes(exported.table, exported.bits))
    assert kernels <= sizes.file <= 1.035 * kernels


@pytest.mark.slow
def test_layers_of_learned_bits_keep_their_bits_and_notes(tmp_path):
    # As CSQ learns them: no bits at all; codes of +-(2^8 - 1), which take 9 bits; any in between.
    model = make_model("resnet8", num_classes=10, width=4)
    wanted = {"stage0_block0/conv1": 0, "stage0_block0/conv2": 9, "stage1_block0/conv1": 7}
    exported = drawn_network(
        model,
        (8, 8, 1),
        lambda table: [wanted.get(layer.name, layer.max_bits) for layer in table.layers],
        quantizer=double_rounding.QUANTIZER,
    )
    layouts = {"stage0_block0/conv1": "00000000", "stage1_block0/conv1": "10000010"}
    exported = exported._replace(layouts=layouts)
    path = tmp_path / "network.safetensors"
    writer.save(path, exported)
    layers = {layer.name: layer for layer in reader.read(path).layers}
    assert {name: layers[name].bits for name in wanted} == wanted
    assert {name: layers[name].layout for name in layers if layers[name].layout} == layouts
    for layer in exported_model.quantized_layers(exported):
        assert layer.integers is not None
        np.testing.assert_array_equal(layers[layer.name].integers, layer.integers)
    assert not layers["stage0_block0/conv1"].integers.any()
    assert np.abs(layers["stage0_block0/conv2"].integers).max() == 255


@pytest.mark.slow
def test_a_users_own_model_is_given_to_load(tmp_path):
    model = make_model("resnet8", num_classes=10, width=4)
    exported = drawn_network(model, (8, 8, 1), mixed_bits)
    path = tmp_path / "network.safetensors"
    writer.save(path, exported)
    assert network.load(path).file.provenance["bits"] == "drawn"
    with pytest.raises(ValueError, match=r"call load\(path, model=...\)"):
        network.load(path).at()
    images = some_images(exported)
    check_close(logits_of(path, images, model), training_logits(exported, images))
    other = make_model("resnet8", num_classes=10, width=8)
    with pytest.raises(ValueError, match="these layers differ"):
        logits_of(path, images, other)

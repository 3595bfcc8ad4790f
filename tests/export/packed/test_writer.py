"""Packed files hold the integers bit for bit, in as many bytes as the cost model bills."""

import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from helpers.exported_models import deploy, some_images
from helpers.finished_runs import make_run, some_digits
from helpers.random_variables import drawn_variables

from mpq_jax.export import exported_model as networks
from mpq_jax.export import program
from mpq_jax.export.packed import bn_folding, format, numpy_reader
from mpq_jax.models import make_model
from mpq_jax.program import paths
from mpq_jax.quantizers import double_rounding, lsq
from mpq_jax.supernet import costs, supernet
from mpq_jax.supernet.layer_table import LayerTable, bit_rules, trace_layers

# Folding multiplies and adds float32 numbers in another order, a few roundings in all:
ROUNDING = 1e-5  # part of the largest logit, as long as no input of a layer changes its code


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    workdir = make_run(tmp_path_factory.mktemp("run"), "double_rounding")
    return networks.load(workdir, "uniform:4")


@pytest.fixture(scope="module")
def file(deployed, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "network.safetensors"
    format.save(path, deployed)
    return path


@pytest.fixture(scope="module")
def reference(deployed):
    """Test images, and the logits that training has for them."""
    images, _ = some_digits(deployed)
    return images, np.asarray(jax.jit(lambda x: networks.logits(deployed, x))(images))


def fold_norms(deployed):
    variables = program.flat_variables(networks.selected(deployed))
    return bn_folding.fold(variables, bn_folding.calls_of(deployed))


def logits_of(path, images):
    network = format.load(path)
    return np.asarray(jax.jit(lambda x: format.logits(network, x))(images))


def drawn_network(model, shape, bits_of, *, rows="shared", quantizer=lsq.QUANTIZER):
    """A network of drawn weights with a table of one's own choice, without compiling anything."""
    table = trace_layers(model, shape, rules=bit_rules((8, 6, 5, 4, 3, 2))).with_bn_banks(rows)
    variables = drawn_variables(model, shape, 0)
    layers = [
        layer._replace(weight_candidates=(bits,)) if bits is not None else layer
        for layer, bits in zip(table.layers, bits_of(table), strict=True)
    ]
    table = LayerTable(tuple(layers), rows)
    kernels = [np.asarray(kernel) for kernel in supernet.kernels(table, variables["params"])]
    steps = [  # of which the codes of the layer fill its range
        np.abs(kernel).max() / max(2 ** (layer.max_bits - 1) - 1, 1)
        for layer, kernel in zip(table.layers, kernels, strict=True)
    ]
    weight_step_sizes = np.repeat(np.array(steps, np.float32)[:, None], len(table.candidates), 1)
    trainable = supernet.TrainableParams(
        variables["params"], weight_step_sizes, np.full_like(weight_step_sizes, 0.1)
    )
    made = supernet.SupernetState(
        jax.tree.map(jnp.asarray, trainable),
        variables.get("batch_stats", {}),
        jnp.zeros(len(table), bool),
    )
    provenance = {"model": {"name": None}, "planes": {}, "norms": "drawn", "bits": "drawn"}
    return networks.Deployed(
        model, table, made, table.max_config, quantizer, shape, 10, None, None, provenance
    )


@pytest.mark.parametrize("bits", range(1, 17))
def test_packing_is_dense_and_comes_back(bits):
    generator = np.random.default_rng(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = generator.integers(low, high, (3, 7, 5), endpoint=True)
    codes.flat[:2] = low, high
    words = numpy_reader.pack(codes, bits)
    assert words.dtype == np.uint8 and len(words) == -(-codes.size * bits // 8)
    found = numpy_reader.unpack(words, bits, codes.shape)
    assert found.dtype == (np.int8 if bits <= 8 else np.int16)
    np.testing.assert_array_equal(found, codes)


def test_the_stream_begins_with_the_lowest_bits():
    # 3 bits each: 1 = 001, -1 = 111, 2 = 010, read from the right: 010 111 001, then filled up.
    words = numpy_reader.pack(np.array([1, -1, 2]), 3)
    assert [f"{word:08b}" for word in words] == ["10111001", "00000000"]


def test_a_kernel_of_zeros_takes_nothing():
    assert len(numpy_reader.pack(np.zeros((4, 4), np.int32), 0)) == 0
    found = numpy_reader.unpack(np.zeros(0, np.uint8), 0, (4, 4))
    np.testing.assert_array_equal(found, np.zeros((4, 4), np.int8))


@pytest.mark.parametrize(("code", "bits"), [(4, 3), (-5, 3), (1, 0), (128, 8)])
def test_codes_that_do_not_fit_are_refused(code, bits):
    with pytest.raises(ValueError, match=f"do not fit into {bits} bits"):
        numpy_reader.pack(np.array([0, code]), bits)


def test_codes_come_back_bit_for_bit(deployed, file):
    network = numpy_reader.read(file)
    for layer, wanted in zip(network.layers, networks.codes(deployed), strict=True):
        assert (layer.name, layer.kind) == (wanted.name, wanted.kind)
        assert (layer.bits, layer.input_bits, layer.input_signed, layer.zero_point) == (
            wanted.bits,
            wanted.input_bits,
            wanted.input_signed,
            0,
        )
        assert layer.input_step == (wanted.input_step and float(wanted.input_step))
        assert (layer.codes is None) == (wanted.codes is None)
        if layer.codes is None:
            np.testing.assert_array_equal(network.floats[f"{layer.name}/kernel"], wanted.kernel)
        else:
            np.testing.assert_array_equal(layer.codes, wanted.codes)
            values = layer.codes.astype(np.float32) * np.float32(layer.step)
            np.testing.assert_array_equal(values, wanted.kernel)
    assert network.provenance["bits"] == "uniform:4"
    assert (network.mean, network.std) == (deployed.mean, deployed.std)


def test_logits_are_those_of_training(file, reference):
    images, wanted = reference
    found = logits_of(file, images)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDING * np.abs(wanted).max())


def test_a_file_of_integer_norms_says_what_it_computes(deployed, reference, tmp_path):
    path = tmp_path / "network.safetensors"
    format.save(path, deployed, norms="integer")
    network, layers = numpy_reader.read(path), networks.codes(deployed)
    exact = fold_norms(deployed)
    steps = {layer.name: layer for layer in layers}
    for table_layer in deployed.table.layers:
        if table_layer.norm is None:
            continue
        norm, layer = network.norms[table_layer.norm], steps[table_layer.name]
        assert norm.integers is not None
        by_codes = layer.codes is not None and layer.input_step is not None
        unit = float(layer.step) * float(layer.input_step or 1) if by_codes else 1.0
        assert norm.unit == pytest.approx(unit, rel=1e-12)
        assert [values.dtype for values in norm.integers] == [np.int16, np.int32, np.int8]
        m, o, shift = (values.astype(float) for values in norm.integers)
        half = np.exp2(-(shift + 1))
        multiplier, offset = exact[table_layer.norm]
        assert np.all(np.abs(m * 2 * half - multiplier * unit) <= half)
        assert np.all(np.abs(o * 2 * half - offset) <= half)
        np.testing.assert_allclose(norm.multiplier, m * 2 * half / unit, rtol=1e-6)
    images, wanted = reference
    found = logits_of(path, images)
    # Rounded norms move inputs over the border of a code here and there, so logits differ.
    assert np.mean(found.argmax(-1) == wanted.argmax(-1)) >= 0.9
    with pytest.raises(ValueError, match="norms is 'int'; wanted one of"):
        format.save(path, deployed, norms="int")


def test_norms_of_16_bits_are_rounded_once(deployed, reference, file, tmp_path):
    path = tmp_path / "network.safetensors"
    format.save(path, deployed, norms="half")
    exact, network = fold_norms(deployed), numpy_reader.read(path)
    assert set(network.norms) == set(exact)
    for name, found in network.norms.items():
        for rounded, numbers in zip(found[:2], exact[name], strict=True):
            bound = np.maximum(2.0**-11 * np.abs(numbers), 2.0**-25)
            assert np.all(np.abs(rounded - numbers) <= bound)
    channels = sum(len(multiplier) for multiplier, _ in exact.values())
    saved = file.stat().st_size - path.stat().st_size
    assert abs(saved - 4 * channels) <= 128  # the header says it in other words
    images, wanted = reference
    found = logits_of(path, images)
    assert np.mean(found.argmax(-1) == wanted.argmax(-1)) >= 0.9


@pytest.mark.parametrize("factor", [1e-9, 1e-5, 1.0, 1e5])
def test_norms_of_16_bits_are_as_fine_wherever_their_numbers_lie(deployed, tmp_path, factor):
    params = paths.flatten(deployed.variables.trainable.params)
    for leaf in ("scale", "bias"):
        params[f"stage0_block0/norm1/{leaf}"] *= factor
    trainable = deployed.variables.trainable._replace(params=paths.unflatten(params))
    scaled = deployed._replace(variables=deployed.variables._replace(trainable=trainable))
    path = tmp_path / "network.safetensors"
    format.save(path, scaled, norms="half")
    exact, network = fold_norms(scaled), numpy_reader.read(path)
    for name, found in network.norms.items():
        for rounded, numbers in zip(found[:2], exact[name], strict=True):
            bound = np.maximum(2.0**-11 * np.abs(numbers), 2.0**-39 * np.abs(numbers).max())
            assert np.all(np.abs(rounded - numbers) <= 1.001 * bound)  # float32 itself rounds


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
        x = nn.BatchNorm(use_running_average=True, axis=3, name="folded")(x)
        x = nn.Conv(6, (3, 2), (1, 2), padding="VALID", kernel_dilation=2, name="conv1")(x)
        x = nn.BatchNorm(use_running_average=False, name="batch")(x)
        x = nn.PReLU()(
            nn.Conv(4, (2, 2), padding=[1, (0, 2)], feature_group_count=2, name="conv2")(x)
        )
        x = nn.BatchNorm(use_running_average=True, axis=1, name="rows")(x)
        x = OwnNorm()(TanhNorm(use_running_average=True, name="tanh")(x))
        x = nn.Conv(4, (3, 3), padding="CIRCULAR", name="conv3")(x)
        return nn.Dense(3, name="head")(jnp.mean(x, (1, 2)))


def test_what_cannot_be_folded_is_kept_as_it_is(tmp_path):
    deployed = deploy(Odd(), (11, 9, 2), turned=0.5)
    path = tmp_path / "network.safetensors"
    format.save(path, deployed)
    network = numpy_reader.read(path)
    assert set(network.norms) == {"folded"}
    assert {paths.parent(name) for name in network.stats} == {
        "batch",
        "rows",
        "tanh",
        "OwnNorm_0",
    }
    assert network.floats["PReLU_0/negative_slope"].shape == ()
    assert network.layers[-1].input_dilation == () and network.layers[0].input_dilation == (1, 1)
    found = [(x.strides, x.padding, x.dilation, x.groups) for x in network.layers]
    assert found == [
        ((2, 2), ((1, 1), (1, 1)), (1, 1), 1),
        ((1, 2), ((0, 0), (0, 0)), (2, 2), 1),
        ((1, 1), ((1, 1), (0, 2)), (1, 1), 2),
        ((1, 1), "CIRCULAR", (1, 1), 1),
        ((), (), (), 1),
    ]
    images = some_images(deployed)
    wanted = np.asarray(jax.jit(lambda x: networks.logits(deployed, x))(images))
    ready = format.load(path, model=Odd())
    logits = np.asarray(jax.jit(lambda x: format.logits(ready, x))(images))
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=ROUNDING * np.abs(wanted).max())


def test_a_network_computes_in_the_type_that_it_was_trained_in(tmp_path):
    workdir = make_run(tmp_path / "run", "rfquant", **{"model.dtype": "bfloat16"})
    deployed = networks.load(workdir, "uniform:4")
    path = tmp_path / "network.safetensors"
    format.save(path, deployed)
    assert format.load(path).model == deployed.model
    images, _ = some_digits(deployed)
    wanted = np.asarray(jax.jit(lambda x: networks.logits(deployed, x))(images))
    found = logits_of(path, images)
    assert np.mean(found.argmax(-1) == wanted.argmax(-1)) > 0.9  # norms are rounded once, not twice


READER = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        light = ("mpq_jax", "mpq_jax.export", "mpq_jax.export.safetensors_file",
                 "mpq_jax.export.packed", "mpq_jax.export.packed.numpy_reader")
        if top == "mpq_jax" and name not in light or top in (
            "jax", "jaxlib", "flax", "jaxtyping", "optax", "onnx", "scipy", "ml_dtypes"
        ):
            raise ImportError(f"{name} is not to be imported")
sys.meta_path.insert(0, Refuse())
from mpq_jax.export.packed import numpy_reader as packed_numpy
import numpy
network = packed_numpy.read(sys.argv[1])
held = {f"codes/{x.name}": x.codes for x in network.layers if x.codes is not None}
held |= {f"step/{x.name}": numpy.float32(x.step) for x in network.layers}
held |= {f"norm/{name}": norm.multiplier for name, norm in network.norms.items()}
numpy.savez(sys.argv[2], **held)
"""


def test_numpy_and_safetensors_are_enough_to_read(deployed, file, tmp_path):
    out = tmp_path / "read.npz"
    root = pathlib.Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", READER, file, out], check=True, cwd=root, timeout=120)
    with np.load(out) as found:
        layers = networks.codes(deployed)
        for layer in layers:
            assert found[f"step/{layer.name}"] == layer.step
            if layer.codes is not None:
                np.testing.assert_array_equal(found[f"codes/{layer.name}"], layer.codes)
        for name, (multiplier, _) in fold_norms(deployed).items():
            np.testing.assert_array_equal(found[f"norm/{name}"], multiplier.astype(np.float32))
        assert len(found) == len(layers) + sum(x.codes is not None for x in layers) + len(
            fold_norms(deployed)
        )


def bytes_beside_kernels(deployed):
    """Bytes of numbers that the cost model leaves out: norms, biases and step sizes."""
    folded = fold_norms(deployed)
    norms = sum(len(multiplier) for multiplier, _ in folded.values())
    params = paths.flatten(deployed.variables.trainable.params)
    biases = sum(
        leaf.size
        for name, leaf in params.items()
        if not name.endswith("kernel") and paths.parent(name) not in folded
    )
    return 8 * norms + 4 * biases + 8 * len(deployed.table)


def mixed_bits(table):
    return [
        None if layer.max_bits == 8 and not layer.searchable else 2 + index % 7
        for index, layer in enumerate(table.layers)
    ]


def test_a_file_of_85_kb_is_as_large_as_its_numbers(tmp_path):
    # 3 % are the header's: names and kinds of layers, and where the file comes from.
    deployed = drawn_network(make_model("resnet20", num_classes=10), (32, 32, 3), mixed_bits)
    path = tmp_path / "network.safetensors"
    format.save(path, deployed)
    kernels = float(costs.model_bytes(deployed.table, deployed.bits))
    numbers = kernels + bytes_beside_kernels(deployed)
    size = path.stat().st_size
    assert kernels > 85_000 and numbers <= size <= 1.03 * numbers


@pytest.mark.slow  # millions of weights
@pytest.mark.parametrize(
    ("name", "norms"),
    [("resnet18", "float"), ("mobilenet_v2", "half"), ("efficientnet_lite0", "half")],
)
def test_large_files_are_as_large_as_the_cost_model_says(tmp_path, name, norms):
    deployed = drawn_network(make_model(name, num_classes=1000), (224, 224, 3), mixed_bits)
    path = tmp_path / "network.safetensors"
    format.save(path, deployed, norms=norms)
    kernels = float(costs.model_bytes(deployed.table, deployed.bits))
    assert kernels <= path.stat().st_size <= 1.03 * kernels


def test_layers_of_bit_planes_keep_their_bits_and_planes(tmp_path):
    # As CSQ finds them: no plane at all, eight planes and the sign, planes that lie apart.
    model = make_model("resnet8", num_classes=10, width=4)
    wanted = {"stage0_block0/conv1": 0, "stage0_block0/conv2": 9, "stage1_block0/conv1": 7}
    deployed = drawn_network(
        model,
        (8, 8, 1),
        lambda table: [wanted.get(layer.name, layer.max_bits) for layer in table.layers],
        quantizer=double_rounding.QUANTIZER,
    )
    planes = {"stage0_block0/conv1": "00000000", "stage1_block0/conv1": "10000010"}
    deployed = deployed._replace(provenance=deployed.provenance | {"planes": planes})
    path = tmp_path / "network.safetensors"
    format.save(path, deployed)
    layers = {layer.name: layer for layer in numpy_reader.read(path).layers}
    assert {name: layers[name].bits for name in wanted} == wanted
    assert {name: layers[name].planes for name in layers if layers[name].planes} == planes
    for layer in networks.codes(deployed):
        assert layer.codes is not None
        np.testing.assert_array_equal(layers[layer.name].codes, layer.codes)
    assert not layers["stage0_block0/conv1"].codes.any()
    assert np.abs(layers["stage0_block0/conv2"].codes).max() > 127


def test_damage_is_found(file, tmp_path):
    content = bytearray(file.read_bytes())
    path = tmp_path / "network.safetensors"
    for place in (len(content) // 2, len(content) - 1):
        damaged = content.copy()
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged: its checksum is wrong"):
            format.load(path)
    path.write_bytes(content[:-7])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        format.load(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        format.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "2"}, "version 2 of the format, this library reads version 1"),
        ({"format": "mpq_jax.integers"}, "another kind of file"),
    ],
)
def test_other_versions_and_kinds_are_refused(file, tmp_path, change, message):
    with safetensors.safe_open(file, framework="numpy") as held:
        metadata = held.metadata()
    path = tmp_path / "network.safetensors"
    safetensors.numpy.save_file(safetensors.numpy.load_file(file), path, metadata=metadata | change)
    with pytest.raises(ValueError, match=message):
        format.load(path)


def test_a_model_of_ones_own_is_given_to_load(tmp_path):
    model = make_model("resnet8", num_classes=10, width=4)
    deployed = drawn_network(model, (8, 8, 1), mixed_bits)
    path = tmp_path / "network.safetensors"
    format.save(path, deployed)
    with pytest.raises(ValueError, match=r"call load\(path, model=...\)"):
        format.load(path)
    assert format.load(path, model=model).network.provenance["bits"] == "drawn"
    for named in ("mine", {"name": "resnet8"}):
        format.save(path, deployed._replace(provenance={"model": named}))
        with pytest.raises(ValueError, match=r"call load\(path, model=...\)"):
            format.load(path)
    with pytest.raises(ValueError, match="these layers differ"):
        format.load(path, model=make_model("resnet8", num_classes=10, width=8))

"""Files and networks that cannot be read or stored as integers."""

import math
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers.packed_networks import (
    ENDS_FLOAT,
    IMAGES,
    SHAPE,
    Net,
    draw_network,
    make_plain_net,
    refused,
    rewritten,
)

from mpq_jax.export.packed import integers
from mpq_jax.models import make_model
from mpq_jax.quantizers import double_rounding, lsq
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import (
    trace_layers,
)


@pytest.fixture(scope="module")
def plain_net(tmp_path_factory):
    return make_plain_net(tmp_path_factory)


def test_a_rewritten_file_is_sound(plain_net, tmp_path):
    path = rewritten(plain_net.path, tmp_path / "copy")
    artifact = integers.load(path, model=plain_net.model)
    np.testing.assert_array_equal(artifact.at(4)(IMAGES), plain_net.artifact.at(4)(IMAGES))


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

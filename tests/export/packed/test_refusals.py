"""Packed files that cannot be read, and networks that cannot be packed."""

import math
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers.packed_networks import IMAGES, make_plain_net, refused, rewritten

from mpq_jax.export.exported_model import is_switchable
from mpq_jax.export.packed import network, writer
from mpq_jax.quantizers import batch_max, double_rounding, lsq
from mpq_jax.quantizers.base import Quantizer
from mpq_jax.supernet.supernet import Supernet


@pytest.fixture(scope="module")
def plain_net(tmp_path_factory):
    return make_plain_net(tmp_path_factory)


def test_a_rewritten_file_is_sound(plain_net, tmp_path):
    path = rewritten(plain_net.path, tmp_path / "copy")
    packed = network.load(path, model=plain_net.net.model)
    np.testing.assert_array_equal(packed.at(4)(IMAGES), plain_net.packed.at(4)(IMAGES))


def test_truncated_files_are_refused(plain_net, tmp_path):
    content, path = plain_net.path.read_bytes(), tmp_path / "cut"
    body = 8 + int.from_bytes(content[:8], "little")
    for length in (0, 1, 7, 8, 100, body // 2, body - 1, body, body + 1, len(content) - 1):
        path.write_bytes(content[:length])
        refused(path, "no whole safetensors file .*It may have been cut off")


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
        refused(path, message, plain_net.net.model)


def test_files_of_another_kind_are_refused(tmp_path):
    text, foreign = tmp_path / "text", tmp_path / "foreign"
    text.write_text("weights of a network\n" * 10)
    refused(text, "no whole safetensors file")
    tensors = {"kernel": np.zeros((3, 3), np.float32)}
    for metadata, held in ((None, "another kind of file"), ({"format": "pt"}, "of format pt")):
        safetensors.numpy.save_file(tensors, foreign, metadata=metadata)
        refused(foreign, f"is {held}; this library reads mpq_jax.packed, version 2")


@pytest.mark.parametrize(
    "metadata",
    [
        {"format": "mpq_jax.integers", "version": "1"},
        {"format": "mpq_jax.packed", "version": "1"},
        {"version": "3"},
        {"version": "20"},
        {"version": ""},
    ],
)
def test_other_versions_are_refused_with_the_way_to_write_this_one(plain_net, tmp_path, metadata):
    path = rewritten(plain_net.path, tmp_path / "other", metadata=metadata)
    held = ", version ".join(({"format": "mpq_jax.packed"} | metadata).values())
    message = f"is of format {held}; this library reads mpq_jax.packed, version 2. Write the file"
    refused(path, message + " anew by `mpq export --workdir=RUN .*--format=packed .*newer mpq_jax")


def test_a_missing_file_is_no_damaged_one(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            network.load(path)


STREAM = np.zeros(4000, np.uint8)  # the layers have 3 * 3 * 8 * 16 + 16 * 16 + 16 * 16 weights
FLOATS = np.ones(99, np.float32)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"integers": None}, "integers"),
        ({"integers": STREAM}, "layers take 1664 bytes of integers, and there are 4000"),
        ({"integers": STREAM[:1663]}, "256 integers of 8 bits take 256 bytes, not 255"),
        ({"momentum": FLOATS}, r"tensors \['momentum'\] are unknown"),
        ({"step_sizes": None}, "step_sizes"),
        ({"step_sizes": FLOATS[:4]}, r"step sizes have shape \(4,\); wanted \(5,\)"),
        ({"input_step_sizes": FLOATS[:11]}, r"step sizes have shape \(11,\); wanted \(12,\)"),
        ({"norms/mean": None}, r"norms have \['bias', 'scale', 'var'\]; wanted"),
        ({"norms/mean": FLOATS}, r"norms/mean has shape \(99,\); wanted \(136,\)"),
        ({"params/head/kernel": None}, "layer 'head' has nothing as its float kernel"),
        ({"params/head/kernel": FLOATS}, r"has shape \(99,\) as .*; wanted shape \(16, 3\)"),
    ],
)
def test_tensors_that_are_not_those_of_the_header_are_refused(plain_net, tmp_path, changes, match):
    path = rewritten(plain_net.path, tmp_path / "changed", **changes)
    refused(path, f"does not hold what its header says: .*{match}", plain_net.net.model)


@pytest.mark.parametrize(
    "quantizer",
    [
        double_rounding.UNSHARED,
        double_rounding.FLOORED,
        lsq.QUANTIZER,
        Quantizer(double_rounding.QUANTIZER.weights, batch_max.ACTS),
    ],
)
def test_networks_that_need_their_float_weights_are_not_packed_as_a_whole(
    plain_net, tmp_path, quantizer
):
    net = Supernet(plain_net.net.model, plain_net.table, quantizer=quantizer)
    assert not is_switchable(net)
    with pytest.raises(ValueError, match="only Double Rounding with shared step sizes and round"):
        writer.save(tmp_path / "refused", plain_net.exported._replace(net=net))
    assert not list(tmp_path.iterdir())


def test_an_interrupted_save_leaves_the_older_file(plain_net, tmp_path, monkeypatch):
    path = tmp_path / "kept"
    path.write_bytes(plain_net.path.read_bytes())
    write = pathlib.Path.write_bytes

    def fail_half_way(file, content):
        write(file, content[: len(content) // 2])
        raise OSError("no space left on device")

    state = plain_net.state._replace(signed=~plain_net.state.signed)
    other = plain_net.exported._replace(state=state)
    monkeypatch.setattr(pathlib.Path, "write_bytes", fail_half_way)
    with pytest.raises(OSError, match="no space left"):
        writer.save(path, other)
    assert path.read_bytes() == plain_net.path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
    monkeypatch.undo()
    writer.save(path, other)
    packed = network.load(path, model=plain_net.net.model)
    np.testing.assert_array_equal(packed.state.signed, state.signed)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]


def test_provenance_that_is_no_json_is_refused_before_anything_is_written(plain_net, tmp_path):
    exported = plain_net.exported._replace(provenance={"rate": np.float32(math.pi)})
    with pytest.raises(TypeError, match="JSON"):
        writer.save(tmp_path / "new", exported)
    wide = jnp.full_like(plain_net.table.max_config.acts, 32)
    exported = plain_net.exported._replace(bits=plain_net.table.max_config._replace(acts=wide))
    with pytest.raises(ValueError, match="input of 'wide' has 32 bits, clipped but not rounded"):
        writer.save(tmp_path / "new", exported)
    with pytest.raises(ValueError, match=r"norms is 'int'; wanted one of \('float32', 'float16'"):
        writer.save(tmp_path / "new", plain_net.exported, norms="int")
    assert not list(tmp_path.iterdir())

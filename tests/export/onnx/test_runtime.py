"""ONNX files as they are opened: arrays of any library, and files that are none."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from helpers.exported_models import make_exported

from mpq_jax.export.onnx import converter, runtime

SHAPE = (6, 6, 3)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def exported():
    return make_exported(Net(), SHAPE)


@pytest.fixture(scope="module")
def path(exported, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    runtime.write(path, exported)
    return path


def test_arrays_of_jax_and_of_float64_are_taken_like_float32(path):
    call = runtime.open_file(path)
    images = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)
    wanted = call(images)
    assert wanted.shape == (3, 10) and np.ptp(wanted) > 0
    for others in (jnp.asarray(images), images.astype(np.float64)):
        np.testing.assert_array_equal(call(others), wanted)


@pytest.mark.parametrize(
    ("images", "given"),
    [
        (np.zeros((2, *SHAPE), np.uint8), r"uint8 \[2, 6, 6, 3\]"),
        (np.zeros(SHAPE, np.float32), r"float32 \[6, 6, 3\]"),
        (np.zeros((2, 5, 6, 3), np.float32), r"float32 \[2, 5, 6, 3\]"),
        (jnp.zeros((2, *SHAPE), jnp.int32), r"int32 \[2, 6, 6, 3\]"),
    ],
)
def test_other_arrays_are_refused_with_what_the_network_takes(path, images, given):
    with pytest.raises(ValueError, match=rf"images is {given}; the network takes float32 \[any, 6"):
        runtime.open_file(path)(images)


def test_files_that_are_no_graph_are_refused_in_one_line(path, tmp_path):
    content, other = path.read_bytes(), tmp_path / "other.onnx"
    for text in (b"", b"weights of a network\n" * 10, content[:100], content[:-20]):
        other.write_bytes(text)
        for read in (runtime.open_file, runtime.bits_of):
            with pytest.raises(ValueError, match=r"other\.onnx is ") as caught:
                read(other)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fact", ["provenance", "bits"])
def test_a_graph_without_the_facts_of_a_network_is_refused(path, tmp_path, fact):
    model = onnx.load(path)
    facts = {one.key: one.value for one in model.metadata_props if one.key != fact}
    facts[runtime.CHECKSUM] = runtime.checksum.PLACEHOLDER
    onnx.helper.set_model_props(model, facts)
    other = tmp_path / "other.onnx"
    other.write_bytes(runtime.checksum.with_checksum(model.SerializeToString()))
    with pytest.raises(ValueError, match=f"lacks the facts of a network of mpq_jax: '{fact}'"):
        runtime.bits_of(other)


def test_graphs_that_no_file_can_hold_are_refused(exported, monkeypatch):
    monkeypatch.setattr(converter, "MAX_BYTES", 100)
    with pytest.raises(converter.Unsupported, match="bytes, and an ONNX file holds 100 at most"):
        converter.to_onnx(exported)

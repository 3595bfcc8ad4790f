"""StableHLO programs run without the library, and their kernels are integers in the file."""

import dataclasses
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.exported_models import make_exported, some_images

from mpq_jax.export import checksum
from mpq_jax.export import exported_model as networks
from mpq_jax.export.stablehlo import facts_of, to_stablehlo
from mpq_jax.models import make_model
from mpq_jax.models.vit import ViT
from mpq_jax.quantizers import batch_max, lsq

# XLA may sum in another order in another program; no input of a layer changes its code by that.
ROUNDING = 1e-5
READER = """
import sys
import jax.export, numpy as np
network = jax.export.deserialize(open(sys.argv[1], "rb").read())
np.save(sys.argv[3], network.call(np.load(sys.argv[2])))
assert not any(name.startswith(("mpq_jax", "flax")) for name in sys.modules)
"""


@pytest.fixture(scope="module")
def exported():
    return make_exported(make_model("resnet8", num_classes=10, width=4, shortcut="B"), (8, 8, 3))


@pytest.fixture(scope="module")
def written(exported):
    return to_stablehlo(exported)


def logits_of(exported, images):
    return np.asarray(jax.jit(lambda x: networks.logits(exported, x))(images))


def with_model(exported, model):
    return exported._replace(net=dataclasses.replace(exported.net, model=model))


def check_equal(found, wanted):
    assert np.ptp(wanted) > 0.1, "the network says nothing"
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDING * np.abs(wanted).max())


@pytest.mark.slow
def test_another_process_gets_the_same(exported, written, tmp_path):
    images = some_images(exported)
    np.save(tmp_path / "images.npy", images)
    (tmp_path / "net.stablehlo").write_bytes(written)
    files = [str(tmp_path / name) for name in ("net.stablehlo", "images.npy", "logits.npy")]
    subprocess.run([sys.executable, "-c", READER, *files], check=True, cwd=tmp_path)
    check_equal(np.load(files[2]), logits_of(exported, images))


def test_no_folder_of_the_writing_machine_is_in_the_file(written):
    for folder in (pathlib.Path(__file__).parents[2], sys.prefix):
        assert str(folder).encode() not in written


def test_other_versions_are_refused(written, tmp_path):
    path = tmp_path / "net.stablehlo"
    changed = written.replace(b'"version": 1', b'"version": 2')
    begin = changed.index(b"mpq_jax crc32 ")
    opened = changed[: begin + 14] + b"0" * 8 + changed[begin + 22 :]
    with pytest.raises(ValueError, match="has version 2 of the format; this library reads version"):
        facts_of(path, checksum.with_checksum(opened))
    assert facts_of(path, written)["provenance"] == {"class": "ResNetCifar"}


def test_any_batch(exported, written):
    network = jax.export.deserialize(bytearray(written))
    images = some_images(exported)[:3]
    check_equal(np.asarray(network.call(images)), logits_of(exported, images))


def test_constants_are_integers(exported, written):
    network = jax.export.deserialize(bytearray(written))
    assert network.platforms == ("cpu", "cuda", "tpu")
    lines = [line for line in network.mlir_module().splitlines() if "stablehlo.constant" in line]
    types = [line.rpartition("tensor<")[2].rstrip("> ").split("loc")[0] for line in lines]
    shapes = [text.split(">")[0] for text in types]
    for layer in networks.quantized_layers(exported):
        shape, stored = "x".join(map(str, layer.integers.shape)), 4 if layer.bits <= 4 else 8
        assert f"{shape}xi{stored}" in shapes
        assert f"{shape}xf32" not in shapes


@pytest.mark.slow
def test_models_that_ask_for_the_number_of_images():
    exported = make_exported(ViT(10, patch_size=4, dim=8, depth=1, heads=2), (8, 8, 2))
    network = jax.export.deserialize(bytearray(to_stablehlo(exported, platforms=["cpu"])))
    images = some_images(exported)
    check_equal(np.asarray(network.call(images)), logits_of(exported, images))
    assert network.platforms == ("cpu",)


class Silent(nn.Module):
    """Asks for the number of images, and says nothing, or that a class cannot be."""

    @nn.compact
    def __call__(self, x):
        logits = nn.Dense(3, name="dense")(x.reshape((len(x), 48)))
        return jnp.concatenate([0 * logits, jnp.full_like(logits[:, :1], -jnp.inf)], 1)


def test_logits_of_zero_and_infinity_are_equal_to_themselves():
    exported = make_exported(Silent(), (4, 4, 3))
    network = jax.export.deserialize(bytearray(to_stablehlo(exported)))
    images = some_images(exported)
    np.testing.assert_array_equal(network.call(images), logits_of(exported, images))


class Mixing(nn.Module):
    """Logits of an image depend on the others."""

    counted: bool

    @nn.compact
    def __call__(self, x):
        x = x.reshape((len(x) if self.counted else -1, 48))
        return nn.Dense(3, name="dense")(x - jnp.mean(x, 0, keepdims=True))


def test_images_that_are_computed_together_stay_so_or_are_refused():
    exported = make_exported(Mixing(counted=False), (4, 4, 3))
    network = jax.export.deserialize(bytearray(to_stablehlo(exported)))
    images = some_images(exported)
    check_equal(np.asarray(network.call(images)), logits_of(exported, images))
    with pytest.raises(ValueError, match="computes with several examples at once"):
        to_stablehlo(with_model(exported, Mixing(counted=True)))


def test_errors_of_the_model_come_through():
    class Choosing(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(3, name="dense")(x.reshape(x.shape[0], -1))
            return y if jnp.sum(y) > 0 else -y

    class Chosen(Choosing):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="dense")(x.reshape(x.shape[0], -1))

    exported = with_model(make_exported(Chosen(), (4, 4, 3)), Choosing())
    with pytest.raises(jax.errors.TracerBoolConversionError):
        to_stablehlo(exported)


def test_inputs_without_step_sizes_are_refused(exported):
    quantizer = lsq.QUANTIZER._replace(acts=batch_max.ACTS)
    net = dataclasses.replace(exported.net, quantizer=quantizer)
    with pytest.raises(ValueError, match="no step sizes"):
        to_stablehlo(exported._replace(net=net))

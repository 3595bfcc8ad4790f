"""Networks of other libraries, computed kernels, loops and norms anywhere, in all formats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.exported_models import make_exported, some_images
from helpers.onnx_runtime import logits_of, run
from helpers.other_networks import NETWORKS

from mpq_jax.export import exported_model
from mpq_jax.export.onnx.converter import to_onnx
from mpq_jax.export.packed import network, reader, writer
from mpq_jax.export.stablehlo import to_stablehlo
from mpq_jax.supernet.rules import Rule

ROUNDING = 1e-5  # part of the largest logit
FOLDED = {
    "nnx": {"first", "norm"},
    "computed kernel": set(),
    "loop": set(),
    "computed in a loop": set(),
    "pre-activation": {"input_norm", "norm0", "norm1", "last_norm"},
    "function": {"norm"},
    "embedding": set(),
}
REFUSED = {
    "computed in a loop": "layer 'blocks/dense' is inside a loop",
    "loop": r"layer 'blocks/dense\[0\]' is inside a loop \(scan\) of 3 turns, which",
    "embedding": "reads int32, as lookups do",
}

pytestmark = pytest.mark.usefixtures("lenient")


def made(name, **options):
    make, shape = NETWORKS[name]
    exported = make_exported(make(), shape, **options)
    return exported, some_images(exported)


def check_equal(found, wanted):
    assert np.ptp(wanted) > 0.1, "the network says nothing"
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDING * np.abs(wanted).max())


@pytest.mark.slow
@pytest.mark.parametrize("norms", ["float32", "kept"])
@pytest.mark.parametrize("name", NETWORKS)
def test_packed_files_are_the_network(name, norms, tmp_path):
    exported, images = made(name)
    path = tmp_path / "network.safetensors"
    writer.save(path, exported, norms=norms)
    file = reader.read(path)
    assert set(file.norms) == (FOLDED[name] if norms == "float32" else set())
    assert not any(layer.integers is None for layer in file.layers)
    packed = network.load(path, model=exported.net.model)
    assert packed.table.layers == exported.table.layers
    check_equal(packed.at()(images), logits_of(exported, images))
    given, trained = packed.switch(), exported_model.select(exported)
    for kernels in zip(packed.net.kernels_of(given), exported.net.kernels_of(trained), strict=True):
        np.testing.assert_array_equal(*kernels)


def test_what_makes_a_computed_kernel_is_not_in_the_file(tmp_path):
    exported, _ = made("computed kernel")
    path = tmp_path / "network.safetensors"
    writer.save(path, exported)
    assert set(reader.read(path).params) == {
        f"{layer}/bias" for layer in ("first", "normalized", "again", "head")
    }


def test_kernels_computed_in_a_loop_have_an_axis_for_its_turns(tmp_path):
    exported, _ = made("computed in a loop")
    path = tmp_path / "network.safetensors"
    writer.save(path, exported)
    shapes = {x.name: (x.kernel_shape, x.integers.shape) for x in reader.read(path).layers}
    assert shapes["blocks/dense"] == ((8, 8), (3, 8, 8))
    assert shapes["head"] == ((8, 10), (8, 10))


@pytest.mark.slow_but_first
@pytest.mark.parametrize("name", ["computed kernel", "loop", "computed in a loop"])
def test_float_layers_beside_quantized_ones(name, tmp_path):
    rules = (
        Rule(r"normalized|dense(\[\d\])?$", weights=32, float_weights=True, acts=8),
        Rule("first", weights=4, acts=8),
        Rule(weights=8, acts=8),
    )
    exported, images = made(name, rules=rules)
    path = tmp_path / "network.safetensors"
    writer.save(path, exported)
    found = network.load(path, model=exported.net.model).at()(images)
    check_equal(found, logits_of(exported, images))


@pytest.mark.slow_but_first
@pytest.mark.parametrize("name", ["computed kernel", "computed in a loop", "pre-activation"])
def test_files_that_lack_variables_cannot_be_recalibrated(name, tmp_path):
    exported, images = made(name)
    path = tmp_path / "network.safetensors"
    writer.save(path, exported, norms="float32" if name == "pre-activation" else "kept")
    packed = network.load(path, model=exported.net.model)
    bits = packed.table.max_config
    message = r"the file lacks (params|batch_stats)/.*: of folded norms and computed kernels"
    with pytest.raises(ValueError, match=message):
        packed.net.recalibrate(packed.state, bits, jnp.asarray(images)[None])
    with pytest.raises(ValueError, match=message):
        packed.net.predict(packed.state, bits, images)


@pytest.mark.slow_but_first
@pytest.mark.parametrize("name", NETWORKS)
def test_stablehlo_is_the_network(name):
    exported, images = made(name)
    program = jax.export.deserialize(bytearray(to_stablehlo(exported)))
    check_equal(np.asarray(program.call(images)), logits_of(exported, images))


@pytest.mark.slow_but_first
@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_is_the_network_or_refused(name):
    exported, images = made(name)
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            to_onnx(exported)
        return
    model = to_onnx(exported)
    check_equal(run(model, images), logits_of(exported, images))
    stored = {tensor.name for tensor in model.graph.initializer}
    assert {f"{layer.name}/integers" for layer in exported.table.layers} <= stored

"""What files of integers say of themselves, and where a network of integers may go."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.packed_networks import (
    ENDS_FLOAT,
    IMAGES,
    LOGITS,
    draw_network,
    make_plain_net,
    parse,
    trained_logits,
)

from mpq_jax.export.packed import integers
from mpq_jax.models import make_model
from mpq_jax.quantizers import double_rounding
from mpq_jax.supernet.bn_recalibration import recalibrate
from mpq_jax.supernet.layer_table import (
    FIRST_LAST_8BIT,
    FIRST_LAST_FLOAT,
    bit_rules,
    trace_layers,
)
from mpq_jax.supernet.scoring import make_score


@pytest.fixture(scope="module")
def plain_net(tmp_path_factory):
    return make_plain_net(tmp_path_factory)


MARGIN = 0.03  # of the file over 8 bits per weight and the float parts


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

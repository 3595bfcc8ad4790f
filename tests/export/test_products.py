"""Products of activations in files: both operands are quantized as the network in memory does."""

import jax
import numpy as np
import pytest
from helpers.attention import SHAPE as TINY_SHAPE
from helpers.attention import Scanned
from helpers.attention_files import FIXED, MODEL, SHAPE, check_close, drawn_images, make_exported

from mpq_jax.export.packed import network, reader, writer
from mpq_jax.export.stablehlo import to_stablehlo
from mpq_jax.quantizers import double_rounding
from mpq_jax.supernet import costs
from mpq_jax.supernet.rules import Rule, bit_rules

SCORES, MIX = "block0/product", "block0/product#2"


@pytest.fixture(scope="module")
def exported():
    return make_exported(MODEL, SHAPE, FIXED)


@pytest.fixture(scope="module")
def wanted(exported):
    logits = exported.net.predict(exported.state, exported.bits, drawn_images(SHAPE))
    assert np.ptp(logits) > 0.1, "the network says nothing"
    return np.asarray(logits)


@pytest.fixture(scope="module")
def path(exported, tmp_path_factory):
    file = tmp_path_factory.mktemp("packed") / "network.safetensors"
    writer.save(file, exported)
    return file


# One configuration.


@pytest.mark.slow
def test_packed_files_are_the_network(exported, path, wanted):
    packed = network.load(path, model=MODEL)
    np.testing.assert_array_equal(packed.at()(drawn_images(SHAPE)), wanted)
    assert packed.table.layers == exported.table.layers
    found = packed.net.predict(packed.state, packed.table.max_config, drawn_images(SHAPE))
    np.testing.assert_array_equal(found, wanted)


def test_a_loaded_network_costs_what_it_costs_in_memory(exported, path):
    packed = network.load(path, model=MODEL)
    for kind in ("bitops", "bytes", "act_bytes"):
        found, wanted = (
            costs.COSTS[kind](table, exported.bits) for table in (packed.table, exported.table)
        )
        assert found == wanted


def test_the_file_lists_both_operands(exported, path):
    layers = {layer.name: layer for layer in reader.read(path).layers}
    for name, weights, acts in ((SCORES, 4, 8), (MIX, 8, 3)):
        layer, index = layers[name], exported.table.names.index(name)
        assert (layer.kind, layer.kernel_shape, layer.integers) == ("product", (), None)
        assert (layer.bits, layer.input_bits) == (weights, acts)
        column = exported.table.candidates.index
        held = exported.state.trainable
        second, first = (
            float(steps[index, column(bits)])
            for steps, bits in ((held.weight_step_sizes, weights), (held.act_step_sizes, acts))
        )
        assert (layer.step_size, layer.input_step_size) == (second, first)
        assert (layer.second_step_sizes, layer.input_step_sizes) == (
            {weights: second},
            {acts: first},
        )
    assert (layers[SCORES].input_signed, layers[MIX].input_signed) == (True, False)
    assert all(not one.second_step_sizes for one in layers.values() if one.kind != "product")


def test_stablehlo_is_the_network(exported, wanted):
    program = jax.export.deserialize(bytearray(to_stablehlo(exported)))
    check_close(np.asarray(program.call(drawn_images(SHAPE))), wanted)


# Several precisions.


@pytest.mark.slow
def test_a_switchable_file_has_the_step_sizes_of_all_precisions(tmp_path):
    rules = (Rule(kind="product", weights=(8, 4, 2)), *bit_rules((8, 4, 2)))
    exported = make_exported(MODEL, SHAPE, rules, quantizer=double_rounding.QUANTIZER, kept=True)
    path, images = tmp_path / "network.safetensors", drawn_images(SHAPE)
    writer.save(path, exported, norms="kept")
    packed, table = network.load(path, model=MODEL), exported.table
    assert packed.precisions == (8, 4, 2)
    outputs = {}
    for bits in (8, 4, 2):
        config = table.uniform(bits, bits)
        wanted = exported.net.predict(exported.state, config, images)
        outputs[bits] = np.asarray(packed.at(bits)(images))
        np.testing.assert_array_equal(outputs[bits], wanted)
        np.testing.assert_array_equal(packed.net.predict(packed.state, config, images), wanted)
    assert np.abs(outputs[8] - outputs[4]).max() > 1e-3 < np.abs(outputs[4] - outputs[2]).max()

    mixed = table.uniform(8, 8)
    place = table.names.index(MIX)
    mixed = mixed._replace(weights=mixed.weights.at[place].set(2))
    wanted = exported.net.predict(exported.state, mixed, images)
    np.testing.assert_array_equal(packed.at(mixed)(images), wanted)
    assert np.abs(outputs[8] - wanted).max() > 1e-4

    layer = next(one for one in reader.read(path).layers if one.name == MIX)
    held = exported.state.trainable
    assert layer.second_step_sizes == {
        bits: float(held.weight_step_sizes[place, table.candidates.index(bits)])
        for bits in (8, 4, 2)
    }
    at = layer.at(4, 2)
    assert (at.step_size, at.input_step_size) == (
        layer.second_step_sizes[4],
        layer.input_step_sizes[2],
    )
    with pytest.raises(ValueError, match="'block0/product#2' has no 3 bits"):
        layer.at(3, 2)


# Loops.


@pytest.mark.slow
def test_products_in_loops_are_the_network(tmp_path):
    rules = (Rule(kind="product", weights=4, acts=8), Rule(weights=8, acts=8))
    exported = make_exported(Scanned(), TINY_SHAPE, rules)
    images = drawn_images(TINY_SHAPE)
    wanted = np.asarray(exported.net.predict(exported.state, exported.bits, images))
    path = tmp_path / "network.safetensors"
    writer.save(path, exported)
    np.testing.assert_array_equal(network.load(path, model=Scanned()).at()(images), wanted)
    program = jax.export.deserialize(bytearray(to_stablehlo(exported)))
    check_close(np.asarray(program.call(images)), wanted)

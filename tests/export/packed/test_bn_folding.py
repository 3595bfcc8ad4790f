"""Norms folded into a multiplication and an addition, and how closely files keep them."""

import numpy as np
from helpers.exported_models import deploy

from mpq_jax.export import exported_model as networks
from mpq_jax.export import program
from mpq_jax.export.packed import bn_folding
from mpq_jax.export.packed.integers import NORM_LEAVES, leaf_of
from mpq_jax.models import make_model
from mpq_jax.program import paths


def fold(deployed):
    variables = program.flat_variables(networks.selected(deployed))
    return bn_folding.fold(variables, bn_folding.calls_of(deployed))


def test_a_folded_norm_is_the_norm():
    deployed = deploy(make_model("resnet8", num_classes=10, width=4), (8, 8, 3), turned=0.5)
    chosen = networks.selected(deployed)
    leaves = paths.flatten({"params": chosen.params, "batch_stats": chosen.batch_stats})
    norms = fold(deployed)
    assert set(norms) == {layer.norm for layer in deployed.table.layers if layer.norm}
    for name, (multiplier, offset) in norms.items():
        scale, bias, mean, variance = (
            np.asarray(leaves[leaf_of(name, leaf)], np.float64) for leaf in NORM_LEAVES
        )
        x = np.linspace(-3, 3, 7)[:, None]
        wanted = (x - mean) / np.sqrt(variance + 1e-5) * scale + bias  # Flax's default epsilon
        np.testing.assert_allclose(x * multiplier + offset, wanted, rtol=1e-9, atol=1e-9)


def test_integer_norms_are_within_their_bound():
    generator = np.random.default_rng(0)
    multiplier = np.concatenate(
        [
            generator.normal(size=200) * 10.0 ** generator.uniform(-9, 4, 200),
            [0.0, 0.0, 1.0, -2.0, 1e-30],
        ]
    )
    offset = np.concatenate(
        [
            generator.normal(size=200) * 10.0 ** generator.uniform(-6, 4, 200),
            [0.0, 3.5, 0.0, 1e-20, -7.0],
        ]
    )
    m, o, shift = bn_folding.to_integers(multiplier, offset)
    assert (m.dtype, o.dtype, shift.dtype) == (np.int16, np.int32, np.int8)
    half = np.exp2(-(shift.astype(float) + 1))
    assert np.all(np.abs(np.ldexp(m.astype(float), -shift.astype(int)) - multiplier) <= half)
    assert np.all(np.abs(np.ldexp(o.astype(float), -shift.astype(int)) - offset) <= half)
    # One more bit of shift would be too much for one of the two: nothing is given away.
    full = (np.abs(m.astype(int)) >= 2**14 - 1) | (np.abs(o.astype(int)) >= 2**30 - 1)
    assert np.all(full | (shift == 127))
    sums = generator.integers(-(2**20), 2**20, (50, 1))
    found = (sums * m.astype(float) + o) / np.exp2(shift.astype(float))
    assert np.all(np.abs(found - (sums * multiplier + offset)) <= (np.abs(sums) + 1) * half)


def test_units_are_the_worth_of_sums_of_whole_numbers():
    deployed = deploy(make_model("resnet8", num_classes=10, width=4), (8, 8, 3))
    layers = networks.codes(deployed)
    folded = fold(deployed)
    units = bn_folding.units_of(deployed.table, layers, folded)
    assert set(units) == set(folded) - {"stem_norm"}  # whose layer reads float images
    for layer, one in zip(deployed.table.layers, layers, strict=True):
        if layer.norm in units:
            assert units[layer.norm] == float(one.step) * float(one.input_step)


def test_a_network_without_norms_has_nothing_to_keep():
    for keep in bn_folding.NORMS.values():
        assert keep({}, {}) == ({}, {})

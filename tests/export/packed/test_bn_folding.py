"""Norms folded into a multiplication and an addition."""

import numpy as np
from helpers.exported_models import make_exported

from mpq_jax.export import exported_model, program
from mpq_jax.export.packed import bn_folding, norm_encoding
from mpq_jax.models import make_model


def test_a_folded_norm_is_the_norm():
    exported = make_exported(make_model("resnet8", num_classes=10, width=4), (8, 8, 3), turned=0.5)
    variables = program.flat_variables(exported_model.select(exported))
    folded = bn_folding.fold(variables, bn_folding.norms_of(exported))
    kept = bn_folding.keep(variables)
    assert set(folded) == set(kept) == {x.norm for x in exported.table.layers if x.norm}
    for name, leaves in folded.items():
        scale, bias, mean, variance = (
            np.asarray(kept[name][leaf], np.float64) for leaf in norm_encoding.KEPT
        )
        x = np.linspace(-3, 3, 7)[:, None]
        wanted = (x - mean) / np.sqrt(variance + 1e-5) * scale + bias  # Flax's default epsilon
        found = x * leaves["multiplier"] + leaves["offset"]
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)


def test_rows_of_a_bank_are_folded_one_by_one():
    exported = make_exported(make_model("resnet8", num_classes=10, width=4), (8, 8, 3))
    norms = bn_folding.norms_of(exported)
    rows = [
        {name: factor * np.asarray(leaf) for name, leaf in flat.items()}
        for factor in (1, 2)
        for flat in [program.flat_variables(exported_model.select(exported))]
    ]
    banked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    together, apart = bn_folding.fold(banked, norms), [bn_folding.fold(row, norms) for row in rows]
    for name, leaves in together.items():
        for leaf, numbers in leaves.items():
            np.testing.assert_array_equal(numbers, np.stack([one[name][leaf] for one in apart]))


def test_leaves_that_are_not_all_four_of_a_norm_are_not_taken():
    ones = np.ones(3, np.float32)
    variables = {
        f"{collection}/whole/{leaf}": ones
        for collection, leaf in (
            ("params", "scale"),
            ("params", "bias"),
            ("batch_stats", "mean"),
            ("batch_stats", "var"),
        )
    }
    assert list(bn_folding.keep(variables)) == ["whole"]
    assert not bn_folding.keep(variables | {"params/whole/bias": np.ones(2, np.float32)})
    assert not bn_folding.keep(variables | {"params/whole/bias": np.ones(3, np.float16)})
    del variables["params/whole/scale"]
    assert not bn_folding.keep(variables | {"params/dense/bias": ones})

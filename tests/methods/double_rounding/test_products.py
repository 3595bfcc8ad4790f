"""Products of activations in Double Rounding."""

import pytest
from helpers.attention import SHAPE
from helpers.attention_training import CHOICE, FIXED, MODEL, RUN, one_step, places_of, table_of
from helpers.random_variables import drawn_variables

from mpq_jax.methods import double_rounding


@pytest.mark.slow
def test_double_rounding_trains_a_step_size_for_each_precision():
    options = double_rounding.Options(scale_learning_rate=1e-4)
    method = double_rounding.FAMILY.make(MODEL, table_of(CHOICE), options, RUN)
    assert list(method.eval_bits) == ["w8a8", "w4a4", "w2a2"]
    before, after, _ = one_step(method, drawn_variables(MODEL, SHAPE, 0))
    for old, new in zip(before, after, strict=True):
        assert (old != new)[places_of(method.table)].all(), "an unused precision"


def test_double_rounding_searches_no_products():
    with pytest.raises(ValueError, match="'block0/product' is a product of activations with a"):
        double_rounding.MIXED_FAMILY.make(
            MODEL, table_of(CHOICE), double_rounding.MixedOptions(), RUN
        )
    table = double_rounding.MIXED_FAMILY.make(
        MODEL, table_of(FIXED), double_rounding.MixedOptions(), RUN
    ).table
    assert [table.layers[index].weight_candidates for index in places_of(table)] == 2 * [(8,)]

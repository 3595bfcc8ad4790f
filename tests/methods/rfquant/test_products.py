"""Products of activations in RFQuant."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.attention import PRODUCTS, SHAPE
from helpers.attention_training import CHOICE, MODEL, RUN, one_step, places_of, table_of
from helpers.random_variables import drawn_variables

from mpq_jax.methods import rfquant
from mpq_jax.methods.rfquant import freezing
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import Rule


@pytest.mark.slow
def test_rfquant_trains_the_step_sizes_of_both_operands():
    options = rfquant.Options(
        random_subnets=1, warmup=0.0, subnet_loop="calls", qe_start=0.0, step_learning_rate=0.01
    )
    method = rfquant.make(MODEL, table_of(CHOICE), options, RUN)
    before, after, _ = one_step(method, drawn_variables(MODEL, SHAPE, 0))
    for old, new in zip(before, after, strict=True):
        moved = np.abs(old - new)[places_of(method.table)] > 1e-5  # the average rounds the others
        assert moved[:, 0].all(), "the largest bits are trained in every step"
        assert moved[:, 1:].sum(axis=1).max() <= 1, "the random subnet has other bits at most once"
        assert np.isfinite(new).all()


def test_rfquant_freezes_kernels_alone():
    """Of 6 kernels with a choice; the products beside them have no weights to be unstable."""
    table = trace_layers(MODEL, SHAPE, rules=[CHOICE, Rule(weights=(8, 4, 2), acts=8)])
    freezable = [table.names[index] for index in freezing.freezable(table)]
    assert freezable == [name for name in table.names if name not in PRODUCTS]
    scores = np.arange(len(freezable), dtype=np.float32)
    mask = freezing.freeze(table, jnp.asarray(scores), jnp.int32(6), options=rfquant.Options())
    np.testing.assert_array_equal(mask[np.array(places_of(table))], table.mask[places_of(table)])
    assert not mask[~np.isin(np.arange(len(table)), places_of(table)), 0, -1].any()

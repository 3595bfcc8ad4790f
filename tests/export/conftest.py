"""Settings that some tests of exports share."""

import jax
import pytest


@pytest.fixture
def lenient():
    """Models of users mix types and ranks of arrays, and so do Flax's pooling and attention."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield

"""Test-wide settings: eight CPU devices, and strict promotion of types and ranks."""

import jax
import pytest

pytest.register_assert_rewrite("helpers")  # so that their failures show values as well
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Files that begin first: a file goes to one worker, and none is to be left alone at the end.
LONGEST = ("test_train", "test_csq", "test_search", "test_notebooks", "test_own_model")


def pytest_collection_modifyitems(items):
    """Starts the longest files first."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)

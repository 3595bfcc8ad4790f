"""Test-wide settings: eight CPU devices, and strict promotion of types and ranks."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

LONGEST = ("test_programs", "test_notebooks", "test_own_model")  # whole files go to one worker


def pytest_collection_modifyitems(items):
    """Starts the longest files first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)

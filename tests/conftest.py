"""Test-wide settings: quick compilation, eight CPU devices, strict promotion of types and ranks."""

import gc
import os
import shutil
import tempfile

import jax
import pytest

pytest.register_assert_rewrite("helpers")  # so that their failures show values as well
from helpers.compiler_flags import QUICK  # noqa: E402

# Flags that the caller sets are the last, so they hold. Programs that tests start inherit all.
os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}"
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(100_000, 10, 10)  # tracing makes many objects; this saves a tenth of all time

COMPILED = pytest.StashKey[str]()  # folder of compiled programs

# Files that begin first: a file goes to one worker, and none is to be left alone at the end. The
# second needs no run that the first makes, so that no worker waits for the other.
LONGEST = (
    "cli/test_search",
    "export/test_other_networks",
    "models/test_models",
    "cli/test_train",
    "models/test_computation",
    "search/test_prefix_scoring",
    "search/test_strategies",
)


def pytest_configure(config):
    """Shares compiled programs among the workers of this session, and with none before it."""
    if not hasattr(config, "workerinput"):  # workers inherit the environment
        config.stash[COMPILED] = tempfile.mkdtemp(prefix="compiled")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = config.stash[COMPILED]
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    config.option.loadscopereorder = False  # xdist would begin with the files of the most tests


def pytest_unconfigure(config):
    """Removes what this session compiled."""
    if COMPILED in config.stash:
        shutil.rmtree(config.stash[COMPILED], ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    """Marks slow cases, and starts the longest files first."""
    begun = set()
    for item in items:
        if item.get_closest_marker("slow_but_first"):
            test = item.nodeid.partition("[")[0]
            if test in begun:
                item.add_marker(pytest.mark.slow)
            begun.add(test)
    ranks = {name: rank for rank, name in enumerate(LONGEST)}

    def rank(item):
        return ranks.get(f"{item.path.parent.name}/{item.path.stem}", len(ranks))

    items.sort(key=rank)


@pytest.fixture
def lenient():
    """Models of users mix types and ranks of arrays, and so do Flax's pooling and attention."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield

"""States of training and checks of what checkpoints give back."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpq_jax.parallel.mesh import batch_sharded, make_mesh, replicate, replicated
from mpq_jax.training.checkpoints import (
    open_manager,
    save,
)


class State(NamedTuple):
    step: Any
    params: dict
    optimizer: Any
    mask: Any
    key: Any
    words: Any
    half: Any
    empty: Any
    nothing: None
    choices: list
    host: np.ndarray


def make_state(step: int, *, device_count: int = 8, width: int = 16) -> State:
    """A state of every kind of leaf, each depending on `step`."""
    params = {
        "conv": {"kernel": jnp.arange(4.0 * width).reshape(4, width) + step},
        "a/b": jnp.ones(3),
    }
    state = State(
        step=jnp.int32(step),
        params=params,
        optimizer=optax.adamw(1e-3).init(params),
        mask=jnp.arange(6).reshape(2, 3) % 2 == step % 2,
        key=jax.random.split(jax.random.key(step), 2),
        words=jax.random.key_data(jax.random.key(step + 1)),
        half=jnp.asarray([0.1, -0.0, jnp.nan, jnp.inf, step], jnp.bfloat16),
        empty=jnp.zeros((0, 3), jnp.float32),
        nothing=None,
        choices=[jnp.uint32(2**32 - 1 - step), jnp.float32(1e-45)],
        host=np.array([]),
    )
    return replicate(state, make_mesh(device_count))._replace(host=np.array([step / 3, np.pi]))


def assert_bit_equal(actual: Any, expected: Any) -> None:
    """Equal structure, types, shapes, shardings and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, left), right in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        assert (type(left), left.dtype, left.shape) == (type(right), right.dtype, right.shape), path
        if isinstance(right, jax.Array):
            assert left.sharding == right.sharding, path
        if jnp.issubdtype(right.dtype, jax.dtypes.prng_key):
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes(), path


def save_steps(directory: Path, *steps: int) -> None:
    with open_manager(directory) as manager:
        for step in steps:
            assert save(manager, step, make_state(step))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def split(tree: Any, device_count: int) -> Any:
    """Splits the first axis of every array over devices, where it divides."""
    mesh = make_mesh(device_count)

    def place(leaf):
        divides = leaf.ndim > 0 and leaf.shape[0] % device_count == 0
        return jax.device_put(leaf, batch_sharded(mesh) if divides else replicated(mesh))

    return jax.tree.map(place, tree)

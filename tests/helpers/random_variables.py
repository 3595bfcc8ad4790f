"""Random variables of a model for tests, without compiling its initializers."""

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax.program.network import init_variables


def drawn_variables(model, shape, seed):
    """Variables of a model, drawn without compiling its initializers."""
    generator = np.random.default_rng(seed)

    def fill(path, leaf):
        name = path[-1].key
        if name in ("kernel", "embedding"):
            x = generator.uniform(-1.7, 1.7, leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        elif name in ("scale", "var"):
            x = generator.uniform(0.6, 1.4, leaf.shape)
        else:
            x = 0.1 * generator.normal(size=leaf.shape)
        return jnp.asarray(x, jnp.float32)

    shapes = jax.eval_shape(lambda key: init_variables(model, key, shape), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(fill, shapes)

"""Computation options of models: the dtype, and rematerialization in the backward pass."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

TYPES = ("float32", "bfloat16")


def type_of(dtype: Any) -> Any:
    """Returns the dtype in which layers multiply, given its name (as in configs) or the dtype.

    Parameters, norm statistics and logits are float32 in either case.

    Raises:
        ValueError: the dtype is not one of `TYPES`.
    """
    for name in TYPES:
        if dtype == name or dtype == jnp.dtype(name):
            return jnp.dtype(name)
    raise ValueError(f"dtype is {dtype!r}; wanted one of {TYPES}")


def block_of(module: Any, *, remat: bool) -> Any:
    """Returns the class of a block, `__call__(x, train)`, rematerialized if `remat`.

    The backward pass then recomputes the block's activations from its input instead of storing
    them. Parameter names and results stay the same.
    """
    return nn.remat(module, static_argnums=(2,)) if remat else module

"""How a model computes: the type of its numbers, and what is kept for the backward pass."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

TYPES = ("float32", "bfloat16")


def type_of(dtype: Any) -> Any:
    """Returns the type that layers multiply in; a name, as configs have it, or a type.

    Parameters, norm statistics and logits are float32 in either type.

    Raises:
        ValueError: it is none of `TYPES`.
    """
    for name in TYPES:
        if dtype == name or dtype == jnp.dtype(name):
            return jnp.dtype(name)
    raise ValueError(f"dtype is {dtype!r}; wanted one of {TYPES}")


def block_of(module: Any, *, remat: bool) -> Any:
    """Returns a block's class, `__call__(x, train)`; with `remat` one that is computed twice.

    Its activations are then not kept for the backward pass, which computes them again from the
    block's input. Names of parameters and results are the same.
    """
    return nn.remat(module, static_argnums=(2,)) if remat else module

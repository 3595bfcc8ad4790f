"""What a bit configuration costs: functions of (table, bits) for one configuration.

All are traceable in `bits` and written for one configuration; `jax.vmap` them over many.
"""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from jaxtyping import ArrayLike as AnyArray

from mpq_jax.bits import BitConfig
from mpq_jax.layer_table import LayerTable

BITS_PER_BYTE = 8


def bitops(table: LayerTable, bits: BitConfig) -> Float[Array, ""]:
    """Returns the bit operations per image (not giga): sum of MACs x weight bits x input bits.

    Fixed layers are billed at their own bits, a float input at the bits its rule names.

    References:
        RFQuant's model profiling; for ResNet-18 at 224 px, W4A4 costs 34.714e9.
    """
    return jnp.sum(_macs(table) * _as_float(bits.weights) * _as_float(bits.acts))


def model_bytes(table: LayerTable, bits: BitConfig) -> Float[Array, ""]:
    """Returns the bytes of all kernels at their bits, without norms, biases and step sizes."""
    return jnp.sum(_params(table) * _as_float(bits.weights)) / BITS_PER_BYTE


def mean_bits(
    table: LayerTable, bits: BitConfig, *, by: Literal["layer", "param"]
) -> Float[Array, ""]:
    """Returns the mean weight bits over the layers that have a choice.

    Args:
        table: the layers.
        bits: one configuration.
        by: "layer" counts every layer once; "param" weighs it by its number of weights, so that
            the mean times the number of weights is the size of the searched part in bits.
    """
    if by not in ("layer", "param"):
        raise ValueError(f'by is {by!r}; wanted "layer" or "param"')
    if not table.searchable.any():
        raise ValueError("no layer of the table has a choice of bits, so there is no mean of them")
    chosen = jnp.asarray(table.searchable, jnp.float32)
    weight = chosen * _params(table) if by == "param" else chosen
    return jnp.sum(weight * _as_float(bits.weights)) / jnp.sum(weight)


def _macs(table: LayerTable) -> Float[Array, " layers"]:
    return jnp.array([layer.macs for layer in table.layers], jnp.float32)


def _params(table: LayerTable) -> Float[Array, " layers"]:
    return jnp.array([layer.params for layer in table.layers], jnp.float32)


def _as_float(bits: Int[AnyArray, " layers"]) -> Float[Array, " layers"]:
    return jnp.asarray(bits).astype(jnp.float32)


COSTS: dict[str, Callable[[LayerTable, BitConfig], Array]] = {
    "bitops": bitops,
    "bytes": model_bytes,
}


def cost_table(table: LayerTable, kind: str) -> np.ndarray:
    """Returns what each layer costs at each choice: float64 [layers, weight, activation choices].

    The cost of a configuration is the sum over layers of its entries; choices that the table
    does not allow hold infinity. This is all that a search knows of a budget.

    Args:
        table: the layers.
        kind: "bitops" (bit operations per image) or "bytes" (of the kernels).
    """
    if kind not in COSTS:
        raise ValueError(f"the budget kind is {kind!r}; known kinds are {sorted(COSTS)}")
    choices = np.array(table.candidates, np.float64)
    if kind == "bitops":
        macs = np.array([layer.macs for layer in table.layers], np.float64)
        cost = macs[:, None, None] * choices[:, None] * choices
    else:
        params = np.array([layer.params for layer in table.layers], np.float64)
        cost = np.broadcast_to(
            params[:, None, None] * choices[:, None] / BITS_PER_BYTE,
            (len(table), len(choices), len(choices)),
        )
    allowed = table.mask[:, 0, :, None] & table.mask[:, 1, None, :]
    return np.where(allowed, cost, np.inf)

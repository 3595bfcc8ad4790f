"""How much a layer minds its bits: instability of weights near bin edges."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from jaxtyping import ArrayLike as AnyArray

from mpq_jax.quantizers import lsq


@functools.partial(jax.jit, static_argnames="proportion")
def instability(
    w: Float[Array, "*shape"],
    step_sizes: Float[Array, " choices"],
    bits: Int[AnyArray, " choices"],
    mask: Bool[AnyArray, " choices"],
    *,
    proportion: float = 0.25,
) -> Float[Array, ""]:
    """Measures how many weights of one layer stand near a decision boundary, low bits first.

    For each bit-width b, the share of weights whose distance to the code's centre exceeds
    `(1 - proportion) / 2` steps, on the side of a neighbouring code, divided by b; the mean of it
    over the allowed bit-widths. Weights beyond the outermost codes are clipped and never count.

    Args:
        w: the layer's kernel.
        step_sizes: step size at each candidate, in the units of `w`.
        bits: the candidates.
        mask: which candidates count; at least one.
        proportion: part of each half bin, next to the boundary, that counts as unstable.

    References:
        RFQuant (CVPR 2024), the criterion of its bit-width scheduler, as published in code.
    """

    def unstable_share(step_size, b):
        low, high = lsq.code_range(b, signed=True)
        v = lsq.in_steps(w, step_size)
        code = jnp.clip(jnp.round(v), low, high)
        offset = v - code
        near = jnp.abs(offset) > 0.5 * (1 - proportion)
        clipped = ((code == low) & (offset <= 0)) | ((code == high) & (offset >= 0))
        return jnp.mean((near & ~clipped).astype(jnp.float32)) / b.astype(jnp.float32)

    bits, mask = jnp.asarray(bits, jnp.int32), jnp.asarray(mask)
    shares = jax.vmap(unstable_share)(step_sizes, bits)
    return jnp.sum(jnp.where(mask, shares, 0.0)) / jnp.sum(mask.astype(jnp.float32))

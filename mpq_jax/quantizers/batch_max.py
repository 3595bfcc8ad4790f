"""Activations scaled by the largest value of the batch, as in the published code of BSQ and CSQ.

With S = max |x| over the whole array and a bits,

    out = sign(x) round(|x| (2^a - 1) / S) S / (2^a - 1)

**For comparison with published numbers only.** The scale depends on the batch, in evaluation too,
so the prediction for an image depends on the other images of its batch. No step size is learned or
stored, so nothing can be exported.

References:
    Yang et al., BSQ: Exploring Bit-Level Sparsity for Mixed-Precision Neural Network
    Quantization, ICLR 2021, https://arxiv.org/abs/2102.10462, and Xiao et al., CSQ, DAC 2023,
    https://arxiv.org/abs/2212.02770: the code published with both.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from jaxtyping import ArrayLike as AnyArray

from mpq_jax.quantizers import lsq
from mpq_jax.quantizers.base import ActQuantizer

CLIP = 6.0  # ReLU6 of the published code
MAX_UNCLIPPED_BITS = 3  # up to here, and for float inputs, that code clips by PACT instead


def _bound(bits, dtype):
    """Returns the clipping bound of |x|; infinity if there is no clipping."""
    return jnp.where(jnp.asarray(bits) > MAX_UNCLIPPED_BITS, CLIP, jnp.inf).astype(dtype)


def _rounded(x, bits):
    """Computes the codes, as floats, and the width of one code, S / (2^a - 1)."""
    bound = _bound(bits, x.dtype)
    clipped = jnp.clip(x, -bound, bound)
    largest = jnp.max(jnp.abs(clipped), initial=0)
    _, levels = lsq.code_range(bits, signed=False)
    unit = jnp.where(largest > 0, largest, 1)  # any scale quantizes zeros
    width = lsq.in_steps(unit, levels.astype(x.dtype))
    return jnp.round(lsq.in_steps(clipped, width)), width


@jax.custom_vjp
def _fake_quant(x, bits):
    rounded, width = _rounded(x, bits)
    return rounded * width


def _fake_quant_forward(x, bits):
    return _fake_quant(x, bits), (x, bits)


def _fake_quant_backward(inputs, gradient):
    x, bits = inputs
    return jnp.where(jnp.abs(x) <= _bound(bits, x.dtype), gradient, 0), None


_fake_quant.defvjp(_fake_quant_forward, _fake_quant_backward)


def fake_quant(
    x: Float[Array, "*shape"],
    step_size: Float[AnyArray, ""],
    bits: Int[AnyArray, ""],
    *,
    signed: bool | Bool[Array, ""],
    grad_scale: Float[AnyArray, ""] | None = None,
) -> Float[Array, "*shape"]:
    """Rounds `x` to multiples of max |x| / (2^bits - 1), after clipping to +-6 above 3 bits.

    The scale depends on the batch, in evaluation too: predictions depend on the other images of
    the batch, and nothing can be exported. For comparison with published numbers only.

    The clipping turns a ReLU before the layer into ReLU6, as in the published code; negative `x`
    are allowed. The gradient with respect to `x` is that of the clipping alone, bounds included:
    rounding and scale count as the identity. The gradient with respect to `step_size` is zero.
    Reverse-mode differentiation only.

    Args:
        x: values of the whole batch.
        step_size: not used; the scale is recomputed for every batch.
        bits: number of bits without the sign (a), a traced integer: changing it never recompiles.
        signed: not used; codes have the signs of the values.
        grad_scale: not used.

    Returns:
        An array like `x`; it equals `codes(x, ...) * init_step(x, ...)` exactly.
    """
    del step_size, signed, grad_scale
    return _fake_quant(x, jnp.asarray(bits))


def codes(
    x: Float[Array, "*shape"],
    step_size: Float[AnyArray, ""],
    bits: Int[AnyArray, ""],
    *,
    signed: bool | Bool[Array, ""],
) -> Int[Array, "*shape"]:
    """Computes the int32 codes of this batch, -(2^bits - 1) to 2^bits - 1, as in `fake_quant`.

    The width of one code is `init_step(x, bits)`, not `step_size`.
    """
    del step_size, signed
    return _rounded(x, bits)[0].astype(jnp.int32)


def init_step(
    x: Float[Array, "*shape"], bits: Int[AnyArray, ""], *, signed: bool | Bool[Array, ""]
) -> Float[Array, ""]:
    """Computes the width of one code of this batch, max |x| / (2^bits - 1) after clipping.

    Args:
        x: values of the whole batch.
        bits: number of bits without the sign.
        signed: not used.
    """
    del signed
    return _rounded(x, bits)[1]


ACTS = ActQuantizer(fake_quant, codes, init_step, batch_scale=True)

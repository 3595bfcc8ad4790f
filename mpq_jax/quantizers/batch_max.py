"""Inputs of layers scaled by the largest value of the batch: BSQ's and CSQ's published code.

With S = max |x| over the whole array and a bits,

    out = sign(x) round(|x| (2^a - 1) / S) S / (2^a - 1)

**For comparison with published numbers only.** The scale depends on the batch, in evaluation as
well, so what is predicted for an image depends on the other images of its batch; and no step size
is ever learned or kept, so nothing can be exported.

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
CLIPPED_ABOVE = 3  # bits; up to here, and for float inputs, that code clips by PACT instead


def _bound(bits, dtype):
    """Returns the largest |x| that is not clipped."""
    return jnp.where(jnp.asarray(bits) > CLIPPED_ABOVE, CLIP, jnp.inf).astype(dtype)


def _rounded(x, bits):
    """Returns the codes as floats, and the width of one code, S / (2^a - 1)."""
    bound = _bound(bits, x.dtype)
    clipped = jnp.clip(x, -bound, bound)
    largest = jnp.max(jnp.abs(clipped), initial=0)
    _, levels = lsq.code_range(bits, signed=False)
    unit = jnp.where(largest > 0, largest, 1)  # zeros have no scale of their own
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
    """Snaps `x` to multiples of max |x| / (2^bits - 1); clips it to +-6 first above 3 bits.

    The scale depends on the batch, in evaluation as well: predictions depend on what else is in
    the batch, and nothing can be exported. For comparison with published numbers only.

    Outputs of a ReLU meet ReLU6 here, as in the published code; `x` may be negative all the same.
    The gradient in `x` is that of the clipping alone, bounds included: the quantizer after it, its
    scale too, counts as the identity. The gradient in `step_size` is zero. Reverse-mode
    differentiation only.

    Args:
        x: values, the whole batch.
        step_size: not used; the scale is computed anew for every batch.
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
    """Returns int32 codes, -(2^bits - 1) to 2^bits - 1, of this batch; arguments of `fake_quant`.

    They are worth `init_step(x, bits)` each, not `step_size`.
    """
    del step_size, signed
    return _rounded(x, bits)[0].astype(jnp.int32)


def init_step(
    x: Float[Array, "*shape"], bits: Int[AnyArray, ""], *, signed: bool | Bool[Array, ""]
) -> Float[Array, ""]:
    """Returns what a code of this batch is worth, max |x| / (2^bits - 1) after the clipping.

    Args:
        x: values, the whole batch.
        bits: number of bits without the sign.
        signed: not used.
    """
    del signed
    return _rounded(x, bits)[1]


ACTS = ActQuantizer(fake_quant, codes, init_step, batch_scale=True)

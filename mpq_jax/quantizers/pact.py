"""PACT: activations clipped at a learned bound, then quantized uniformly.

The bound alpha is stored as a step size, s = alpha / (largest code), so that values, codes and
exports equal those of LSQ; only the gradient of the parameter differs.

References:
    Choi et al., PACT: Parameterized Clipping Activation for Quantized Neural Networks, 2018,
    https://arxiv.org/abs/1805.06085, Eq. 1-3.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from jaxtyping import ArrayLike as AnyArray

from mpq_jax.quantizers import lsq
from mpq_jax.quantizers.base import ActQuantizer

INIT_CLIP = 10.0  # initial alpha, in the units of the values; as in CSQ's published code


@jax.custom_vjp
def _fake_quant(x, step_size, bits, signed, grad_scale):
    del grad_scale
    return lsq.fake_quant(x, step_size, bits, signed=signed)


def _fake_quant_forward(*inputs):
    # Residuals are the inputs alone: `x` is in memory anyway, the others are scalars.
    return _fake_quant(*inputs), inputs


def _fake_quant_backward(inputs, gradient):
    x, step_size, bits, signed, grad_scale = inputs
    low, high = (bound.astype(x.dtype) for bound in lsq.code_range(bits, signed=signed))
    # Compare in the units of x, as in LSQ: there `code * step_size` equals a bound exactly.
    smallest, largest = low * step_size, high * step_size
    x_gradient = jnp.where((x >= smallest) & (x <= largest), gradient, 0)
    per_value = jnp.where(x >= largest, 1, jnp.where(x <= smallest, low / high, 0))
    clip_gradient = jnp.sum(gradient * per_value)
    # A product instead of a division, so that all programs agree; see `lsq.in_steps`.
    return x_gradient, clip_gradient * (1 / high) * grad_scale, None, None, None


_fake_quant.defvjp(_fake_quant_forward, _fake_quant_backward)


def fake_quant(
    x: Float[Array, "*shape"],
    step_size: Float[AnyArray, ""],
    bits: Int[AnyArray, ""],
    *,
    signed: bool | Bool[Array, ""],
    grad_scale: Float[AnyArray, ""] | None = None,
) -> Float[Array, "*shape"]:
    """Clips `x` at alpha = `step_size` * (largest code) and rounds it; values equal those of LSQ.

    The gradient with respect to `x` passes where `x` lies in the range of the codes, bounds
    included, and is zero elsewhere. The gradient with respect to alpha is the sum of the incoming
    gradient where `x` is at or above alpha; rounding contributes nothing (Eq. 3). Signed codes,
    which the paper does not have, add low / high times the incoming gradient where `x` is at or
    below the lower bound, since that bound is low / high times alpha.

    The gradient returned for `step_size` is dL/dalpha divided by the largest code; the chain rule
    would multiply by it. Gradient descent on the step size therefore changes alpha exactly as in
    PACT, `high * (change of s) = -rate * dL/dalpha`, also with momentum and weight decay; by the
    chain rule, the change would be high^2 times as large. Optimizers that normalize gradients
    (Adam) break this equivalence. Reverse-mode differentiation only.

    Args:
        x: values.
        step_size: width of one level (s), positive, in the units of `x`.
        bits: number of bits, a traced integer: changing it never recompiles; at least 2 if
            signed. With 32 bits, the quantizer only clips, apart from the rounding of float
            arithmetic, and its codes do not fit into int32.
        signed: whether the codes are signed; traced or not.
        grad_scale: factor of the step size's gradient; None is 1.

    Returns:
        An array like `x`; it equals `codes(...) * step_size` exactly.

    References:
        Choi et al., PACT, 2018, https://arxiv.org/abs/1805.06085, Eq. 1-3.
    """
    step_size = jnp.asarray(step_size, x.dtype)
    scale = jnp.asarray(1.0 if grad_scale is None else grad_scale, x.dtype)
    return _fake_quant(x, step_size, jnp.asarray(bits), jnp.asarray(signed), scale)


def init_step(
    x: Float[Array, "*shape"], bits: Int[AnyArray, ""], *, signed: bool | Bool[Array, ""]
) -> Float[Array, ""]:
    """Computes the initial step size of a layer's input, `INIT_CLIP` / (largest code).

    Args:
        x: inputs of the layer on calibration images; only their dtype is used.
        bits: number of bits.
        signed: whether the codes are signed, which determines the largest code.
    """
    _, high = lsq.code_range(bits, signed=signed)
    return (INIT_CLIP / high).astype(x.dtype)


ACTS = ActQuantizer(fake_quant, lsq.codes, init_step)

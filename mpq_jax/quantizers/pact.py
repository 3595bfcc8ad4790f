"""PACT: inputs of layers clipped at a learned bound, then quantized uniformly.

The bound alpha is kept as a step size, s = alpha / (largest code), so that values, codes and
exports are those of LSQ; only the gradient of the parameter differs.

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

FIRST_CLIP = 10.0  # first alpha, in the units of the values; of CSQ's published code


@jax.custom_vjp
def _fake_quant(x, step_size, bits, signed, grad_scale):
    del grad_scale
    return lsq.fake_quant(x, step_size, bits, signed=signed)


def _fake_quant_forward(*inputs):
    # Only the inputs are kept for the backward pass: `x` is alive anyway, the rest are scalars.
    return _fake_quant(*inputs), inputs


def _fake_quant_backward(inputs, gradient):
    x, step_size, bits, signed, grad_scale = inputs
    low, high = (bound.astype(x.dtype) for bound in lsq.code_range(bits, signed=signed))
    # Compared in the units of x, as in LSQ: there `code * step_size` meets a bound exactly.
    smallest, largest = low * step_size, high * step_size
    x_gradient = jnp.where((x >= smallest) & (x <= largest), gradient, 0)
    per_value = jnp.where(x >= largest, 1, jnp.where(x <= smallest, low / high, 0))
    clip_gradient = jnp.sum(gradient * per_value)
    # As a product all programs agree on it, see `lsq.in_steps`.
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
    """Clips `x` at alpha = `step_size` * (largest code) and rounds it; values are those of LSQ.

    The gradient in `x` passes where `x` lies in the range of the codes, bounds included, and is
    zero elsewhere. The gradient in alpha is the sum of the incoming gradient where `x` is at or
    above alpha; rounding adds nothing to it (Eq. 3). Signed codes, which the paper does not have,
    add low / high times the incoming gradient where `x` is at or below the low bound, since that
    bound is low / high times alpha.

    What is returned as the gradient in `step_size` is dL/dalpha / (largest code), not the
    product with it that the chain rule asks for. So gradient descent on the step size moves alpha
    just as PACT's does, `high * (change of s) = -rate * dL/dalpha`, and so do momentum and weight
    decay; by the chain rule it would move high^2 times as far. Optimizers that normalize gradients
    (Adam) do not keep this. Reverse-mode differentiation only.

    Args:
        x: values.
        step_size: width of one level (s), positive, in the units of `x`.
        bits: number of bits, a traced integer: changing it never recompiles; at least 2 if
            signed. At 32 bits only float arithmetic rounds, so that it is pure clipping; there
            are no such codes in int32.
        signed: whether the codes are signed; traced or not.
        grad_scale: factor of the gradient in `step_size`; None leaves the gradient as it is.

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
    """Returns the first step size of a layer's input, `FIRST_CLIP` / (largest code).

    Args:
        x: inputs of the layer on calibration images; only their type matters.
        bits: number of bits.
        signed: whether the codes are signed; decides the largest code.
    """
    _, high = lsq.code_range(bits, signed=signed)
    return (FIRST_CLIP / high).astype(x.dtype)


ACTS = ActQuantizer(fake_quant, lsq.codes, init_step)

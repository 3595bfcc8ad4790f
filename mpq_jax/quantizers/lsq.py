"""LSQ: uniform quantization with a learned step size, one per tensor.

References:
    Esser et al., Learned Step Size Quantization, ICLR 2020, https://arxiv.org/abs/1902.08153.
    Tang et al., Retraining-free Model Quantization via One-Shot Weight-Coupling Learning,
    CVPR 2024, https://arxiv.org/abs/2401.01543 (the initial step sizes used here).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from jaxtyping import ArrayLike as AnyArray  # accepts Python and NumPy numbers as well

from mpq_jax.quantizers.base import ActQuantizer, Quantizer, WeightQuantizer

MIN_STEP_SIZE = 1e-8  # keeps x / step_size finite for an all-zero tensor, and steps positive


def code_range(
    bits: Int[AnyArray, "*#shape"], *, signed: bool | Bool[Array, ""]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Returns the smallest and the largest integer code (-Q_N and Q_P) of a number of bits.

    Args:
        bits: bits per value, traced or not.
        signed: codes of two's complement if true, else of natural binary.
    """
    levels = jnp.ldexp(jnp.float32(1), jnp.asarray(bits, jnp.int32))  # exact, and of 32 bits too
    low = jnp.where(signed, -levels / 2, 0.0)
    return low, low + levels - 1


def in_steps(x, step_size):
    """Returns `x` in units of the step size; the one definition wherever codes must agree.

    XLA turns `x / step_size` into this product in some programs and not in others, which moves
    ties; written out, all programs agree bit for bit.
    """
    return x * (1 / step_size)


@jax.custom_vjp
def _fake_quant(x, step_size, low, high, grad_scale):
    return jnp.round(jnp.clip(in_steps(x, step_size), low, high)) * step_size


def _fake_quant_forward(x, step_size, low, high, grad_scale):
    # Only the inputs are kept for the backward pass: `x` is alive anyway, the rest are scalars.
    return _fake_quant(x, step_size, low, high, grad_scale), (x, step_size, low, high, grad_scale)


def _fake_quant_backward(residuals, gradient):
    x, step_size, low, high, grad_scale = residuals
    v = in_steps(x, step_size)
    # Compared in the units of x: there `code * step_size` meets a bound exactly, whatever the step.
    inside = (x >= low * step_size) & (x <= high * step_size)
    x_gradient = jnp.where(inside, gradient, 0)
    code = jnp.round(jnp.clip(v, low, high))
    step_gradient = jnp.sum(gradient * (code - jnp.where(inside, v, 0))) * grad_scale
    return x_gradient, step_gradient, None, None, None


_fake_quant.defvjp(_fake_quant_forward, _fake_quant_backward)


def fake_quant(
    x: Float[Array, "*shape"],
    step_size: Float[AnyArray, ""],
    bits: Int[AnyArray, ""],
    *,
    signed: bool | Bool[Array, ""],
    grad_scale: Float[AnyArray, ""] | None = None,
) -> Float[Array, "*shape"]:
    """Snaps `x` to the nearest multiple of `step_size` that `bits` bits can name.

    The code is `x * (1 / step_size)` rounded, halves to the even code. The gradient in `x` passes
    where `x` lies in the range of the codes, bounds included, and is zero elsewhere; the gradient
    in `step_size` is `code - x / step_size` inside the range and the violated bound outside of it
    (Eq. 3). Reverse-mode differentiation only.

    Args:
        x: values.
        step_size: width of one level (s in the paper), positive, in the units of `x`.
        bits: number of bits, a traced integer: changing it never recompiles.
        signed: whether the codes are signed; traced or not.
        grad_scale: factor of the gradient in `step_size`; the paper takes
            1 / sqrt(x.size * largest code). None leaves the gradient as it is.

    Returns:
        An array like `x`; it equals `codes(...) * step_size` exactly.

    References:
        Esser et al., Learned Step Size Quantization, ICLR 2020, Eq. 1-3 and section 2.2.
    """
    low, high = code_range(bits, signed=signed)
    step_size = jnp.asarray(step_size, x.dtype)
    scale = jnp.asarray(1.0 if grad_scale is None else grad_scale, x.dtype)
    return _fake_quant(x, step_size, low.astype(x.dtype), high.astype(x.dtype), scale)


def codes(
    x: Float[Array, "*shape"],
    step_size: Float[AnyArray, ""],
    bits: Int[AnyArray, ""],
    *,
    signed: bool | Bool[Array, ""],
) -> Int[Array, "*shape"]:
    """Returns the int32 codes that `fake_quant` multiplies by `step_size`; same arguments."""
    low, high = code_range(bits, signed=signed)
    v = in_steps(x, jnp.asarray(step_size, x.dtype))
    return jnp.round(jnp.clip(v, low.astype(x.dtype), high.astype(x.dtype))).astype(jnp.int32)


def init_weight_step(w: Float[Array, "*shape"], bits: Int[AnyArray, ""]) -> Float[Array, ""]:
    """Returns the first step size of a weight tensor by the three-sigma rule.

    `max(|mean - 3 sigma|, |mean + 3 sigma|) / 2^(bits - 1)`, sigma being the unbiased standard
    deviation of the whole tensor. The steps of different bits are nested: each is half the one
    of a bit less.

    References:
        The rule of RFQuant's published code (quantizer initialization of the weights).
    """
    mean, sigma = jnp.mean(w), jnp.std(w, ddof=1 if w.size > 1 else 0)
    reach = jnp.maximum(jnp.abs(mean - 3 * sigma), jnp.abs(mean + 3 * sigma))
    _, high = code_range(bits, signed=True)
    return jnp.maximum(reach / (high + 1).astype(w.dtype), MIN_STEP_SIZE)


def init_act_step(
    x: Float[Array, "*shape"], bits: Int[AnyArray, ""], *, signed: bool | Bool[Array, ""]
) -> Float[Array, ""]:
    """Returns the first step size of a layer's input, `2 mean(|x|) / sqrt(Q_P)`.

    Args:
        x: inputs of the layer on calibration images.
        bits: number of bits.
        signed: whether the codes are signed; decides Q_P, the largest code.

    References:
        Esser et al., Learned Step Size Quantization, ICLR 2020, section 2.1.
    """
    _, high = code_range(bits, signed=signed)
    step = 2 * jnp.mean(jnp.abs(x)) / jnp.sqrt(high).astype(x.dtype)
    return jnp.maximum(step, MIN_STEP_SIZE)


def _fake_quant_weight(w, step_size, bits, *, max_bits, grad_scale):
    del max_bits
    return fake_quant(w, step_size, bits, signed=True, grad_scale=grad_scale)


def _weight_codes(w, step_size, bits, *, max_bits):
    del max_bits
    return codes(w, step_size, bits, signed=True), jnp.asarray(step_size, w.dtype)


ACTS = ActQuantizer(fake_quant, codes, init_act_step)
QUANTIZER = Quantizer(
    WeightQuantizer(_fake_quant_weight, _weight_codes, init_weight_step, shared_step_size=False),
    ACTS,
)

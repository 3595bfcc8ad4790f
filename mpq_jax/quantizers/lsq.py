"""LSQ: uniform quantization with a learned step size, one per tensor.

References:
    Esser et al., Learned Step Size Quantization, ICLR 2020, https://arxiv.org/abs/1902.08153.
    Tang et al., Retraining-free Model Quantization via One-Shot Weight-Coupling Learning,
    CVPR 2024, https://arxiv.org/abs/2401.01543 (the three-sigma rule of first step sizes).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from jaxtyping import ArrayLike as AnyArray  # also accepts Python and NumPy numbers

from mpq_jax.quantizers.base import ActQuantizer, Quantizer, WeightQuantizer

MIN_STEP_SIZE = 1e-8  # keeps step sizes positive and x / step_size finite
LEAST_ERROR_BITS = 6  # from here on, clipping is most of the error of the three-sigma rule
RANGES = 8  # that `init_weight_step_by_error` compares


def code_range(
    bits: Int[AnyArray, "*#shape"], *, signed: bool | Bool[Array, ""]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Computes the smallest and the largest integer code (-Q_N and Q_P) of a bit-width.

    Args:
        bits: bits per value, traced or not.
        signed: whether codes are signed (two's complement) or unsigned.
    """
    levels = jnp.ldexp(jnp.float32(1), jnp.asarray(bits, jnp.int32))  # exact, even for 32 bits
    low = jnp.where(signed, -levels / 2, 0.0)
    return low, low + levels - 1


def in_steps(x, step_size):
    """Computes `x / step_size` in the one form that all code must share for codes to agree.

    XLA rewrites a division as this product in some programs but not in others, which changes the
    rounding of ties. With the product written out, all programs agree bit for bit.
    """
    return x * (1 / step_size)


@jax.custom_vjp
def _fake_quant(x, step_size, low, high, grad_scale):
    return jnp.round(jnp.clip(in_steps(x, step_size), low, high)) * step_size


def _fake_quant_forward(x, step_size, low, high, grad_scale):
    # Residuals are the inputs alone: `x` is in memory anyway, the others are scalars.
    return _fake_quant(x, step_size, low, high, grad_scale), (x, step_size, low, high, grad_scale)


def _fake_quant_backward(residuals, gradient):
    x, step_size, low, high, grad_scale = residuals
    v = in_steps(x, step_size)
    # Compare in the units of x, where `code * step_size` equals a bound exactly for any step size.
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
    """Rounds `x` to the nearest multiple of `step_size` that `bits` bits can represent.

    The code is `x * (1 / step_size)`, rounded half to even. The gradient with respect to `x` passes
    where `x` lies in the range of the codes, bounds included, and is zero elsewhere. The gradient
    with respect to `step_size` is `code - x / step_size` inside the range and the violated bound
    outside of it (Eq. 3). Reverse-mode differentiation only.

    Args:
        x: values.
        step_size: width of one level (s in the paper), positive, in the units of `x`.
        bits: number of bits, a traced integer: changing it never recompiles.
        signed: whether the codes are signed; traced or not.
        grad_scale: factor of the step size's gradient; 1 / sqrt(x.size * largest code) in the
            paper. None is 1.

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
    """Computes the int32 codes that `fake_quant` multiplies by `step_size`; same arguments."""
    low, high = code_range(bits, signed=signed)
    v = in_steps(x, jnp.asarray(step_size, x.dtype))
    return jnp.round(jnp.clip(v, low.astype(x.dtype), high.astype(x.dtype))).astype(jnp.int32)


def init_weight_step(w: Float[Array, "*shape"], bits: Int[AnyArray, ""]) -> Float[Array, ""]:
    """Computes the initial step size of a weight tensor by the three-sigma rule.

    The step size is `max(|mean - 3 sigma|, |mean + 3 sigma|) / 2^(bits - 1)`, with the unbiased
    standard deviation sigma of the whole tensor. Step sizes of different bit-widths are nested:
    one bit more halves the step size. A tensor of zeros, whose weights could never leave the range
    of a tiny step size, gets that of weights whose variance is 1 over their number per output.

    References:
        The weight quantizer's initialization in RFQuant's published code.
    """
    _, high = code_range(bits, signed=True)
    return _three_sigma(w) / (high + 1).astype(w.dtype)


def init_weight_step_by_error(
    w: Float[Array, "*shape"], bits: Int[AnyArray, ""]
) -> Float[Array, ""]:
    """Computes the initial step size of a weight tensor that keeps a trained network intact.

    From 6 bits, it is the one of the least mean squared error whose range ends between three sigma
    and the largest weight: with that many codes, the few weights beyond three sigma would make most
    of the error. With fewer bits, it is `init_weight_step`. The error of rounding is taken to be
    `step_size^2 / 12`, so that a kernel is read once for all bits.
    """
    _, high = code_range(bits, signed=True)
    narrow, size = _three_sigma(w), jnp.abs(w)
    largest = jnp.where(jnp.max(size) > 0, jnp.max(size), narrow)
    share = jnp.linspace(0, 1, RANGES, dtype=w.dtype)
    ends = narrow ** (1 - share) * largest**share
    clipping = jax.vmap(lambda end: jnp.mean(jnp.maximum(size - end, 0) ** 2))(ends)
    steps = ends / high.astype(w.dtype)
    error = clipping + steps**2 / 12
    best = jnp.max(jnp.where(error <= jnp.min(error), steps, 0))
    three_sigma = narrow / (high + 1).astype(w.dtype)
    return jnp.where(jnp.asarray(bits) < LEAST_ERROR_BITS, three_sigma, best)


def _three_sigma(w: Float[Array, "*shape"]) -> Float[Array, ""]:
    """Computes the end of the three-sigma rule's range, positive also for zeros."""
    mean, sigma = jnp.mean(w), jnp.std(w, ddof=1 if w.size > 1 else 0)
    end = jnp.maximum(jnp.abs(mean - 3 * sigma), jnp.abs(mean + 3 * sigma))
    weights_per_output = w.size // w.shape[-1] if w.ndim else 1
    return jnp.where(end > 0, end, 3 * max(weights_per_output, 1) ** -0.5)


def init_act_step(
    x: Float[Array, "*shape"], bits: Int[AnyArray, ""], *, signed: bool | Bool[Array, ""]
) -> Float[Array, ""]:
    """Computes the initial step size of a layer's input, `2 mean(|x|) / sqrt(Q_P)`.

    Inputs that are all zero get that of normal ones with variance 1.

    Args:
        x: inputs of the layer on calibration images.
        bits: number of bits.
        signed: whether the codes are signed, which determines the largest code Q_P.

    References:
        Esser et al., Learned Step Size Quantization, ICLR 2020, section 2.1.
    """
    _, high = code_range(bits, signed=signed)
    mean = jnp.mean(jnp.abs(x))
    mean = jnp.where(mean > 0, mean, (2 / math.pi) ** 0.5)
    return jnp.maximum(2 * mean / jnp.sqrt(high).astype(x.dtype), MIN_STEP_SIZE)


def _fake_quant_weight(w, step_size, bits, *, max_bits, grad_scale):
    del max_bits
    return fake_quant(w, step_size, bits, signed=True, grad_scale=grad_scale)


def _weight_codes(w, step_size, bits, *, max_bits):
    del max_bits
    return codes(w, step_size, bits, signed=True), jnp.asarray(step_size, w.dtype)


ACTS = ActQuantizer(fake_quant, codes, init_act_step)
QUANTIZER = Quantizer(
    WeightQuantizer(
        _fake_quant_weight, _weight_codes, init_weight_step_by_error, shared_step_size=False
    ),
    ACTS,
)
# The first step sizes of RFQuant's published code.
THREE_SIGMA = QUANTIZER._replace(weights=QUANTIZER.weights._replace(init_step=init_weight_step))

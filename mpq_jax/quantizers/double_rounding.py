"""Double Rounding: low-bit weights derived from the integer codes of the highest precision.

With h the highest bits, l the wanted bits, D = h - l and s the learned step size of h bits,

    W_h = clip(round(w / s), -2^(h-1), 2^(h-1) - 1)      the stored integers
    W_l = clip(round(W_h / 2^D), -2^(l-1), 2^(l-1) - 1)  the switched integers, worth s 2^D each

One tie rule holds everywhere: halves go to the even code. It is unbiased: at D = 1 every odd W_h
is a tie, and always rounding it up would raise the mean weight by a quarter of a code. `fake_quant`
(training), `codes` and `switch` (integers alone) agree bit for bit.

References:
    Nearly Lossless Adaptive Bit Switching, https://arxiv.org/abs/2502.01565.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from jaxtyping import ArrayLike as AnyArray

from mpq_jax.quantizers import lsq
from mpq_jax.quantizers.base import Quantizer, WeightQuantizer

HIGHEST = (2, 16)  # smallest and largest `highest`, but for kernels of nothing but zeros
NO_BITS = 0  # `highest` of such a kernel: its one code is zero


def codes(
    w: Float[Array, "*shape"], step_size: Float[AnyArray, ""], *, max_bits: int
) -> Int[Array, "*shape"]:
    """Returns the integers that are stored: int32 codes of the highest precision (W_h).

    Args:
        w: weights.
        step_size: width of one code at the highest precision (s_h), positive.
        max_bits: bits of the highest precision, 2 to 16; 0: of a kernel of zeros.
    """
    _check(max_bits)
    return lsq.codes(w, step_size, max_bits, signed=True)


def switch(
    codes: Int[Array, "*shape"], bits: Int[AnyArray, ""], *, max_bits: int
) -> Int[Array, "*shape"]:
    """Returns the codes of a lower precision (W_l) from those of the highest, by integers alone.

    Rounds `codes / 2^(max_bits - bits)` to nearest, halves to even, and clips to the range of
    `bits` bits.

    Args:
        codes: of `codes(...)`, any signed integer type that holds them.
        bits: wanted bits, traced or not; 2 to `max_bits`.
        max_bits: bits of the stored codes.

    Returns:
        Codes of the same type.
    """
    _check(max_bits, bits)
    wide = codes.astype(jnp.int32)
    return _halve(wide, _halvings(bits, max_bits), jnp.asarray(bits, jnp.int32)).astype(codes.dtype)


def _halve(wide, halvings, bits):
    below = jnp.left_shift(1, halvings) - 1  # mask of the bits that go
    rest, half = wide & below, jnp.left_shift(1, halvings) >> 1
    floor = jnp.right_shift(wide, halvings)
    up = (rest > half) | ((rest == half) & (floor & 1 == 1) & (halvings > 0))
    top = jnp.left_shift(1, jnp.maximum(bits, 1) - 1)
    return jnp.clip(floor + up.astype(jnp.int32), -top, top - 1)


def _floor(wide, halvings, bits):
    del bits  # a shifted code is in range
    return jnp.right_shift(wide, halvings)


def _halvings(bits, max_bits: int) -> Int[Array, ""]:
    return max_bits - jnp.asarray(bits, jnp.int32)


def _check(max_bits: int, bits: Any = None) -> None:
    if max_bits != NO_BITS and not HIGHEST[0] <= max_bits <= HIGHEST[1]:
        raise ValueError(f"highest is {max_bits}; wanted {HIGHEST[0]} to {HIGHEST[1]} bits")
    least = min(HIGHEST[0], max_bits)
    if isinstance(bits, int | np.integer) and not least <= bits <= max_bits:
        raise ValueError(f"bits is {bits}; wanted {least} to {max_bits}, the highest")


def _lower_codes(reduce, w, step_size, bits, max_bits):
    """Returns the codes of `bits` bits and the width of one (s_h 2^D)."""
    halvings = _halvings(bits, max_bits)
    stored = lsq.codes(w, step_size, max_bits, signed=True)
    return reduce(stored, halvings, bits), _width(step_size, halvings)


def _width(step_size: Float[Array, ""], halvings: Int[Array, ""]) -> Float[Array, ""]:
    """Returns s_h 2^D, the width of a lower precision's code; a power of two makes it exact."""
    return step_size * jnp.ldexp(jnp.ones((), step_size.dtype), halvings)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fake_quant(reduce, max_bits, w, step_size, bits, grad_scale):
    lower, width = _lower_codes(reduce, w, step_size, bits, max_bits)
    return lower.astype(w.dtype) * width


def _fake_quant_forward(reduce, max_bits, w, step_size, bits, grad_scale):
    out = _fake_quant(reduce, max_bits, w, step_size, bits, grad_scale)
    return out, (w, step_size, bits, grad_scale)


def _fake_quant_backward(reduce, max_bits, residuals, gradient):
    w, step_size, bits, grad_scale = residuals
    lower, width = _lower_codes(reduce, w, step_size, bits, max_bits)
    low, high = lsq.code_range(bits, signed=True)
    low, high = low.astype(w.dtype), high.astype(w.dtype)
    # Compared in the units of w, as in LSQ: there `code * width` meets a bound exactly.
    inside = (w >= low * width) & (w <= high * width)
    offset = jnp.where(inside, lower.astype(w.dtype) - lsq.in_steps(w, width), 0)
    bound = jnp.where(w > high * width, high, low)
    per_code = jnp.where(inside, offset, bound)
    step_gradient = jnp.sum(gradient * per_code) * (width / step_size) * grad_scale
    return jnp.where(inside, gradient, 0), step_gradient, None, None


_fake_quant.defvjp(_fake_quant_forward, _fake_quant_backward)


def fake_quant(
    w: Float[Array, "*shape"],
    step_size: Float[AnyArray, ""],
    bits: Int[AnyArray, ""],
    *,
    max_bits: int,
    grad_scale: Float[AnyArray, ""] | None = None,
) -> Float[Array, "*shape"]:
    """Returns weights quantized to `bits` bits by way of the codes of the highest precision.

    Equals `switch(codes(w, step_size), bits) * (step_size * 2^D)` exactly. The gradient in `w`
    passes where `w` lies in the range of `bits` bits, bounds included. The gradient in
    `step_size` is that of LSQ for the width s_h 2^D, times 2^D: `W_l - w / (s_h 2^D)` inside the
    range and the violated bound outside. Reverse-mode differentiation only.

    Args:
        w: weights.
        step_size: width of one code at the highest precision (s_h), positive.
        bits: wanted bits, traced: changing them never recompiles; 2 to `max_bits`.
        max_bits: bits of the highest precision, 2 to 16; 0: of a kernel of zeros.
        grad_scale: factor of the gradient in `step_size`; None leaves it as it is.
    """
    return _weight_fake_quant(_halve, w, step_size, bits, max_bits=max_bits, grad_scale=grad_scale)


def _weight_fake_quant(reduce, w, step_size, bits, *, max_bits, grad_scale) -> Any:
    _check(max_bits, bits)
    scale = jnp.asarray(1.0 if grad_scale is None else grad_scale, w.dtype)
    step_size = jnp.asarray(step_size, w.dtype)
    return _fake_quant(reduce, max_bits, w, step_size, jnp.asarray(bits, jnp.int32), scale)


def _weight_codes(reduce, w, step_size, bits, *, max_bits):
    _check(max_bits)
    step_size = jnp.asarray(step_size, w.dtype)
    return _lower_codes(reduce, w, step_size, jnp.asarray(bits, jnp.int32), max_bits)


def _of_highest(w, width, bits, max_bits: int) -> Array:
    """Returns s_h of a precision's own width of a code, s_h 2^D."""
    return _width(jnp.asarray(width, w.dtype), -_halvings(bits, max_bits))


def _unshared_fake_quant(w, step_size, bits, *, max_bits, grad_scale) -> Any:
    own = _of_highest(w, step_size, bits, max_bits)
    return _weight_fake_quant(_halve, w, own, bits, max_bits=max_bits, grad_scale=grad_scale)


def _unshared_codes(w, step_size, bits, *, max_bits):
    return _weight_codes(
        _halve, w, _of_highest(w, step_size, bits, max_bits), bits, max_bits=max_bits
    )


def _stored_codes(w, step_size, bits, *, max_bits):
    width = _width(jnp.asarray(step_size), _halvings(bits, max_bits))
    return switch(w.astype(jnp.int32), bits, max_bits=max_bits), width


def _stored_values(w, step_size, bits, *, max_bits, grad_scale) -> Array:
    del grad_scale  # integers do not learn
    lower, width = _stored_codes(w, step_size, bits, max_bits=max_bits)
    return lower.astype(width.dtype) * width


def _stored_step(w, bits):
    raise TypeError("stored integers come with their step size; it cannot be found from them")


def _sharing(reduce) -> Quantizer:
    weights = WeightQuantizer(
        functools.partial(_weight_fake_quant, reduce),
        functools.partial(_weight_codes, reduce),
        lsq.init_weight_step,
        shared_step_size=True,
        switchable=reduce is _halve,
    )
    return Quantizer(weights, lsq.ACTS)


QUANTIZER = _sharing(_halve)
FLOORED = _sharing(_floor)  # an arithmetic shift instead of rounding (ablation)
# Each precision learns the width of its own codes ("Ours*"); then float weights must be kept.
UNSHARED = Quantizer(
    WeightQuantizer(
        _unshared_fake_quant, _unshared_codes, lsq.init_weight_step, shared_step_size=False
    ),
    lsq.ACTS,
)
# Of kernels that are the stored integers themselves (`codes`): no float weight is needed.
STORED = Quantizer(
    WeightQuantizer(
        _stored_values, _stored_codes, _stored_step, shared_step_size=True, switchable=True
    ),
    lsq.ACTS,
)

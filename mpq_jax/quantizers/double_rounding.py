"""Double Rounding: low-bit weights derived from the integer codes of the highest precision.

With h the highest bit-width, l the target bit-width, D = h - l and s the learned step size of h
bits,

    W_h = clip(round(w / s), -2^(h-1), 2^(h-1) - 1)      the stored codes, of width s
    W_l = clip(round(W_h / 2^D), -2^(l-1), 2^(l-1) - 1)  the switched codes, of width s 2^D

All rounding is half to even, which is unbiased: for D = 1, every odd W_h is a tie, and rounding
ties up would raise the mean weight by a quarter of a code. `fake_quant` (training), `codes` and
`switch` (integers alone) agree bit for bit.

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

MAX_BITS_RANGE = (2, 16)  # smallest and largest `max_bits`, except for all-zero kernels
NO_BITS = 0  # `max_bits` of an all-zero kernel, whose only code is zero


def codes(
    w: Float[Array, "*shape"], step_size: Float[AnyArray, ""], *, max_bits: int
) -> Int[Array, "*shape"]:
    """Computes the codes to store: int32 codes of the highest precision (W_h).

    Args:
        w: weights.
        step_size: width of one code at the highest precision (s_h), positive.
        max_bits: bit-width of the highest precision, 2 to 16; 0 for an all-zero kernel.
    """
    _check(max_bits)
    return lsq.codes(w, step_size, max_bits, signed=True)


def switch(
    codes: Int[Array, "*shape"], bits: Int[AnyArray, ""], *, max_bits: int
) -> Int[Array, "*shape"]:
    """Derives the codes of a lower precision (W_l) from the stored ones by integer arithmetic.

    Rounds `codes / 2^(max_bits - bits)` half to even and clips it to the range of `bits` bits.

    Args:
        codes: stored codes, see `codes`; any signed integer dtype that holds them.
        bits: target bit-width, traced or not; 2 to `max_bits`.
        max_bits: bit-width of the stored codes.

    Returns:
        Codes of the same dtype.
    """
    _check(max_bits, bits)
    wide = codes.astype(jnp.int32)
    return _halve(wide, _halvings(bits, max_bits), jnp.asarray(bits, jnp.int32)).astype(codes.dtype)


def _halve(wide, halvings, bits):
    below = jnp.left_shift(1, halvings) - 1  # mask of the dropped bits
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
    low, high = MAX_BITS_RANGE
    if max_bits != NO_BITS and not low <= max_bits <= high:
        raise ValueError(f"max_bits is {max_bits}; wanted {low} to {high}")
    low = min(low, max_bits)
    if isinstance(bits, int | np.integer) and not low <= bits <= max_bits:
        raise ValueError(f"bits is {bits}; wanted {low} to {max_bits} (max_bits)")


def _lower_codes(reduce, w, step_size, bits, max_bits):
    """Computes the codes of `bits` bits and the width of one code (s_h 2^D)."""
    halvings = _halvings(bits, max_bits)
    stored = lsq.codes(w, step_size, max_bits, signed=True)
    return reduce(stored, halvings, bits), _width(step_size, halvings)


def _width(step_size: Float[Array, ""], halvings: Int[Array, ""]) -> Float[Array, ""]:
    """Computes s_h 2^D, the width of a code of lower precision; exact, by a power of two."""
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
    # Compare in the units of w, as in LSQ: there `code * width` equals a bound exactly.
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
    """Quantizes weights to `bits` bits through the codes of the highest precision.

    The result equals `switch(codes(w, step_size), bits) * (step_size * 2^D)` exactly. The gradient
    with respect to `w` passes where `w` lies in the range of `bits` bits, bounds included. The
    gradient with respect to `step_size` is 2^D times LSQ's for the width s_h 2^D, which is
    `W_l - w / (s_h 2^D)` inside the range and the violated bound outside of it. Reverse-mode
    differentiation only.

    Args:
        w: weights.
        step_size: width of one code at the highest precision (s_h), positive.
        bits: target bit-width, a traced integer: changing it never recompiles; 2 to `max_bits`.
        max_bits: bit-width of the highest precision, 2 to 16; 0 for an all-zero kernel.
        grad_scale: factor of the step size's gradient; None is 1.
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
    """Computes s_h from a precision's own step size, s_h 2^D."""
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
    raise TypeError("a step size cannot be derived from stored codes; use the one stored with them")


def _sharing(reduce) -> Quantizer:
    weights = WeightQuantizer(
        functools.partial(_weight_fake_quant, reduce),
        functools.partial(_weight_codes, reduce),
        lsq.init_weight_step_by_error,
        shared_step_size=True,
        switchable=reduce is _halve,
    )
    return Quantizer(weights, lsq.ACTS)


QUANTIZER = _sharing(_halve)
FLOORED = _sharing(_floor)  # arithmetic shift instead of rounding (ablation)
# Every precision learns its own step size ("Ours*"), so float weights must be stored.
UNSHARED = Quantizer(
    WeightQuantizer(
        _unshared_fake_quant, _unshared_codes, lsq.init_weight_step_by_error, shared_step_size=False
    ),
    lsq.ACTS,
)
# For kernels that hold the stored codes themselves (`codes`), without float weights.
STORED = Quantizer(
    WeightQuantizer(
        _stored_values, _stored_codes, _stored_step, shared_step_size=True, switchable=True
    ),
    lsq.ACTS,
)

"""CSQ: weights as sums of gated bit planes, with gates that continuous sparsification makes binary.

With f(x) = sigmoid(temperature x), planes b = 0 (least significant) to n - 1, and a logit for every
bit and for every plane,

    W = s sum_b f(mask_b) 2^b / (2^n - 1) (f(positive_b) - f(negative_b))

As the temperature grows, the gates become zeros and ones by themselves: neither rounding nor a
straight-through estimator is needed. The number of planes that stay on is the layer's precision,
not counting the sign. Planes are the leading axis. Of all arrays of their size, only the logits
themselves are stored for the backward pass.

References:
    Xiao et al., CSQ: Growing Mixed-Precision Quantization Scheme with Bi-level Continuous
    Sparsification, DAC 2023, https://arxiv.org/abs/2212.02770.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from jaxtyping import ArrayLike as AnyArray

PLANES = (1, 16)  # smallest and largest number of planes
SHARPNESS = 2.0  # initial logit of a bit that is one; minus this for a bit that is zero
MASK_LOGIT = 2.0  # initial logit of every plane's gate: f = 0.88
MIN_SCALE = 1e-8  # keeps the planes of an all-zero tensor trainable
SCALES = tuple(part / 32 for part in range(6, 33))  # tried by `on_scheme`, times the largest weight
MAX_SIGNED_PLANES = 8  # active planes up to which `on_scheme` enumerates all 3^planes sums
SCALE_SAMPLE = 65_536  # weights of a tensor on which `on_scheme` compares scales


class BitPlanes(NamedTuple):
    """A weight tensor as bit planes, the least significant first.

    Attributes:
        positive: float32 [planes, *shape], logits of the positive bits.
        negative: float32 [planes, *shape], logits of the negative bits.
        mask: float32 [planes], logits of the planes' gates.
        scale: float32, largest weight that all planes together can represent (s).
    """

    positive: Float[Array, " planes *shape"]
    negative: Float[Array, " planes *shape"]
    mask: Float[Array, " planes"]
    scale: Float[Array, ""]


@jax.custom_jvp
def gate(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes sigmoid(x), with its derivative written as f(x) f(-x).

    The usual f(x) (1 - f(x)) underflows to zero in float32 above x = 17, but not below x = -17, so
    gates that are on would freeze while gates that are off would not.
    """
    return jax.nn.sigmoid(x)


gate.defjvps(lambda tangent, value, x: tangent * jax.nn.sigmoid(x) * jax.nn.sigmoid(-x))


def from_float(
    w: Float[Array, "*shape"],
    *,
    planes: int = 8,
    literal: bool = False,
    mask_logit: float = MASK_LOGIT,
    clip_rms: float | None = None,
) -> BitPlanes:
    """Converts a weight tensor to bit planes, quantized to `planes` bits and a sign.

    By default, `weights(result, 1.0)` equals the quantized tensor up to float rounding, and no
    logit is near a threshold, so that training can start from a trained model. As the temperature
    rises, all weights of the tensor grow by a common factor, up to 1 / ((f(k) - f(-k)) f(m)), 1.49
    for the default logits; a norm after the layer cancels it.

    Args:
        w: weights.
        planes: number of bit planes (n), 1 to 16.
        literal: whether to initialize as in the published code: logits of bits are the bit values 0
            and 1, logits of gates are 0. The weights are then 0.1164 times `w` at temperature
            1.0089.
        mask_logit: initial logit of every plane's gate (m), positive; not used if `literal`.
        clip_rms: clipping threshold as a multiple of the weights' root mean square, so that
            outliers do not determine the scale; None: the largest weight, as published.
    """
    if not PLANES[0] <= planes <= PLANES[1]:
        raise ValueError(f"planes is {planes}; wanted {PLANES[0]} to {PLANES[1]}")
    largest = jnp.max(jnp.abs(w))
    if clip_rms is not None:
        largest = jnp.minimum(largest, clip_rms * jnp.sqrt(jnp.mean(jnp.square(w))))
    unit = jnp.where(largest > 0, largest, 1.0)
    code = jnp.round(jnp.minimum(jnp.abs(w) / unit, 1.0) * (2**planes - 1)).astype(jnp.int32)
    plane = jnp.arange(planes, dtype=jnp.int32).reshape(-1, *(1,) * w.ndim)
    digits = (jnp.right_shift(code[None], plane) & 1).astype(w.dtype) * jnp.sign(w)[None]
    scale = jnp.maximum(largest, MIN_SCALE)
    if literal:
        positive, negative = ((digits == sign).astype(w.dtype) for sign in (1, -1))
        return BitPlanes(positive, negative, jnp.zeros((planes,), w.dtype), scale)
    positive, negative, unit_digit = _soft_bits(digits)
    mask = jnp.full((planes,), mask_logit, w.dtype)
    # The scale makes up for soft bits and gates, so that the weights at temperature 1 are exact.
    return BitPlanes(positive, negative, mask, scale / (unit_digit * gate(mask[0])))


def on_scheme(w: np.ndarray, mask: np.ndarray) -> BitPlanes:
    """Re-quantizes a weight tensor onto the active planes of a scheme, on the host in NumPy.

    Every weight becomes the nearest sum of active planes, each with the digit -1, 0 or 1 (beyond
    `MAX_SIGNED_PLANES` planes, all nonzero digits of a sum have the same sign). The scale is the
    one of `SCALES` with the smallest squared error. With hard gates of the planes, the weights at
    temperature 1 equal these sums up to float rounding; `from_float` describes higher temperatures.

    Args:
        w: float32 weights of any shape.
        mask: float32 [planes], logits of the planes' gates, copied to the result. Their signs alone
            determine the active planes, with contiguous planes too.
    """
    active = np.flatnonzero(planes_on(mask))
    digits, values = _sums(active)
    flat, top = np.abs(w).ravel(), max(values[-1], 1)
    sample = flat[:: max(1, flat.size // SCALE_SAMPLE)]
    steps = [max(flat.max() / top * part, MIN_SCALE) for part in SCALES]
    errors = [np.square(sample - values[_nearest(values, sample / s)] * s).sum() for s in steps]
    step = steps[int(np.argmin(errors))]
    chosen = digits[_nearest(values, flat / step)] * np.sign(w).ravel()[:, None].astype(np.int8)
    planes = np.zeros((len(mask), *w.shape), np.float32)
    planes[active] = chosen.T.reshape(len(active), *w.shape)
    positive, negative, unit_digit = _soft_bits(planes)
    scale = jnp.float32(step * (2 ** len(mask) - 1) / float(unit_digit))
    return BitPlanes(positive, negative, jnp.asarray(mask, jnp.float32), scale)


def _soft_bits(digits: Float[Array | np.ndarray, " planes *shape"]) -> tuple[Array, Array, Array]:
    """Returns positive and negative logits of digits -1, 0, 1, and the digit 1 at temperature 1."""
    sharp = jnp.asarray(SHARPNESS, digits.dtype)
    unit_digit = gate(sharp) - gate(-sharp)
    return jnp.where(digits > 0, sharp, -sharp), jnp.where(digits < 0, sharp, -sharp), unit_digit


def _sums(active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Enumerates the non-negative sums of planes: their digits, and the ascending sums.

    If several combinations of digits have the same sum, the one with the fewest digits is chosen.
    """
    digits = (0, 1, -1) if len(active) <= MAX_SIGNED_PLANES else (0, 1)
    ways = np.array([*itertools.product(digits, repeat=len(active))], np.int8)
    sums = ways @ (1 << active.astype(np.int64))
    order = np.argsort(np.abs(ways).sum(axis=1), kind="stable")
    order = order[sums[order] >= 0]
    values, first = np.unique(sums[order], return_index=True)
    return ways[order][first], values


def _nearest(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Finds the index of the value nearest to each x; `values` are ascending."""
    return np.searchsorted((values[1:] + values[:-1]) / 2, x)


def significances(planes: int) -> Float[Array, " planes"]:
    """Computes the significance of every plane's bits, 2^b / (2^n - 1) (c_b); the sum is one."""
    return jnp.ldexp(jnp.ones((planes,), jnp.float32), jnp.arange(planes, dtype=jnp.int32)) / (
        2**planes - 1
    )


def plane_gates(
    mask: Float[Array, " planes"],
    temperature: Float[AnyArray, ""],
    *,
    contiguous: bool = False,
) -> Float[Array, " planes"]:
    """Computes the gate of every plane, between 0 (off) and 1 (on).

    Args:
        mask: logits of the planes.
        temperature: sharpness of the gates (beta).
        contiguous: whether the gate of a plane is multiplied by those of all more significant
            planes, so that k active planes form a signed integer of k + 1 bits.
    """
    gates = gate(jnp.asarray(temperature, mask.dtype) * mask)
    return jnp.cumprod(gates[::-1])[::-1] if contiguous else gates


def combine(
    planes: BitPlanes, gates: Float[Array, " planes"], temperature: Float[AnyArray, ""]
) -> Float[Array, "*shape"]:
    """Computes the weights from soft bits and given gates of the planes.

    Only the arguments are stored for the backward pass, which recomputes everything else.
    """
    beta = jnp.asarray(temperature, planes.positive.dtype)
    return _combine(planes.positive, planes.negative, gates, planes.scale, beta)


def _along(per_plane: Array, planes: Array) -> Array:
    """Reshapes one number per plane to broadcast along the planes."""
    return per_plane.reshape(-1, *(1,) * (planes.ndim - 1))


@jax.custom_vjp
def _combine(positive, negative, gates, scale, beta):
    worth = gates * significances(len(gates)).astype(gates.dtype)
    planes = zip(worth, positive, negative, strict=True)
    # XLA fuses this unrolled sum with the digits, so no array of all digits is ever stored. On CPU
    # it is also twenty times faster than a reduction over the leading axis.
    return scale * sum(
        w * (jax.nn.sigmoid(beta * p) - jax.nn.sigmoid(beta * n)) for w, p, n in planes
    )


def _combine_forward(*inputs):
    return _combine(*inputs), inputs


def _combine_backward(inputs, gradient):
    # The same gates are written as a different formula in each place, f(x) = (1 + tanh(x / 2)) / 2
    # here. Otherwise XLA's common-subexpression elimination would keep those of the forward pass in
    # memory until the backward pass.
    positive, negative, gates, scale, beta = inputs
    factors = significances(len(gates)).astype(gates.dtype)
    digits = (jnp.tanh(beta / 2 * positive) - jnp.tanh(beta / 2 * negative)) / 2
    by_plane = factors * jnp.sum(gradient[None] * digits, axis=tuple(range(1, digits.ndim)))
    factor = _along(scale * beta * gates * factors, positive)
    of_positive = factor * gradient[None] * _slope(beta * positive)
    of_negative = -factor * gradient[None] * _slope(beta * negative)
    of_scale = jnp.sum(gates * by_plane)
    return of_positive, of_negative, scale * by_plane, of_scale, None


def _slope(x):
    """Computes f(x) f(-x), without underflow for |x| up to 87 on both sides."""
    below = jnp.exp(-jnp.abs(x))
    return below / jnp.square(1 + below)


_combine.defvjp(_combine_forward, _combine_backward)


def weights(
    bit_planes: BitPlanes, temperature: Float[AnyArray, ""], *, contiguous: bool = False
) -> Float[Array, "*shape"]:
    """Computes the soft weights at a temperature, differentiable in all logits and the scale.

    Args:
        bit_planes: planes of the tensor.
        temperature: sharpness of all gates (beta), traced; 1 to 200 in the paper.
        contiguous: see `plane_gates`.

    References:
        CSQ, https://arxiv.org/abs/2212.02770, the bi-level formulation.
    """
    gates = plane_gates(bit_planes.mask, temperature, contiguous=contiguous)
    return combine(bit_planes, gates, temperature)


def planes_on(
    mask: Float[AnyArray, " planes"], *, contiguous: bool = False
) -> Bool[Array, " planes"]:
    """Finds the planes that are on: those whose logit is at least zero.

    This is the only definition; counting, binarizing and export use it.

    Args:
        mask: logits of the planes.
        contiguous: whether a plane can be on only if all more significant planes are.
    """
    on = jnp.asarray(mask) >= 0
    return jnp.cumprod(on[::-1].astype(jnp.int32))[::-1] == 1 if contiguous else on


def active_planes(bit_planes: BitPlanes, *, contiguous: bool = False) -> Bool[Array, " planes"]:
    """Finds the planes of a tensor that are on; see `planes_on`."""
    return planes_on(bit_planes.mask, contiguous=contiguous)


def codes(
    bit_planes: BitPlanes, *, contiguous: bool = False
) -> tuple[Int[Array, "*shape"], Float[Array, ""]]:
    """Computes the integer codes of binary planes, and the width of one code (the step size).

    A bit is one if its logit is above zero. The codes are divided by the significance of the lowest
    active plane b0, and the step size is multiplied by it.

    Returns:
        int32 codes, all zero if no plane is active; and the step size, s 2^b0 / (2^n - 1).
    """
    planes = len(bit_planes.mask)
    active = active_planes(bit_planes, contiguous=contiguous)
    lowest = jnp.argmax(active).astype(jnp.int32)  # 0 if there is none
    plane = jnp.arange(planes, dtype=jnp.int32)
    worth = jnp.where(active, jnp.left_shift(1, jnp.maximum(plane - lowest, 0)), 0)
    integers = jnp.zeros(bit_planes.positive.shape[1:], jnp.int32)
    for w, p, n in zip(worth, bit_planes.positive, bit_planes.negative, strict=True):
        integers += w * ((p > 0).astype(jnp.int32) - (n > 0).astype(jnp.int32))  # see `_combine`
    scale = bit_planes.scale
    # A product instead of a division, so that all programs agree; see `lsq.in_steps`.
    step = scale * jnp.ldexp(jnp.ones((), scale.dtype), lowest) * (1 / (2**planes - 1))
    return integers, step


def hard_weights(bit_planes: BitPlanes, *, contiguous: bool = False) -> Float[Array, "*shape"]:
    """Computes the weights with hard gates: exactly the codes of `codes` times their step size."""
    integers, step = codes(bit_planes, contiguous=contiguous)
    return integers.astype(step.dtype) * step

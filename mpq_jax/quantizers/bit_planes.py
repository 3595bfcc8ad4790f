"""CSQ: weights as sums of gated bit planes; continuous sparsification makes both levels binary.

With f(x) = sigmoid(temperature x), planes b = 0 (least significant) to n - 1 and a logit for every
bit and for every plane,

    W = s sum_b f(mask_b) 2^b / (2^n - 1) (f(positive_b) - f(negative_b))

As the temperature grows the gates become zeros and ones by themselves: neither rounding nor a
straight-through estimator is needed. How many planes stay on is the layer's precision, sign not
counted. Planes are on the leading axis, and nothing of their size is kept for the backward pass
but the logits themselves.

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
SHARPNESS = 2.0  # logit of a bit at the function-preserving start, and minus that of no bit
MASK_LOGIT = 2.0  # logit of every plane's gate at that start: f = 0.88
SMALLEST_SCALE = 1e-8  # of an all-zero tensor, so that its planes can learn
SCALES = tuple(part / 32 for part in range(6, 33))  # tried by `on_scheme`, times the largest weight
MOST_MIXED = 8  # active planes up to which `on_scheme` goes through all 3^planes sums
SCALE_SAMPLE = 65_536  # weights of a tensor that its scale is chosen by


class BitPlanes(NamedTuple):
    """A weight tensor as bit planes, the least significant first.

    Attributes:
        positive: float32 [planes, *shape], logits of the bits that add.
        negative: float32 [planes, *shape], logits of the bits that subtract.
        mask: float32 [planes], logits of the planes' gates.
        scale: float32, the largest weight that all planes together can name (s).
    """

    positive: Float[Array, " planes *shape"]
    negative: Float[Array, " planes *shape"]
    mask: Float[Array, " planes"]
    scale: Float[Array, ""]


@jax.custom_jvp
def gate(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns sigmoid(x), with the derivative f(x) f(-x).

    The usual f(x) (1 - f(x)) is zero in float32 from x = 17 on, but not below x = -17: gates that
    are on would freeze, and gates that are off would not.
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
    """Returns bit planes of a weight tensor, quantized to `planes` bits and a sign.

    By default `weights(result, 1.0)` equals the quantized tensor to float rounding, and no logit is
    near a threshold, so that training can start from a trained model. As the temperature rises, all
    weights of the tensor grow by one common factor, up to
    1 / ((f(k) - f(-k)) f(m)), 1.49 with the default logits; a norm after the layer takes it out.

    Args:
        w: weights.
        planes: number of bit planes (n), 1 to 16.
        literal: start from bit values 0 and 1 as logits and gates at 0, as in the published code.
            Then weights are 0.1164 times those of `w` at temperature 1.0089.
        mask_logit: positive logit of every plane's gate (m) at the function-preserving start.
        clip_rms: clipping threshold in root mean squares of the weights, so that outliers do not
            set the scale; None: the largest weight does, as published.
    """
    if not PLANES[0] <= planes <= PLANES[1]:
        raise ValueError(f"planes is {planes}; wanted {PLANES[0]} to {PLANES[1]}")
    largest = jnp.max(jnp.abs(w))
    if clip_rms is not None:
        largest = jnp.minimum(largest, clip_rms * jnp.sqrt(jnp.mean(jnp.square(w))))
    unit = jnp.where(largest > 0, largest, 1.0)
    code = jnp.round(jnp.minimum(jnp.abs(w) / unit, 1.0) * (2**planes - 1)).astype(jnp.int32)
    place = jnp.arange(planes, dtype=jnp.int32).reshape(-1, *(1,) * w.ndim)
    digits = (jnp.right_shift(code[None], place) & 1).astype(w.dtype) * jnp.sign(w)[None]
    scale = jnp.maximum(largest, SMALLEST_SCALE)
    if literal:
        positive, negative = ((digits == sign).astype(w.dtype) for sign in (1, -1))
        return BitPlanes(positive, negative, jnp.zeros((planes,), w.dtype), scale)
    positive, negative, one = _soft_bits(digits)
    mask = jnp.full((planes,), mask_logit, w.dtype)
    return BitPlanes(positive, negative, mask, scale / (one * gate(mask[0])))


def on_scheme(w: np.ndarray, mask: np.ndarray) -> BitPlanes:
    """Returns planes that name a weight tensor as well as the active planes of a scheme can.

    Every weight becomes the nearest sum of active planes, each of which may add, subtract or rest
    (beyond `MOST_MIXED` planes: all of a sum's planes with one sign); the scale is the best of
    `SCALES` by the squared error. With masks that are zeros and ones, weights at temperature 1
    are these sums to float rounding; see `from_float` for what follows.
    On the host, in NumPy.

    Args:
        w: float32, any shape.
        mask: float32 [planes], logits of the masks; they are kept, and their signs alone say which
            planes are active, also where these are contiguous.
    """
    active = np.flatnonzero(planes_on(mask))
    digits, values = _sums(active)
    flat, top = np.abs(w).ravel(), max(values[-1], 1)
    sample = flat[:: max(1, flat.size // SCALE_SAMPLE)]
    steps = [max(flat.max() / top * part, SMALLEST_SCALE) for part in SCALES]
    errors = [np.square(sample - values[_nearest(values, sample / s)] * s).sum() for s in steps]
    step = steps[int(np.argmin(errors))]
    chosen = digits[_nearest(values, flat / step)] * np.sign(w).ravel()[:, None].astype(np.int8)
    planes = np.zeros((len(mask), *w.shape), np.float32)
    planes[active] = chosen.T.reshape(len(active), *w.shape)
    positive, negative, one = _soft_bits(planes)
    scale = jnp.float32(step * (2 ** len(mask) - 1) / float(one))
    return BitPlanes(positive, negative, jnp.asarray(mask, jnp.float32), scale)


def _soft_bits(digits: Float[Array | np.ndarray, " planes *shape"]) -> tuple[Array, Array, Array]:
    """Returns logits of digits -1, 0 and 1, and what a digit of one is by them at temperature 1."""
    sharp = jnp.asarray(SHARPNESS, digits.dtype)
    one = gate(sharp) - gate(-sharp)
    return jnp.where(digits > 0, sharp, -sharp), jnp.where(digits < 0, sharp, -sharp), one


def _sums(active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns all sums from zero up that planes can name, ascending, and their digits.

    Of several ways to name a sum, the one with the fewest digits is taken.
    """
    digits = (0, 1, -1) if len(active) <= MOST_MIXED else (0, 1)
    ways = np.array([*itertools.product(digits, repeat=len(active))], np.int8)
    sums = ways @ (1 << active.astype(np.int64))
    order = np.argsort(np.abs(ways).sum(axis=1), kind="stable")
    order = order[sums[order] >= 0]
    values, first = np.unique(sums[order], return_index=True)
    return ways[order][first], values


def _nearest(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Returns the index of the value nearest to each x; values ascend."""
    return np.searchsorted((values[1:] + values[:-1]) / 2, x)


def significances(planes: int) -> Float[Array, " planes"]:
    """Returns what a bit of each plane is worth, 2^b / (2^n - 1) (c_b): their sum is one."""
    return jnp.ldexp(jnp.ones((planes,), jnp.float32), jnp.arange(planes, dtype=jnp.int32)) / (
        2**planes - 1
    )


def plane_gates(
    mask: Float[Array, " planes"],
    temperature: Float[AnyArray, ""],
    *,
    contiguous: bool = False,
) -> Float[Array, " planes"]:
    """Returns how far every plane is on, 0 to 1.

    Args:
        mask: logits of the planes.
        temperature: sharpness of the gates (beta).
        contiguous: a plane is on only as far as all more significant ones are, so that k planes
            make one whole signed integer of k + 1 bits.
    """
    gates = gate(jnp.asarray(temperature, mask.dtype) * mask)
    return jnp.cumprod(gates[::-1])[::-1] if contiguous else gates


def combine(
    planes: BitPlanes, gates: Float[Array, " planes"], temperature: Float[AnyArray, ""]
) -> Float[Array, "*shape"]:
    """Returns the weights for given gates of the planes; the bits are soft.

    Only the arguments are kept for the backward pass; everything else is computed anew.
    """
    beta = jnp.asarray(temperature, planes.positive.dtype)
    return _combine(planes.positive, planes.negative, gates, planes.scale, beta)


def _along(per_plane: Array, planes: Array) -> Array:
    """Returns one number per plane in a shape that meets the planes."""
    return per_plane.reshape(-1, *(1,) * (planes.ndim - 1))


@jax.custom_vjp
def _combine(positive, negative, gates, scale, beta):
    worth = gates * significances(len(gates)).astype(gates.dtype)
    planes = zip(worth, positive, negative, strict=True)
    # A sum written out fuses with the digits, which then never exist as a whole; XLA's CPU
    # reductions over a leading axis are also twenty times slower than this.
    return scale * sum(
        w * (jax.nn.sigmoid(beta * p) - jax.nn.sigmoid(beta * n)) for w, p, n in planes
    )


def _combine_forward(*inputs):
    return _combine(*inputs), inputs


def _combine_backward(inputs, gradient):
    # Gates are written differently wherever they are used, f(x) = (1 + tanh(x / 2)) / 2 and so on:
    # otherwise XLA computes them once, in the forward pass, and holds them all until now.
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
    """Returns f(x) f(-x); it is above zero for |x| up to 87, on both sides."""
    below = jnp.exp(-jnp.abs(x))
    return below / jnp.square(1 + below)


_combine.defvjp(_combine_forward, _combine_backward)


def weights(
    bit_planes: BitPlanes, temperature: Float[AnyArray, ""], *, contiguous: bool = False
) -> Float[Array, "*shape"]:
    """Returns the soft weights at a temperature; differentiable in all logits and the scale.

    Args:
        bit_planes: the tensor's planes.
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
    """Returns which planes are on: those whose logit is at least zero.

    This is the one place that says so: counting, hardening and export follow it.

    Args:
        mask: logits of the planes.
        contiguous: a plane is on only if all more significant ones are.
    """
    on = jnp.asarray(mask) >= 0
    return jnp.cumprod(on[::-1].astype(jnp.int32))[::-1] == 1 if contiguous else on


def active_planes(bit_planes: BitPlanes, *, contiguous: bool = False) -> Bool[Array, " planes"]:
    """Returns which planes of a tensor are on; see `planes_on`."""
    return planes_on(bit_planes.mask, contiguous=contiguous)


def codes(
    bit_planes: BitPlanes, *, contiguous: bool = False
) -> tuple[Int[Array, "*shape"], Float[Array, ""]]:
    """Returns the integers that the planes become, and the width of one (the step size).

    A bit is one where its logit is above zero. Integers are divided by the significance of the
    lowest active plane, which goes into the step size.

    Returns:
        int32 codes, all zero if no plane is active; and step size s 2^b0 / (2^n - 1).
    """
    planes = len(bit_planes.mask)
    active = active_planes(bit_planes, contiguous=contiguous)
    lowest = jnp.argmax(active).astype(jnp.int32)  # 0 if there is none
    place = jnp.arange(planes, dtype=jnp.int32)
    worth = jnp.where(active, jnp.left_shift(1, jnp.maximum(place - lowest, 0)), 0)
    integers = jnp.zeros(bit_planes.positive.shape[1:], jnp.int32)
    for w, p, n in zip(worth, bit_planes.positive, bit_planes.negative, strict=True):
        integers += w * ((p > 0).astype(jnp.int32) - (n > 0).astype(jnp.int32))  # see `_combine`
    scale = bit_planes.scale
    # As a product all programs agree on it: XLA makes one of a division in some and not in others.
    step = scale * jnp.ldexp(jnp.ones((), scale.dtype), lowest) * (1 / (2**planes - 1))
    return integers, step


def hard_weights(bit_planes: BitPlanes, *, contiguous: bool = False) -> Float[Array, "*shape"]:
    """Returns the weights with every gate decided: exactly integers times step of `codes`."""
    integers, step = codes(bit_planes, contiguous=contiguous)
    return integers.astype(step.dtype) * step

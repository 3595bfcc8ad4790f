"""References are the closed forms, written anew in NumPy float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.quantizers import bit_planes as csq
from mpq_jax.quantizers.bit_planes import BitPlanes

SHAPE = (3, 2, 4)

# Compiled as a whole: called as they are, each of their operations is a program of its own.
from_float = jax.jit(csq.from_float, static_argnames=("planes", "literal", "clip_rms"))
weights_of = jax.jit(csq.weights, static_argnames="contiguous")
hard_weights = jax.jit(csq.hard_weights, static_argnames="contiguous")
codes_of = jax.jit(csq.codes, static_argnames="contiguous")
combine = jax.jit(csq.combine)
active_planes = jax.jit(csq.active_planes, static_argnames="contiguous")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sigmoid(x):
    return 0.5 * (1 + np.tanh(np.asarray(x, np.float64) / 2))


def drawn(planes, seed=0, spread=1.0):
    """Bit planes with random logits, no two alike."""
    generator = np.random.default_rng(seed)

    def draw(*shape):
        return (spread * generator.normal(size=shape)).astype(np.float32)

    return BitPlanes(draw(planes, *SHAPE), draw(planes, *SHAPE), draw(planes), np.float32(0.37))


def parts(bit_planes, beta, contiguous=False):
    """Returns (gates [n], digits [n, ...], significances [n]) in float64."""
    n = len(bit_planes.mask)
    gates = sigmoid(beta * np.asarray(bit_planes.mask, np.float64))
    if contiguous:
        gates = np.array([np.prod(gates[b:]) for b in range(n)])
    digits = sigmoid(beta * np.asarray(bit_planes.positive, np.float64)) - sigmoid(
        beta * np.asarray(bit_planes.negative, np.float64)
    )
    return gates, digits, 2.0 ** np.arange(n) / (2**n - 1)


def reference(bit_planes, beta, contiguous=False):
    gates, digits, worth = parts(bit_planes, beta, contiguous)
    return float(bit_planes.scale) * np.einsum("b,b,b...->...", gates, worth, digits)


def quantized(w, planes):
    """Rounds magnitudes to whole parts of the largest one."""
    w = np.asarray(w, np.float64)
    largest = np.abs(w).max()
    return np.round(np.abs(w) * (2**planes - 1) / largest) * np.sign(w), largest / (2**planes - 1)


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("beta", [1.0, 7.5, 200.0])
@pytest.mark.parametrize("planes", [1, 3, 8])
def test_weights_are_the_sum_of_gated_planes(planes, beta, contiguous):
    bit_planes = drawn(planes)
    found = weights_of(bit_planes, beta, contiguous=contiguous)
    np.testing.assert_allclose(found, reference(bit_planes, beta, contiguous), atol=2e-7)


@pytest.mark.slow_but_first
@pytest.mark.parametrize("planes", range(1, 9))
def test_every_integer_comes_back(planes):
    """Soft at temperature 1 to float rounding, hard exactly."""
    integers = np.arange(-(2**planes - 1), 2**planes)
    w = (integers * 0.25).astype(np.float32)
    bit_planes = from_float(w, planes=planes)
    np.testing.assert_allclose(weights_of(bit_planes, 1.0), w, atol=3e-7 * 0.25 * 2**planes)
    codes, step = codes_of(bit_planes)
    np.testing.assert_array_equal(codes, integers)
    factor = (sigmoid(csq.SHARPNESS) - sigmoid(-csq.SHARPNESS)) * sigmoid(csq.MASK_LOGIT)
    np.testing.assert_allclose(step, 0.25 / factor, rtol=1e-6)
    assert active_planes(bit_planes).all()


def test_a_float_tensor_is_quantized_to_the_nearest_code():
    w = normal(0, 5, 5, 8)
    codes, unit = quantized(w, 6)
    bit_planes = from_float(w, planes=6)
    np.testing.assert_array_equal(codes_of(bit_planes)[0], codes)
    np.testing.assert_allclose(weights_of(bit_planes, 1.0), codes * unit, atol=1e-6)


def test_the_literal_start_is_the_published_one():
    w = normal(1, 6, 7)
    codes, unit = quantized(w, 8)
    bit_planes = from_float(w, planes=8, literal=True)
    for logits, sign in ((bit_planes.positive, 1), (bit_planes.negative, -1)):
        bits = np.array([(np.maximum(sign * codes, 0).astype(int) >> b) & 1 for b in range(8)])
        np.testing.assert_array_equal(logits, bits)
    np.testing.assert_array_equal(bit_planes.mask, np.zeros(8))
    assert bit_planes.scale == np.max(np.abs(w))
    ratio = (sigmoid(1.0089) - 0.5) * 0.5
    assert abs(ratio - 0.1164) < 1e-4
    np.testing.assert_allclose(weights_of(bit_planes, 1.0089), ratio * codes * unit, atol=1e-6)


@pytest.mark.parametrize("literal", [False, True])
def test_an_all_zero_tensor_stays_zero_and_can_learn(literal):
    bit_planes = from_float(np.zeros((3, 4), np.float32), literal=literal)
    np.testing.assert_array_equal(weights_of(bit_planes, 1.0), np.zeros((3, 4)))
    np.testing.assert_array_equal(hard_weights(bit_planes), np.zeros((3, 4)))
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(csq.weights(p, 1.0))))(bit_planes)
    assert (
        all(np.isfinite(leaf).all() for leaf in gradient)
        and (np.asarray(gradient.positive) > 0).all()
    )


@pytest.mark.parametrize("planes", [0, 17])
def test_a_number_of_planes_that_makes_no_sense_is_refused(planes):
    with pytest.raises(ValueError, match=f"planes is {planes}; wanted 1 to 16"):
        from_float(jnp.ones((2,)), planes=planes)


@pytest.mark.parametrize("beta", [1.0, 12.0])
def test_gradients_are_the_closed_forms(beta):
    bit_planes = drawn(5, spread=0.5)
    upstream = np.random.default_rng(1).normal(size=SHAPE)

    def loss(bit_planes):
        return jnp.sum(jnp.asarray(upstream, jnp.float32) * csq.weights(bit_planes, beta))

    found = jax.jit(jax.grad(loss))(bit_planes)
    gates, digits, worth = parts(bit_planes, beta)
    s = float(bit_planes.scale)

    def slope(logits):
        logits = np.asarray(logits, np.float64)
        return beta * sigmoid(beta * logits) * sigmoid(-beta * logits)

    of_bits = s * (worth * gates)[:, None, None, None] * upstream
    by_plane = (upstream * digits).reshape(len(digits), -1).sum(axis=1)
    expected = BitPlanes(
        of_bits * slope(bit_planes.positive),
        -of_bits * slope(bit_planes.negative),
        s * worth * slope(bit_planes.mask) * by_plane,
        np.sum(gates * worth * by_plane),
    )
    for name, one, other in zip(BitPlanes._fields, found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6, err_msg=name)


def naive(bit_planes, beta, contiguous):
    """The same function, left to automatic differentiation."""
    gates = jax.nn.sigmoid(beta * bit_planes.mask)
    if contiguous:
        gates = jnp.stack([jnp.prod(gates[b:]) for b in range(len(gates))])
    digits = jax.nn.sigmoid(beta * bit_planes.positive) - jax.nn.sigmoid(beta * bit_planes.negative)
    worth = jnp.asarray(2.0 ** np.arange(len(gates)) / (2 ** len(gates) - 1), jnp.float32)
    return bit_planes.scale * jnp.tensordot(gates * worth, digits, axes=1)


@pytest.mark.parametrize("contiguous", [False, True])
def test_gradients_equal_automatic_differentiation(contiguous):
    bit_planes, beta = drawn(6, spread=0.5), jnp.float32(3.0)

    def gradient(weights):
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(5 * weights(p)))))(bit_planes)

    lean = gradient(lambda p: csq.weights(p, beta, contiguous=contiguous))
    plain = gradient(lambda p: naive(p, beta, contiguous))
    for name, one, other in zip(BitPlanes._fields, lean, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-7, err_msg=name)


def kept_for_backward(weights, bit_planes):
    """Returns the bytes of what the backward pass is handed."""
    pull = jax.eval_shape(lambda p: jax.vjp(lambda q: weights(q), p)[1], bit_planes)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))


@pytest.mark.parametrize("planes", [2, 4, 8])
def test_nothing_but_the_inputs_is_kept_for_the_backward_pass(planes):
    bit_planes = from_float(np.ones((3, 3, 16, 32), np.float32), planes=planes)
    inputs = sum(leaf.nbytes for leaf in bit_planes)
    lean = kept_for_backward(lambda p: csq.weights(p, jnp.float32(2.0)), bit_planes)
    assert inputs <= lean <= inputs + 1000  # and a few numbers per plane
    assert kept_for_backward(lambda p: naive(p, jnp.float32(2.0), False), bit_planes) > 1.4 * inputs


def test_gates_that_are_on_can_learn_as_well_as_gates_that_are_off():
    x = jnp.array([-60.0, -20.0, -5.0, 5.0, 20.0, 60.0])
    slopes = np.asarray(jax.vmap(jax.grad(csq.gate))(x))
    np.testing.assert_array_equal(slopes, slopes[::-1])
    assert (slopes > 0).all() and np.isfinite(slopes).all()
    assert jax.grad(jax.nn.sigmoid)(jnp.float32(20.0)) == 0  # what this is about
    huge = jax.vmap(jax.grad(csq.gate))(jnp.array([-1e30, 1e30]))
    np.testing.assert_array_equal(huge, [0, 0])


def test_bits_at_a_high_temperature_learn_symmetrically():
    differentiate = jax.jit(jax.grad(lambda p: jnp.sum(csq.weights(p, 200.0))))
    for sign in (1, -1):
        full = np.full((2, 1, 1), [[[sign * 0.2]], [[-5.0]]], np.float32)
        planes = BitPlanes(full[0], full[1], np.ones(1, np.float32), np.float32(1))
        assert np.asarray(differentiate(planes).positive)[0, 0] > 0


def test_soft_weights_become_the_hard_ones():
    generator = np.random.default_rng(3)
    for seed in range(5):
        bit_planes = drawn(6, seed)
        away = jax.tree.map(
            lambda x: np.where(np.abs(x) < 0.1, np.where(x < 0, -0.1, 0.1), x).astype(np.float32),
            bit_planes,
        )
        away = away._replace(scale=np.float32(generator.uniform(0.1, 2)))
        hard = hard_weights(away)
        np.testing.assert_allclose(weights_of(away, 200.0), hard, atol=1e-6)


@pytest.mark.parametrize(
    ("on", "levels"),
    [((7,), 3), ((7, 6), 7), ((2, 1, 0), 15), ((7, 4), 9), ((7, 5, 3), 27), ((), 1)],
)
def test_number_of_levels_of_a_mask(on, levels):
    generator = np.random.default_rng(0)
    mask = np.array([1 if b in on else -1 for b in range(8)], np.float32)
    logits = generator.choice([-1, 1], (2, 8, 20_000)).astype(np.float32)
    bit_planes = BitPlanes(logits[0], logits[1], mask, np.float32(0.7))
    codes, step = codes_of(bit_planes)
    assert len(np.unique(codes)) == levels
    np.testing.assert_array_equal(active_planes(bit_planes), mask > 0)
    hard = hard_weights(bit_planes)
    np.testing.assert_array_equal(hard, np.asarray(codes).astype(np.float32) * step, strict=True)
    worth = [2.0**b / 255 for b in on]
    digits = (np.asarray(logits[0]) > 0).astype(float) - (np.asarray(logits[1]) > 0)
    expected = 0.7 * sum((w * digits[b] for b, w in zip(on, worth, strict=True)), np.zeros(20_000))
    np.testing.assert_allclose(hard, expected, atol=1e-6)
    if on:
        np.testing.assert_allclose(step, 0.7 * 2.0 ** min(on) / 255, rtol=1e-6)


def test_contiguous_masks_only_trim_low_planes():
    mask = np.array([1, 1, -1, 1, 1], np.float32)  # plane 2 is off, so 0 and 1 are, too
    bit_planes = drawn(5)._replace(mask=mask)
    np.testing.assert_array_equal(
        active_planes(bit_planes, contiguous=True), [False, False, False, True, True]
    )
    gates = jax.jit(functools.partial(csq.plane_gates, contiguous=True))(mask, 100.0)
    np.testing.assert_allclose(gates, [0, 0, 0, 1, 1], atol=1e-6)
    codes, step = codes_of(bit_planes, contiguous=True)
    assert np.abs(codes).max() <= 3
    np.testing.assert_allclose(step, 0.37 * 8 / 31, rtol=1e-6)


@pytest.mark.parametrize("array", [np.array, jnp.array])
def test_planes_are_on_from_zero_up(array):
    """On the host and on devices alike."""
    mask = array([5.0, -1e-30, 0.0, -0.0, 3.0], np.float32)
    assert csq.planes_on(mask).tolist() == [True, False, True, True, True]
    assert csq.planes_on(mask, contiguous=True).tolist() == [False, False, True, True, True]


def test_a_gate_on_the_threshold_is_on_and_a_bit_on_it_is_not():
    """The literal start has all gates at zero: it counts as all planes, and names what bits say."""
    w = normal(2, 50)
    bit_planes = from_float(w, literal=True)
    assert active_planes(bit_planes).all()
    np.testing.assert_array_equal(codes_of(bit_planes)[0], quantized(w, 8)[0])


def test_the_temperature_is_traced():
    traces = []

    @jax.jit
    def weights(bit_planes, beta):
        traces.append(1)
        return csq.weights(bit_planes, beta)

    values = [np.asarray(weights(drawn(4), np.float32(beta))) for beta in (1, 5, 200)]
    assert traces == [1] and not np.allclose(values[0], values[2])


@pytest.mark.parametrize("clip_rms", [1.0, 2.5])
def test_outliers_are_clipped_and_the_rest_has_finer_steps(clip_rms):
    w = normal(3, 50, 40)
    bound = clip_rms * np.sqrt(np.mean(w**2))
    made = from_float(w, planes=3, clip_rms=clip_rms)
    expected = np.round(np.clip(w / bound, -1, 1) * 7) * bound / 7
    np.testing.assert_allclose(weights_of(made, 1.0), expected, atol=1e-5)
    assert np.unique(codes_of(made)[0]).tolist() == list(range(-7, 8))


def test_a_threshold_beyond_the_largest_weight_changes_nothing():
    w = np.random.default_rng(4).uniform(-1, 1, 30).astype(np.float32)
    jax.tree.map(np.testing.assert_array_equal, from_float(w), from_float(w, clip_rms=3.0))


SCHEMES = [
    (0, 0, 1, 1),
    (1, 1, 1, 1),
    (0, 1, 0, 1),
    (1, 0, 0, 0),
    (0, 0, 0, 0),
]  # lowest plane first


def sums_of(scheme):
    """All that planes, each of which adds, subtracts or rests, can name, in units of the lowest."""
    worth = [2**place for place, on in enumerate(scheme) if on]
    ways = itertools.product((-1, 0, 1), repeat=len(worth))
    return np.array(sorted({sum(a * b for a, b in zip(way, worth, strict=True)) for way in ways}))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_on_a_scheme_every_weight_becomes_the_nearest_sum_of_its_planes(scheme):
    w = normal(5, 60, 7)
    mask = np.where(scheme, 0.5, -0.5).astype(np.float32)
    made = csq.on_scheme(w, mask)
    np.testing.assert_array_equal(made.mask, mask)
    named = np.asarray(combine(made, np.array(scheme, np.float32), 1.0))
    on = np.tanh(csq.SHARPNESS / 2)
    levels = sums_of(scheme) * float(made.scale) * on / 15
    nearest = np.abs(w[..., None] - levels).min(axis=-1)
    np.testing.assert_allclose(np.abs(w - named), nearest, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES[:4])
def test_on_a_scheme_the_scale_is_about_the_best(scheme):
    """No scale between those that are tried does better by more than a tenth."""
    w = normal(6, 900)
    made = csq.on_scheme(w, np.where(scheme, 1.0, -1.0).astype(np.float32))
    step = float(made.scale) * np.tanh(csq.SHARPNESS / 2) / 15

    def error(width):
        return np.square(np.abs(w[:, None] - sums_of(scheme) * width).min(axis=1)).mean()

    best = min(error(step * factor) for factor in np.linspace(0.3, 3, 200))
    assert error(step) <= 1.1 * best


def test_on_a_scheme_zeros_stay_zeros():
    made = csq.on_scheme(np.zeros((3, 4), np.float32), np.ones(8, np.float32))
    assert float(made.scale) > 0
    np.testing.assert_array_equal(hard_weights(made), np.zeros((3, 4)))

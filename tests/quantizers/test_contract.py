"""References are NumPy float32 and divide as the library does, by the step's reciprocal.

XLA turns `x / step` into that in some programs and not in others, which moves ties.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.quantizers import QUANTIZERS, lsq
from mpq_jax.quantizers.base import Quantizer

BITS = range(2, 9)
STEP = np.float32(0.3)  # no power of two: quotients are rounded
every_bits = pytest.mark.parametrize("bits", BITS)
every_range = pytest.mark.parametrize("signed", [True, False])
every_quantizer = pytest.mark.parametrize("name", QUANTIZERS)


@jax.jit
def fake_quant(x, step, bits, signed):
    return lsq.fake_quant(x, step, bits, signed=signed)


@jax.jit
def codes_of(x, step, bits, signed):
    return lsq.codes(x, step, bits, signed=signed)


@jax.jit
def gradients(x, step, bits, signed):
    """Returns d/dx and d/dstep of each element on its own."""

    def one(x, step):
        return lsq.fake_quant(x, step, bits, signed=signed)

    return jax.vmap(jax.grad(one, argnums=(0, 1)), (0, None))(x, step)


def code_bounds(bits, signed):
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def divide(x, step):
    return x * (np.float32(1) / step)


def reference_codes(x, step, bits, signed):
    low, high = code_bounds(bits, signed)
    return np.clip(np.round(divide(x, step)), low, high)


def reference_gradients(x, step, bits, signed):
    """Returns d/dx and, element by element, d/dstep of Eq. 3."""
    low, high = code_bounds(bits, signed)
    v = divide(x, step)
    inside = (v >= low) & (v <= high)
    return inside.astype(np.float32), np.where(inside, np.round(v) - v, np.clip(v, low, high))


def some_values(bits, signed, step=STEP):
    """Returns values inside and outside of the range, and ties between codes."""
    low, high = code_bounds(bits, signed)
    random = np.random.default_rng(bits).normal(size=100).astype(np.float32) * 2 ** (bits - 1)
    ties = np.arange(low, high, dtype=np.float32) + np.float32(0.5)
    return np.concatenate([np.resize(ties, 256), random]) * step


@every_range
@every_bits
def test_code_range(bits, signed):
    assert tuple(map(int, lsq.code_range(bits, signed=signed))) == code_bounds(bits, signed)


@every_range
def test_code_range_of_many_bits(signed):
    low, high = lsq.code_range(np.array(BITS), signed=signed)
    expected = np.array([code_bounds(bits, signed) for bits in BITS], np.float32)
    np.testing.assert_array_equal(np.stack([low, high], axis=1), expected)


@every_range
@every_bits
@pytest.mark.parametrize("step", [0.25, 0.3, 1e-4, 17.0])
def test_points_of_the_grid_come_back_as_their_codes(step, bits, signed):
    low, high = code_bounds(bits, signed)
    grid = np.resize(np.arange(low, high + 1, dtype=np.int32), 256)
    x = grid.astype(np.float32) * np.float32(step)
    np.testing.assert_array_equal(codes_of(x, step, bits, signed), grid, strict=True)
    np.testing.assert_array_equal(fake_quant(x, step, bits, signed), x, strict=True)


@every_range
@every_bits
def test_codes_and_values_equal_the_reference(bits, signed):
    x = some_values(bits, signed)
    expected = reference_codes(x, STEP, bits, signed)
    np.testing.assert_array_equal(codes_of(x, STEP, bits, signed), expected)
    np.testing.assert_array_equal(fake_quant(x, STEP, bits, signed), expected * STEP, strict=True)


@every_range
@every_bits
def test_halves_round_to_the_even_code(bits, signed):
    lower = np.resize(np.arange(*code_bounds(bits, signed)), 256)
    x = ((lower + 0.5) * 0.5).astype(np.float32)  # exact in binary
    codes = np.asarray(codes_of(x, 0.5, bits, signed))
    np.testing.assert_array_equal(codes, np.where(lower % 2 == 0, lower, lower + 1))


@every_range
@every_bits
@pytest.mark.parametrize("step", [0.5, 0.3])
def test_gradients_are_lsq_equation_3(step, bits, signed):
    x = some_values(bits, signed, np.float32(step))
    for given, expected in zip(
        gradients(x, jnp.float32(step), bits, signed),
        reference_gradients(x, np.float32(step), bits, signed),
        strict=True,
    ):
        np.testing.assert_array_equal(given, expected, strict=True)


@every_range
@every_bits
@pytest.mark.parametrize("step", [0.5, 0.3, 0.1, 0.007])
def test_gradients_at_the_bounds_pass_and_right_beyond_they_do_not(step, bits, signed):
    codes = np.array(code_bounds(bits, signed), np.float32)
    bounds = codes * np.float32(step)
    of_x, of_step = gradients(bounds, jnp.float32(step), bits, signed)
    np.testing.assert_array_equal(of_x, [1, 1])
    np.testing.assert_allclose(of_step, [0, 0], atol=2e-7 * codes[1])  # the quotient is rounded
    beyond = bounds + np.array([-1e-3, 1e-3], np.float32) * np.float32(step)
    of_x, of_step = gradients(beyond, jnp.float32(step), bits, signed)
    np.testing.assert_array_equal(of_x, [0, 0])
    np.testing.assert_array_equal(of_step, codes)


@every_range
def test_random_cotangent_passes_inside_and_stops_outside(signed):
    x = some_values(4, signed)
    cotangent = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    pull = jax.vjp(lambda x, step: fake_quant(x, step, 4, signed), x, jnp.float32(STEP))[1]
    of_x, of_step = pull(jnp.asarray(cotangent))
    inside, per_step = reference_gradients(x, STEP, 4, signed)
    np.testing.assert_array_equal(of_x, cotangent * inside)
    expected = np.sum(cotangent.astype(np.float64) * per_step)
    np.testing.assert_allclose(of_step, expected, rtol=1e-5)  # a sum in another order


def test_grad_scale_multiplies_only_the_gradient_of_the_step():
    x = jnp.asarray(some_values(3, True))

    @jax.jit
    def value_and_gradients(scale):
        value, pull = jax.vjp(
            lambda x, s: lsq.fake_quant(x, s, 3, signed=True, grad_scale=scale), x, STEP
        )
        return value, *pull(jnp.ones_like(x))

    plain, scaled = value_and_gradients(None), value_and_gradients(0.125)
    np.testing.assert_array_equal(scaled[0], plain[0])
    np.testing.assert_array_equal(scaled[1], plain[1])
    assert scaled[2] == plain[2] * 0.125 != 0


def value_and_gradients(x, step, bits, signed):
    value, pull = jax.vjp(lambda x, s: lsq.fake_quant(x, s, bits, signed=signed), x, step)
    return value, lsq.codes(x, step, bits, signed=signed), *pull(jnp.sin(x))


def test_traced_bits_and_sign_equal_static_ones_and_compile_once():
    traces = []

    @jax.jit
    def traced(x, step, bits, signed):
        traces.append(bits)
        return value_and_gradients(x, step, bits, signed)

    x, step = jnp.asarray(some_values(6, True)), jnp.float32(STEP)
    for bits in (2, 3, 8):
        for signed in (True, False):
            static = jax.jit(lambda x, s, b=bits, sign=signed: value_and_gradients(x, s, b, sign))
            given = traced(x, step, jnp.int32(bits), jnp.array(signed))
            for one, other in zip(static(x, step), given, strict=True):
                np.testing.assert_array_equal(one, other, strict=True)
    assert len(traces) == 1


def test_bits_may_be_mapped():
    x = jnp.asarray(some_values(4, True))
    bits = jnp.array(BITS)
    mapped = jax.vmap(fake_quant, (None, None, 0, None))(x, STEP, bits, True)
    alone = [fake_quant(x, STEP, b, True) for b in BITS]
    np.testing.assert_array_equal(mapped, np.stack(alone))


@pytest.mark.parametrize("bits", [4, np.int32(4), np.array(4), jnp.int32(4), jnp.array(4, "int8")])
def test_bits_of_any_integer_type(bits):
    x = jnp.array([-9.0, 0.9, 9.0])
    np.testing.assert_array_equal(lsq.codes(x, 1.0, bits, signed=True), [-8, 1, 7])
    np.testing.assert_array_equal(lsq.fake_quant(x, 1.0, bits, signed=True), [-8, 1, 7])
    assert lsq.init_weight_step(x, bits) == 2 * lsq.init_weight_step(x, 5)
    assert lsq.init_act_step(x, bits, signed=True) == lsq.init_act_step(x, 3, signed=False)


def test_infinite_values_are_clipped_with_finite_gradients():
    x = np.array([-np.inf, np.inf], np.float32)
    np.testing.assert_array_equal(codes_of(x, STEP, 3, True), [-4, 3])
    of_x, of_step = gradients(x, jnp.float32(STEP), 3, True)
    np.testing.assert_array_equal(of_x, [0, 0])
    np.testing.assert_array_equal(of_step, [-4, 3])


@every_bits
@pytest.mark.parametrize("mean", [0.0, 0.7, -0.7])
def test_first_weight_step_is_the_three_sigma_rule(mean, bits):
    w = np.random.default_rng(1).normal(mean, 0.2, (3, 3, 8, 4)).astype(np.float32)
    mu, sigma = w.mean(dtype=np.float64), w.std(ddof=1, dtype=np.float64)
    expected = max(abs(mu - 3 * sigma), abs(mu + 3 * sigma)) / 2 ** (bits - 1)
    step = jax.jit(lsq.init_weight_step)(w, bits)
    np.testing.assert_allclose(step, expected, rtol=2e-6)  # float32 moments of 288 values


def test_first_weight_steps_are_nested():
    w = jax.random.normal(jax.random.key(0), (50,))
    steps = jax.vmap(lsq.init_weight_step, (None, 0))(w, jnp.array(BITS))
    np.testing.assert_array_equal(steps[:-1], 2 * steps[1:])


@every_range
@every_bits
def test_first_activation_step(bits, signed):
    x = np.random.default_rng(2).normal(size=(4, 5)).astype(np.float32)
    expected = 2 * np.abs(x).mean(dtype=np.float64) / np.sqrt(code_bounds(bits, signed)[1])
    step = lsq.init_act_step(jnp.asarray(x), bits, signed=signed)
    np.testing.assert_allclose(step, expected, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(), (1,), (3, 3, 2, 2)])
def test_constant_tensors_get_positive_finite_steps(shape, value):
    x = jnp.full(shape, value)
    for step in (lsq.init_weight_step(x, 4), lsq.init_act_step(x, 4, signed=False)):
        assert 0 < step < np.inf


# The contract of every quantizer: of its inputs, and of its weights at every highest precision.


def record_of(name, half, max_bits):
    """Returns fake_quant, codes -> (codes, width of one), init_step of one half of a quantizer."""
    quantizer = QUANTIZERS[name]
    assert isinstance(quantizer, Quantizer)
    if half == "weights":
        weights = quantizer.weights

        def fake_quant(x, step, bits, *, signed, grad_scale=None):
            return weights.fake_quant(x, step, bits, max_bits=max_bits, grad_scale=grad_scale)

        def codes(x, step, bits, *, signed):
            return weights.codes(x, step, bits, max_bits=max_bits)

        return fake_quant, codes, lambda x, bits, *, signed: weights.init_step(x, bits)
    acts = quantizer.acts

    def codes_and_width(x, step, bits, *, signed):
        return acts.codes(x, step, bits, signed=signed), step

    return acts.fake_quant, codes_and_width, acts.init_step


every_half = pytest.mark.parametrize("half", ["weights", "acts"])


@pytest.mark.slow_but_first
@every_half
@every_quantizer
def test_contract_values_are_codes_times_step_and_bits_compile_once(name, half):
    fake_quant, codes_of_half, init_step = record_of(name, half, max_bits=max(BITS))
    traces = []

    @jax.jit
    def value_and_gradients(x, step, bits, signed):
        traces.append("value_and_gradients")
        value, pull = jax.vjp(
            lambda x, s: fake_quant(x, s, bits, signed=signed, grad_scale=None), x, step
        )
        return value, pull(jnp.ones_like(x))

    @jax.jit
    def codes_of(x, step, bits, signed):  # a program of its own, as in an export
        traces.append("codes_of")
        return codes_of_half(x, step, bits, signed=signed)

    @jax.jit
    def first_step(x, bits, signed):
        traces.append("first_step")
        return init_step(x, bits, signed=signed)

    for bits in BITS:
        for signed in (True, False):
            x = some_values(bits, signed).reshape(4, -1)
            codes, width = map(np.asarray, codes_of(x, STEP, bits, signed))
            assert codes.dtype == np.int32 and len(np.unique(codes)) <= 2**bits
            value, gradients = value_and_gradients(x, STEP, bits, signed)
            np.testing.assert_array_equal(value, codes.astype(np.float32) * width, strict=True)
            assert all(np.isfinite(leaf).all() for leaf in gradients)
            assert 0 < first_step(x, bits, signed) < np.inf
    assert sorted(traces) == ["codes_of", "first_step", "value_and_gradients"]


@every_half
@every_quantizer
def test_contract_half_precision_is_kept(name, half):
    fake_quant, codes_of, _ = record_of(name, half, max_bits=6)
    x = jnp.asarray(some_values(4, True), jnp.bfloat16)
    step = jnp.bfloat16(0.25)

    @jax.jit
    def everything(x):
        values, pull = jax.vjp(lambda x: fake_quant(x, step, 4, signed=True, grad_scale=None), x)
        return values, codes_of(x, step, 4, signed=True), *pull(values)

    values, (codes, width), of_x = everything(x)
    np.testing.assert_array_equal(values, codes.astype(jnp.bfloat16) * width, strict=True)
    assert values.dtype == of_x.dtype == jnp.bfloat16


@pytest.mark.slow_but_first
@every_half
@every_quantizer
def test_contract_zeros_stay_zero_and_finite(name, half):
    fake_quant, _, init_step = record_of(name, half, max_bits=8)

    @jax.jit
    def value_and_gradients(zeros, step):
        value, pull = jax.vjp(
            lambda x, s: fake_quant(x, s, 2, signed=True, grad_scale=None), zeros, step
        )
        return value, pull(jnp.ones_like(zeros))

    zeros = jnp.zeros((3, 3, 2, 4))
    step = jax.jit(lambda x: init_step(x, 2, signed=False))(zeros)
    value, gradients = value_and_gradients(zeros, step)
    np.testing.assert_array_equal(value, zeros)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.slow_but_first
@every_half
@every_quantizer
def test_contract_gradient_scale(name, half):
    fake_quant, _, _ = record_of(name, half, max_bits=3)
    x = jnp.asarray(some_values(4, True))[300]

    @jax.jit
    def of_step(scale):
        return jax.grad(lambda s: fake_quant(x, s, 3, signed=True, grad_scale=scale))(STEP)

    assert of_step(0.25) == 0.25 * of_step(None) != 0

"""References are the paper's Eq. 1-3 in NumPy, in alpha and not in the step size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpq_jax.quantizers import lsq, pact
from mpq_jax.quantizers.base import ActQuantizer

BITS = (2, 3, 4, 8)
STEPS = (np.float32(0.25), np.float32(0.3), np.float32(0.007))
every_bits = pytest.mark.parametrize("bits", BITS)
every_range = pytest.mark.parametrize("signed", [True, False])
every_step = pytest.mark.parametrize("step", STEPS)


@jax.jit
def fake_quant(x, step, bits, signed):
    return pact.fake_quant(x, step, bits, signed=signed)


@jax.jit
def lsq_fake_quant(x, step, bits, signed):
    return lsq.fake_quant(x, step, bits, signed=signed)


@jax.jit
def codes_of(x, step, bits, signed):
    return pact.ACTS.codes(x, step, bits, signed=signed)


@jax.jit
def pulled(x, step, bits, signed, cotangent, grad_scale=None):
    """Returns the gradients in x and in the step of `sum(cotangent * fake_quant)`."""

    def values(x, step):
        return pact.fake_quant(x, step, bits, signed=signed, grad_scale=grad_scale)

    return jax.vjp(values, x, step)[1](cotangent)


@jax.jit
def gradients(x, step, bits, signed):
    """Returns d/dx and d/dstep of each value on its own."""
    return jax.vmap(pulled, (0, None, None, None, None))(x, step, bits, signed, jnp.float32(1))


def code_bounds(bits, signed):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return np.float32(low), np.float32(high)


def some_values(bits, signed, step):
    """Returns 500 values, most of them within one and a half of the range, and both bounds."""
    bounds = np.array(code_bounds(bits, signed)) * step
    random = np.random.default_rng(bits).uniform(-1.5, 1.5, 498).astype(np.float32) * bounds[1]
    return np.concatenate([bounds, random])


def reference_gradients(x, step, bits, signed):
    """Returns d/dx and d/dalpha, value by value: Eq. 3, and what a negative bound adds."""
    low, high = code_bounds(bits, signed)
    alpha, least = high * step, low * step
    inside = ((x >= least) & (x <= alpha)).astype(np.float32)
    of_alpha = (x >= alpha).astype(np.float32) + (x <= least) * (low / high)
    return inside, of_alpha


def test_record():
    assert isinstance(pact.ACTS, ActQuantizer)
    assert pact.ACTS[:3] == (pact.fake_quant, lsq.codes, pact.init_step)
    assert not pact.ACTS.batch_scale


@every_step
@every_range
@every_bits
def test_values_are_equation_1_and_2(bits, signed, step):
    x = some_values(bits, signed, step)
    low, high = code_bounds(bits, signed)
    alpha = high * np.float64(step)
    clipped = np.clip(x.astype(np.float64), low * np.float64(step), alpha)
    given = fake_quant(x, step, bits, signed)
    # half a step from the clipped value, and on the grid of alpha / high
    assert (np.abs(given - clipped) <= (0.5 + 1e-4) * step).all()
    np.testing.assert_allclose(given / alpha * high, np.round(given / step), atol=1e-4)
    np.testing.assert_array_equal(given[:2], np.array([low, high]) * step)


@every_step
@every_range
@pytest.mark.parametrize("bits", [*BITS, 32])
def test_values_are_those_of_lsq_bit_for_bit(bits, signed, step):
    x = some_values(bits, signed, step)
    expected = lsq_fake_quant(x, step, bits, signed)
    np.testing.assert_array_equal(fake_quant(x, step, bits, signed), expected, strict=True)


@every_step
@every_range
@every_bits
def test_values_are_codes_times_step(bits, signed, step):
    x = some_values(bits, signed, step)
    codes = np.asarray(codes_of(x, step, bits, signed))
    assert codes.dtype == np.int32
    assert (codes.min(), codes.max()) == code_bounds(bits, signed)
    values = fake_quant(x, step, bits, signed)
    np.testing.assert_array_equal(values, codes.astype(np.float32) * step, strict=True)


@every_step
@every_range
@every_bits
def test_gradients_are_equation_3_over_the_largest_code(bits, signed, step):
    x = some_values(bits, signed, step)
    of_x, of_step = gradients(x, step, bits, signed)
    expected, of_alpha = reference_gradients(x, step, bits, signed)
    np.testing.assert_array_equal(of_x, expected, strict=True)
    per_code = np.float32(1) / code_bounds(bits, signed)[1]
    np.testing.assert_array_equal(of_step, of_alpha * per_code, strict=True)


@every_step
@every_bits
def test_gradients_on_and_right_beyond_the_clip(bits, step):
    alpha = code_bounds(bits, False)[1] * step
    x = np.array([np.nextafter(alpha, np.float32(0)), alpha, np.nextafter(alpha, np.float32(9e9))])
    of_x, of_step = gradients(x, step, bits, False)
    np.testing.assert_array_equal(of_x, [1, 1, 0])
    assert of_step[0] == 0 and (of_step[1:] > 0).all()


@every_range
def test_random_cotangents_are_summed(signed):
    step = STEPS[1]
    x = some_values(4, signed, step).reshape(5, 100)
    cotangent = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    of_x, of_step = pulled(x, step, 4, signed, cotangent)
    inside, of_alpha = reference_gradients(x, step, 4, signed)
    np.testing.assert_array_equal(of_x, cotangent * inside)
    high = code_bounds(4, signed)[1]
    expected = np.sum(cotangent.astype(np.float64) * of_alpha) / high
    np.testing.assert_allclose(of_step, expected, rtol=1e-5)  # a sum in another order


def test_gradient_scale_multiplies_only_the_gradient_of_the_step():
    x = some_values(3, True, STEPS[1])
    cotangent = np.ones_like(x)
    plain = pulled(x, STEPS[1], 3, True, cotangent)
    scaled = pulled(x, STEPS[1], 3, True, cotangent, jnp.float32(0.125))
    np.testing.assert_array_equal(scaled[0], plain[0])
    assert scaled[1] == 0.125 * plain[1] != 0


@every_bits
def test_gradient_descent_moves_alpha_as_in_the_paper(bits):
    """With momentum and weight decay, against the update rule of alpha itself."""
    rate, momentum, decay = 0.05, 0.9, 0.01
    random = np.random.default_rng(bits)
    x = random.uniform(0, 4, 200).astype(np.float32)
    slopes = (random.normal(size=x.shape) + 0.2).astype(np.float32) / 20
    optimizer = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum))
    alpha, velocity, high = 3.0, 0.0, code_bounds(bits, False)[1]
    step = jnp.float32(alpha / high)
    state = optimizer.init(step)
    for _ in range(8):
        velocity = momentum * velocity + np.sum(slopes * (x >= alpha)) + decay * alpha
        alpha -= rate * velocity
        gradient = pulled(x, step, bits, False, slopes)[1]
        update, state = optimizer.update(gradient, state, step)
        step = step + update
    assert abs(alpha - 3) > 0.1
    np.testing.assert_allclose(step * high, alpha, rtol=1e-5)  # float32 against float64


@every_range
@pytest.mark.parametrize("alpha", [10.0, 0.7])
def test_many_bits_are_pure_clipping(alpha, signed):
    low, high = code_bounds(32, signed)
    step = np.float32(alpha / high)
    x = np.linspace(-1.5 * alpha, 1.5 * alpha, 1001, dtype=np.float32)
    values = fake_quant(x, step, 32, signed)
    clipped = np.clip(x, low / high * alpha, alpha)
    np.testing.assert_allclose(values, clipped, rtol=0, atol=1e-6 * alpha)  # float32
    of_x, of_step = gradients(x, step, 32, signed)
    expected, of_alpha = reference_gradients(x, step, 32, signed)
    np.testing.assert_array_equal(of_x, expected)
    np.testing.assert_array_equal(of_step * high, of_alpha)
    assert np.isfinite(of_step).all() and np.any(of_step != 0)


@every_range
@pytest.mark.parametrize("bits", [*BITS, 32])
def test_first_step_makes_alpha_ten(bits, signed):
    x = jnp.zeros((2, 3))
    step = jax.jit(pact.init_step)(x, jnp.int32(bits), signed=jnp.array(signed))
    assert (step.shape, step.dtype) == ((), jnp.float32)
    np.testing.assert_array_equal(step, np.float32(10) / code_bounds(bits, signed)[1])


def test_traced_bits_and_sign_equal_static_ones_and_compile_once():
    traces = []

    def everything(x, step, bits, signed):
        values, pull = jax.vjp(lambda x, s: pact.fake_quant(x, s, bits, signed=signed), x, step)
        first = pact.init_step(x, bits, signed=signed)
        return values, pact.ACTS.codes(x, step, bits, signed=signed), first, *pull(jnp.sin(x))

    @jax.jit
    def traced(x, step, bits, signed):
        traces.append(bits)
        return everything(x, step, bits, signed)

    x, step = jnp.asarray(some_values(6, True, STEPS[1])), jnp.float32(STEPS[1])
    for bits in (2, 4, 8):
        for signed in (True, False):
            static = jax.jit(lambda x, s, b=bits, sign=signed: everything(x, s, b, sign))
            given = traced(x, step, jnp.int32(bits), jnp.array(signed))
            for one, other in zip(static(x, step), given, strict=True):
                np.testing.assert_array_equal(one, other, strict=True)
    assert len(traces) == 1


def test_bits_may_be_mapped():
    x = some_values(4, True, STEPS[1])
    mapped = jax.vmap(fake_quant, (None, None, 0, None))(x, STEPS[1], jnp.array(BITS), True)
    alone = [fake_quant(x, STEPS[1], bits, True) for bits in BITS]
    np.testing.assert_array_equal(mapped, np.stack(alone))


def test_half_precision_is_kept():
    x = jnp.asarray(some_values(4, False, np.float32(0.25)), jnp.bfloat16)
    step = jnp.bfloat16(0.25)
    values = fake_quant(x, step, 4, False)
    of_x, of_step = pulled(x, step, 4, False, jnp.ones_like(x))
    assert values.dtype == of_x.dtype == of_step.dtype == jnp.bfloat16
    codes = codes_of(x, step, 4, False)
    np.testing.assert_array_equal(values, codes.astype(jnp.bfloat16) * step, strict=True)


def test_infinite_values_are_clipped_with_finite_gradients():
    x = np.array([-np.inf, np.inf], np.float32)
    np.testing.assert_array_equal(fake_quant(x, STEPS[0], 3, True), [-1, 0.75])
    of_x, of_step = gradients(x, STEPS[0], 3, True)
    np.testing.assert_array_equal(of_x, [0, 0])
    np.testing.assert_array_equal(of_step, np.float32([-4 / 3, 1]) * np.float32(1 / 3))


def test_only_the_inputs_are_kept_for_the_backward_pass():
    x = jnp.ones((16, 8))
    pull = jax.vjp(lambda x, s: pact.fake_quant(x, s, 4, signed=False), x, STEPS[0])[1]
    kept = sum(leaf.size for leaf in jax.tree.leaves(pull))
    assert kept <= x.size + 4  # step size, bits, sign, gradient scale

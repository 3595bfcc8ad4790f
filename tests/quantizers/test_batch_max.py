"""References are the published formula in NumPy: sign, round and scaling by the largest value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.quantizers import batch_max
from mpq_jax.quantizers.base import ActQuantizer

BITS = (2, 3, 4, 8)
IGNORED = jnp.float32(123.0)  # a step size
every_bits = pytest.mark.parametrize("bits", BITS)
every_reach = pytest.mark.parametrize("reach", [0.7, 5.0, 20.0])  # of the values; 6 is the clip


@jax.jit
def fake_quant(x, bits):
    return batch_max.fake_quant(x, IGNORED, bits, signed=False)


@jax.jit
def codes_of(x, bits):
    return batch_max.codes(x, IGNORED, bits, signed=False)


@jax.jit
def width_of(x, bits):
    return batch_max.init_step(x, bits, signed=False)


@jax.jit
def pulled(x, bits, cotangent, step=IGNORED, grad_scale=None):
    """Returns the gradients in x and in the step of `sum(cotangent * fake_quant)`."""

    def values(x, step):
        return batch_max.fake_quant(x, step, bits, signed=False, grad_scale=grad_scale)

    return jax.vjp(values, x, step)[1](cotangent)


def some_values(reach, *, signed=True):
    x = np.random.default_rng(int(10 * reach)).uniform(-reach, reach, (4, 5, 5, 3))
    return np.asarray(x if signed else np.maximum(x, 0), np.float32)


def reference(x, bits):
    """Returns the values, the codes before rounding and the scale, in float64."""
    x = x.astype(np.float64)
    clipped = np.clip(x, -6, 6) if bits > 3 else x
    largest, levels = np.abs(clipped).max(), 2**bits - 1
    exact = np.abs(clipped) * levels / largest
    return np.sign(x) * np.round(exact) * largest / levels, exact, largest


def test_record():
    assert isinstance(batch_max.ACTS, ActQuantizer)
    assert batch_max.ACTS[:3] == (batch_max.fake_quant, batch_max.codes, batch_max.init_step)
    assert batch_max.ACTS.batch_scale


@pytest.mark.parametrize("signed", [True, False])
@every_reach
@every_bits
def test_values_are_the_published_formula(bits, reach, signed):
    x = some_values(reach, signed=signed)
    expected, exact, _ = reference(x, bits)
    assert np.abs(exact % 1 - 0.5).min() > 1e-4  # no value so near a tie that float32 decides it
    np.testing.assert_allclose(fake_quant(x, bits), expected, rtol=1e-6)  # against float64


@every_reach
def test_values_of_many_bits_are_only_clipped(reach):
    x = some_values(reach)
    clipped = np.clip(x, -6, 6)
    np.testing.assert_allclose(fake_quant(x, 32), clipped, rtol=0, atol=1e-6 * reach)  # float32


@every_reach
@every_bits
def test_values_are_codes_times_the_width_of_this_batch(bits, reach):
    x = some_values(reach)
    codes = np.asarray(codes_of(x, bits))
    assert codes.dtype == np.int32 and np.abs(codes).max() == 2**bits - 1
    width = np.asarray(width_of(x, bits))
    np.testing.assert_array_equal(fake_quant(x, bits), codes.astype(np.float32) * width)
    np.testing.assert_allclose(width, reference(x, bits)[2] / (2**bits - 1), rtol=1e-6)  # float64


@pytest.mark.parametrize("largest", [1.0, 0.3, 5.9, 1e-20])
@every_bits
def test_points_of_the_grid_come_back_as_their_codes(bits, largest):
    codes = np.resize(np.arange(-(2**bits) + 1, 2**bits), 2**9 - 1)
    x = (codes * (largest / (2**bits - 1))).astype(np.float32)
    np.testing.assert_array_equal(codes_of(x, bits), codes)
    np.testing.assert_allclose(fake_quant(x, bits), x, rtol=1e-6)  # the width is rounded


@pytest.mark.parametrize("bits", [2, 4])
def test_scale_is_that_of_the_whole_batch(bits):
    x = some_values(5.0)
    louder = x.copy()
    louder[1:] *= 1.1
    assert not np.array_equal(fake_quant(louder, bits)[0], fake_quant(x, bits)[0])


@pytest.mark.parametrize("bits", [*BITS, 32])
def test_gradient_is_that_of_the_clipping_alone(bits):
    x = some_values(20.0)
    x.flat[:6] = [6, -6, np.nextafter(np.float32(6), np.float32(9)), 0, 20, -20]
    cotangent = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    of_x, of_step = pulled(x, bits, cotangent)
    passes = np.abs(x) <= 6 if bits > 3 else np.full(x.shape, True)
    np.testing.assert_array_equal(of_x, np.where(passes, cotangent, 0), strict=True)
    assert of_step == 0


@every_bits
def test_step_size_sign_and_gradient_scale_do_nothing(bits):
    x, ones = some_values(5.0), np.ones((4, 5, 5, 3), np.float32)
    plain = pulled(x, bits, ones)
    for one, other in zip(
        plain, pulled(x, bits, ones, jnp.float32(0), jnp.float32(0.5)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    signed = batch_max.fake_quant(jnp.asarray(x), 0.0, bits, signed=True)
    np.testing.assert_array_equal(signed, fake_quant(x, bits))
    codes = batch_max.codes(jnp.asarray(x), 0.0, bits, signed=True)
    np.testing.assert_array_equal(codes, codes_of(x, bits))


@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
@pytest.mark.parametrize("bits", [2, 8, 32])
def test_zeros_stay_zero_and_finite(bits, shape):
    zeros = jnp.zeros(shape)
    np.testing.assert_array_equal(fake_quant(zeros, bits), zeros, strict=True)
    np.testing.assert_array_equal(codes_of(zeros, bits), np.zeros(shape, np.int32), strict=True)
    of_x, of_step = pulled(zeros, bits, jnp.ones(shape))
    np.testing.assert_array_equal(of_x, np.ones(shape))
    assert of_step == 0 and 0 < width_of(zeros, bits) < np.inf


def test_traced_bits_equal_static_ones_and_compile_once():
    traces = []

    def everything(x, step, bits, signed):
        values, pull = jax.vjp(
            lambda x, s: batch_max.fake_quant(x, s, bits, signed=signed), x, step
        )
        codes = batch_max.codes(x, step, bits, signed=signed)
        return values, codes, batch_max.init_step(x, bits, signed=signed), *pull(jnp.sin(x))

    @jax.jit
    def traced(x, step, bits, signed):
        traces.append(bits)
        return everything(x, step, bits, signed)

    x = jnp.asarray(some_values(20.0))
    for bits in BITS:
        static = jax.jit(lambda x, step, b=bits: everything(x, step, b, True))
        given = traced(x, IGNORED, jnp.int32(bits), jnp.array(True))
        for one, other in zip(static(x, IGNORED), given, strict=True):
            np.testing.assert_array_equal(one, other, strict=True)
    assert len(traces) == 1


def test_bits_may_be_mapped():
    x = some_values(20.0)
    mapped = jax.vmap(fake_quant, (None, 0))(x, jnp.array(BITS))
    np.testing.assert_array_equal(mapped, np.stack([fake_quant(x, bits) for bits in BITS]))


def test_half_precision_is_kept():
    x = jnp.asarray(some_values(5.0), jnp.bfloat16)
    values, codes, width = fake_quant(x, 4), codes_of(x, 4), width_of(x, 4)
    assert values.dtype == width.dtype == pulled(x, 4, values)[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(values, codes.astype(jnp.bfloat16) * width, strict=True)


def test_only_the_input_is_kept_for_the_backward_pass():
    x = jnp.ones((16, 8))
    pull = jax.vjp(lambda x: batch_max.fake_quant(x, IGNORED, 4, signed=False), x)[1]
    assert sum(leaf.size for leaf in jax.tree.leaves(pull)) <= x.size + 1  # the bits

"""References are written from the two roundings with Python integers and fractions."""

import fractions
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.quantizers import QUANTIZERS, double_rounding, lsq

STEPS = (np.float32(0.3), np.float32(0.25), np.float32(1.7e-3))
PAIRS = [(high, low) for high in (2, 3, 4, 6, 8, 16) for low in range(2, high + 1)]
every_pair = pytest.mark.parametrize(("max_bits", "bits"), PAIRS)


def integers(max_bits):
    return np.arange(-(2 ** (max_bits - 1)), 2 ** (max_bits - 1))


def second_rounding(code, halvings, bits):
    """Rounds code / 2^halvings, halves to even, by exact fractions, and clips."""
    nearest = round(fractions.Fraction(int(code), 2**halvings))
    return min(max(nearest, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)


@functools.cache
def switched(max_bits, bits):
    """What every stored integer becomes."""
    halvings = max_bits - bits
    return np.array([second_rounding(code, halvings, bits) for code in integers(max_bits)])


@jax.jit
def lsq_codes(w, step, bits):
    return lsq.codes(w, step, bits, signed=True)


# Three programs, as training, export and a switch at run time are; compiled once per highest.
stored_codes = jax.jit(double_rounding.codes, static_argnames="max_bits")
switched_codes = jax.jit(double_rounding.switch, static_argnames="max_bits")
trained_values = jax.jit(double_rounding.fake_quant, static_argnames="max_bits")


def jitted(fake_quant):
    return jax.jit(fake_quant, static_argnames=("max_bits", "grad_scale"))


@pytest.mark.slow
@every_pair
def test_switch_is_the_second_rounding_of_every_integer(max_bits, bits):
    codes = jnp.asarray(integers(max_bits), jnp.int32)
    lower = double_rounding.switch(codes, bits, max_bits=max_bits)
    np.testing.assert_array_equal(lower, switched(max_bits, bits))


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
@every_pair
def test_training_and_switch_agree_on_every_integer(max_bits, bits, step):
    """Of weights on every code and on every edge between two codes of the highest precision."""
    halves = np.arange(-(2**max_bits) - 3, 2**max_bits + 4, dtype=np.float32) / 2
    w = jnp.asarray(halves * step)
    stored = stored_codes(w, step, max_bits=max_bits)
    lower = switched_codes(stored, jnp.int32(bits), max_bits=max_bits)
    value = trained_values(w, step, jnp.int32(bits), max_bits=max_bits)
    assert set(integers(max_bits)) == set(np.asarray(stored).tolist())
    width = step * np.float32(2 ** (max_bits - bits))
    np.testing.assert_array_equal(value, np.asarray(lower).astype(np.float32) * width, strict=True)
    table = dict(zip(integers(max_bits).tolist(), switched(max_bits, bits).tolist(), strict=True))
    expected = [table[code] for code in np.asarray(stored).tolist()]
    np.testing.assert_array_equal(lower, expected)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int16, jnp.int32])
def test_switch_keeps_the_integer_type(dtype):
    codes = jnp.asarray(integers(8), dtype)
    lower = double_rounding.switch(codes, 3, max_bits=8)
    assert lower.dtype == dtype
    np.testing.assert_array_equal(lower, switched(8, 3))


def test_switch_computes_with_integers_only():
    program = jax.make_jaxpr(lambda c, b: double_rounding.switch(c, b, max_bits=8))(
        jnp.zeros((4,), jnp.int8), 4
    )
    floats = [
        value
        for equation in jax.tree.leaves(program.jaxpr.eqns)
        for value in (*equation.invars, *equation.outvars)
        if jnp.issubdtype(value.aval.dtype, jnp.floating)
    ]
    assert not floats


def test_the_highest_precision_is_lsq():
    w = jnp.asarray(np.random.default_rng(0).normal(size=300), jnp.float32)
    step = np.float32(0.02)
    stored = jax.jit(lambda w, s: double_rounding.codes(w, s, max_bits=8))(w, step)
    np.testing.assert_array_equal(stored, lsq_codes(w, step, 8))


def test_rounding_to_even_has_no_bias_and_flooring_has():
    """Over all stored integers that no clip touches."""
    w, halvings = integers(8)[8:-8].astype(np.float32), 2
    errors = {}
    for name in ("double_rounding", "double_rounding_floored"):
        fake_quant = jitted(QUANTIZERS[name].weights.fake_quant)
        found = fake_quant(w, 1.0, 8 - halvings, max_bits=8, grad_scale=None)
        errors[name] = np.asarray(found) - w
    assert errors["double_rounding"].sum() == 0
    assert errors["double_rounding_floored"].sum() == -len(w) * (2**halvings - 1) / 2


@pytest.mark.parametrize("bits", range(2, 9))
def test_gradients_are_the_closed_forms(bits):
    """d/dw is one inside the range of the wanted bits; d/ds is LSQ's at width s 2^D, times 2^D."""
    max_bits, step = 8, np.float32(0.037)
    spread = 2.0**7 * step
    w = np.random.default_rng(bits).uniform(-1.5 * spread, 1.5 * spread, 500).astype(np.float32)

    def one(w, s):
        return double_rounding.fake_quant(w, s, bits, max_bits=max_bits)

    of_w, of_s = jax.jit(jax.vmap(jax.grad(one, argnums=(0, 1)), (0, None)))(w, step)
    factor = 2 ** (max_bits - bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    v = w.astype(np.float64) / (np.float64(step) * factor)
    inside = (v >= low) & (v <= high)
    stored = np.asarray(double_rounding.codes(jnp.asarray(w), step, max_bits=max_bits))
    code = np.array([second_rounding(c, max_bits - bits, bits) for c in stored])
    expected = factor * np.where(inside, code - v, np.clip(v, low, high))
    assert 0.2 < inside.mean() < 0.9
    np.testing.assert_array_equal(of_w, inside)
    np.testing.assert_allclose(of_s, expected, rtol=1e-5, atol=2e-3)  # float32: v reaches 128


def test_weights_on_the_bounds_are_inside():
    max_bits, step = 8, np.float32(0.3)

    @jax.jit
    @jax.grad
    def differentiate(w, bits):
        return jnp.sum(double_rounding.fake_quant(w, step, bits, max_bits=max_bits))

    for bits in (2, 4, 8):
        width = step * np.float32(2 ** (max_bits - bits))
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        gradient = differentiate(np.array([low, high], np.float32) * width, bits)
        np.testing.assert_array_equal(gradient, [1, 1])


def test_gradient_scale_acts_on_the_step_alone():
    w = np.linspace(-1, 1, 50, dtype=np.float32)

    def gradients(scale):
        def loss(w, s):
            return jnp.sum(w * double_rounding.fake_quant(w, s, 3, max_bits=6, grad_scale=scale))

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(w, np.float32(0.02))

    (w_plain, s_plain), (w_scaled, s_scaled) = gradients(None), gradients(0.125)
    np.testing.assert_array_equal(w_plain, w_scaled)
    assert s_scaled == 0.125 * s_plain != 0


def test_bits_are_traced_and_compile_once():
    traces = []

    @jax.jit
    def everything(w, bits):
        traces.append(1)
        stored = double_rounding.codes(w, 0.1, max_bits=8)
        value = double_rounding.fake_quant(w, 0.1, bits, max_bits=8)
        return value, double_rounding.switch(stored, bits, max_bits=8)

    w = jnp.linspace(-20, 20, 999)
    levels = [len(np.unique(everything(w, bits)[1])) for bits in range(2, 9)]
    assert levels == [2**bits for bits in range(2, 9)] and traces == [1]


def test_no_bits_are_those_of_a_kernel_of_zeros():
    w, stored = jnp.zeros((3, 2)), jnp.zeros((3, 2), jnp.int8)
    for made in (
        double_rounding.codes(w, 0.3, max_bits=0),
        double_rounding.switch(stored, 0, max_bits=0),
        jax.jit(lambda bits: double_rounding.fake_quant(w, 0.3, bits, max_bits=0))(0),
    ):
        np.testing.assert_array_equal(made, np.zeros((3, 2)))


@pytest.mark.parametrize("max_bits", [1, 17, -1])
def test_a_highest_precision_that_makes_no_sense_is_refused(max_bits):
    w = jnp.zeros((2,))
    for refused in (
        lambda: double_rounding.codes(w, 1.0, max_bits=max_bits),
        lambda: double_rounding.fake_quant(w, 1.0, 2, max_bits=max_bits),
        lambda: double_rounding.switch(jnp.zeros((2,), jnp.int8), 2, max_bits=max_bits),
    ):
        with pytest.raises(ValueError, match="max_bits is .* wanted 2 to 16"):
            refused()


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_beyond_the_highest_are_refused_where_they_are_known(bits):
    for refused in (
        lambda: double_rounding.fake_quant(jnp.zeros((2,)), 1.0, bits, max_bits=8),
        lambda: double_rounding.switch(jnp.zeros((2,), jnp.int8), bits, max_bits=8),
    ):
        with pytest.raises(ValueError, match=f"bits is {bits}; wanted 2 to 8"):
            refused()


def test_a_switch_in_two_hops_is_not_a_switch_in_one():
    """Rounding twice moves what the first hop made a tie; so artifacts keep the highest codes."""
    codes = jnp.asarray(integers(8), jnp.int32)
    straight = double_rounding.switch(codes, 2, max_bits=8)
    by_four = double_rounding.switch(double_rounding.switch(codes, 4, max_bits=8), 2, max_bits=4)
    assert np.any(np.asarray(straight) != np.asarray(by_four))
    expected = [second_rounding(second_rounding(code, 4, 4), 2, 2) for code in integers(8).tolist()]
    np.testing.assert_array_equal(by_four, expected)


def test_unshared_and_floored_differ_from_the_default_where_they_should():
    w = np.linspace(-1, 1, 400, dtype=np.float32)
    names = ("double_rounding", "double_rounding_unshared", "double_rounding_floored")
    default, unshared, floored = (QUANTIZERS[name].weights for name in names)
    assert (default.shared_step_size, unshared.shared_step_size, floored.shared_step_size) == (
        True,
        False,
        True,
    )
    of_default, of_unshared, of_floored = (
        functools.partial(jitted(q.fake_quant), max_bits=8, grad_scale=None)
        for q in (default, unshared, floored)
    )
    for bits, step in itertools.product((2, 5, 8), (0.004, 0.01)):
        a, c = (quantized(w, step, bits) for quantized in (of_default, of_floored))
        b = of_unshared(w, step * 2 ** (8 - bits), bits)
        np.testing.assert_array_equal(a, b)
        assert (bits == 8) == np.array_equal(a, c)

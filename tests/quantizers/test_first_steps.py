"""First step sizes: of trained kernels, and of tensors that hold nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.quantizers import QUANTIZERS, lsq

BITS = (2, 3, 4, 5, 6, 7, 8, 12)
by_error = jax.jit(lsq.init_weight_step_by_error)


def kernel(kind):
    draw = np.random.default_rng(0)
    w = {
        "normal": draw.normal(0, 0.1, (3, 3, 16, 32)),
        "uniform": draw.uniform(-1, 1, (3, 3, 16, 32)),
        "heavy tails": draw.standard_t(3, (3, 3, 16, 32)),  # as in trained depthwise kernels
        "one outlier": np.where(np.arange(4608) == 7, 1.0, draw.normal(0, 0.01, 4608)),
    }[kind]
    return jnp.asarray(w, jnp.float32)


def error(w, step, bits):
    return float(jnp.mean((lsq.fake_quant(w, step, bits, signed=True) - w) ** 2))


KINDS = ("normal", "uniform", "heavy tails", "one outlier")


@pytest.mark.slow_but_first
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_steps_are_by_three_sigma_below_six_bits_and_by_the_error_above(kind, bits):
    w = kernel(kind)
    step, three_sigma = by_error(w, bits), lsq.init_weight_step(w, bits)
    if bits < 6:
        np.testing.assert_allclose(step, three_sigma, rtol=1e-6)
        return
    largest = jnp.max(jnp.abs(w)) / (2 ** (bits - 1) - 1)
    assert error(w, step, bits) <= 1.03 * min(error(w, three_sigma, bits), error(w, largest, bits))


def test_eight_bits_keep_a_kernel_that_three_sigma_clips():
    """The error is that of rounding, step^2 / 12, and not that of the weights beyond the range."""
    w = kernel("heavy tails")
    step = by_error(w, 8)
    assert error(w, step, 8) < 2 * float(step) ** 2 / 12
    assert error(w, lsq.init_weight_step(w, 8), 8) > 20 * error(w, step, 8)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_all_quantizers_start_so(name):
    w = kernel("heavy tails")
    found = QUANTIZERS[name].weights.init_step(w, jnp.int32(8))
    np.testing.assert_allclose(found, by_error(w, 8), rtol=1e-6)


@pytest.mark.parametrize("init", [lsq.init_weight_step, lsq.init_weight_step_by_error])
@pytest.mark.parametrize("bits", [2, 8])
def test_a_kernel_of_zeros_starts_as_wide_as_a_drawn_one(init, bits):
    step = init(jnp.zeros((3, 3, 16, 8)), bits)
    np.testing.assert_allclose(step, 3 / np.sqrt(3 * 3 * 16) / 2 ** (bits - 1), rtol=0.01)
    drawn = np.random.default_rng(0).normal(0, 1 / np.sqrt(144), (3, 3, 16, 8))
    np.testing.assert_allclose(step, lsq.init_weight_step(jnp.float32(drawn), bits), rtol=0.1)


@pytest.mark.parametrize(("bits", "signed"), [(2, False), (4, True), (8, False)])
def test_inputs_of_zeros_start_as_normal_ones(bits, signed):
    step = lsq.init_act_step(jnp.zeros((64, 9)), bits, signed=signed)
    drawn = jnp.asarray(np.random.default_rng(0).normal(size=(5000, 9)), jnp.float32)
    np.testing.assert_allclose(step, lsq.init_act_step(drawn, bits, signed=signed), rtol=0.02)


@pytest.mark.slow_but_first
@pytest.mark.parametrize("bits", [4, 8])
def test_a_kernel_of_zeros_learns(bits):
    """Gradients pass as far as the first range goes, so the kernel reaches its target."""
    target = jnp.asarray(np.random.default_rng(0).normal(0, 0.2, (16, 4)), jnp.float32)

    def loss(w, step):
        return jnp.mean((lsq.fake_quant(w, step, bits, signed=True) - target) ** 2)

    w = jnp.zeros((16, 4))
    step = lsq.init_weight_step(w, bits)
    for _ in range(100):
        w = w - 10 * jax.grad(loss)(w, step)
    assert loss(w, step) < {4: 0.2, 8: 1e-3}[bits] * loss(jnp.zeros((16, 4)), step)

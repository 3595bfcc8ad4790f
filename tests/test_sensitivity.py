import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.recording import CompileCounter
from mpq_jax.sensitivity import instability

BITS = np.array([6, 5, 4, 3, 2])
ALL = np.ones(5, bool)
NORMAL = statistics.NormalDist()
GAUSSIAN = np.array([NORMAL.inv_cdf((i + 0.5) / 20_000) for i in range(20_000)], np.float32)
STEPS = np.float32(3) / 2.0 ** (BITS.astype(np.float32) - 1)  # three-sigma rule, sigma 1


def bin_loop(w, steps, bits, mask, proportion=0.25):
    """Walks over the bins of every allowed bit-width, as the published code does."""
    w, total = w.reshape(-1), 0.0
    for step, b in zip(steps[mask], bits[mask], strict=True):
        low, high = -(2 ** (b - 1)), 2 ** (b - 1) - 1
        r = w / step
        k = np.clip(np.round(r), low, high)
        unstable = 0
        for code in range(low, high + 1):
            d = (r - k)[k == code]
            if code == low:
                d = d[d > 0]
            elif code == high:
                d = d[d < 0]
            unstable += np.sum(np.abs(d) > 0.5 * (1 - proportion))
        total += unstable / len(w) / b
    return total / mask.sum()


def only(*bits):
    return np.isin(BITS, bits)


@pytest.mark.parametrize("proportion", [0.1, 0.25, 0.9])
@pytest.mark.parametrize("mask", [ALL, only(6, 5, 4, 3), only(2), only(6, 2)])
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_instability_equals_a_loop_over_bins(scale, mask, proportion):
    random = np.random.default_rng(3)
    w = (scale * random.normal(size=(3, 3, 8, 16))).astype(np.float32)
    steps = (STEPS * random.uniform(0.8, 1.2, 5)).astype(np.float32)
    expected = bin_loop(w, steps, BITS, mask, proportion)
    given = instability(jnp.asarray(w), jnp.asarray(steps), BITS, mask, proportion=proportion)
    np.testing.assert_allclose(given, expected, rtol=1e-6)  # counts are exact, their mean is not


def gaussian_share(b, step):
    """Returns how likely a standard normal value is unstable at b bits, divided by b."""
    low, high = -(2 ** (b - 1)), 2 ** (b - 1) - 1
    below = sum(
        NORMAL.cdf((k + 0.5) * step) - NORMAL.cdf((k + 0.375) * step) for k in range(low, high)
    )
    above = sum(
        NORMAL.cdf((k - 0.375) * step) - NORMAL.cdf((k - 0.5) * step)
        for k in range(low + 1, high + 1)
    )
    return (below + above) / b


@pytest.mark.parametrize(
    ("bits", "rounded"), [(2, 0.119), (3, 0.082), (4, 0.063), (5, 0.050), (6, 0.041)]
)
def test_gaussian_weights_at_each_bit_width(bits, rounded):
    given = instability(jnp.asarray(GAUSSIAN), jnp.asarray(STEPS), BITS, only(bits))
    # 20,000 quantiles stand for the distribution; the rounded references are good to 0.001.
    assert given == pytest.approx(gaussian_share(bits, 3 / 2 ** (bits - 1)), abs=2e-4)
    assert given == pytest.approx(rounded, abs=1e-3)


@pytest.mark.parametrize(
    ("mask", "metric"), [(ALL, 0.071), (only(6, 5, 4, 3), 0.059), (only(6, 5, 4), 0.051)]
)
def test_gaussian_metric_depends_on_what_is_allowed(mask, metric):
    given = instability(jnp.asarray(GAUSSIAN), jnp.asarray(STEPS), BITS, mask)
    assert given == pytest.approx(metric, abs=5e-4)  # the references have three decimals


def test_clipped_weights_never_count():
    beyond = jnp.array([-40.0, -2.5, -2.4, 1.4, 1.49, 30.0])  # outside of the outermost centres
    assert instability(beyond, jnp.ones(1), np.array([2]), np.ones(1, bool)) == 0
    near = jnp.array([-1.6, -1.4, -0.6, -0.4, 0.4, 0.6])  # beside every boundary of 2 bits
    assert instability(near, jnp.ones(1), np.array([2]), np.ones(1, bool)) == 0.5
    far = jnp.array([-1.7, -1.3, -0.3, 0.3, 0.7, 1.0])
    assert instability(far, jnp.ones(1), np.array([2]), np.ones(1, bool)) == 0


def test_steps_of_masked_bits_do_not_matter():
    mask = only(6, 4)
    wild = np.where(mask, STEPS, np.float32(np.nan))
    w = jnp.asarray(GAUSSIAN)
    assert instability(w, jnp.asarray(wild), BITS, mask) == instability(
        w, jnp.asarray(STEPS), BITS, mask
    )


def test_layers_of_one_shape_share_one_compilation():
    random = np.random.default_rng(0)
    with CompileCounter() as counter:
        for layer in range(4):
            w = jnp.asarray(random.normal(size=(3, 3, 7, 5)).astype(np.float32))
            bits = jnp.asarray(BITS) + layer
            instability(w, jnp.asarray(STEPS), bits, jnp.asarray(only(6, 5, 4, layer + 2)))
    assert counter.counts["instability"] == 1


def test_instability_may_be_traced_and_mapped_over_layers():
    w = jax.random.normal(jax.random.key(0), (3, 4, 5))
    masks = jnp.array([ALL, only(2), only(6, 5)])
    mapped = jax.jit(jax.vmap(instability, (0, None, None, 0)))(
        w, jnp.asarray(STEPS), jnp.asarray(BITS), masks
    )
    alone = [
        instability(row, jnp.asarray(STEPS), jnp.asarray(BITS), mask)
        for row, mask in zip(w, masks, strict=True)
    ]
    np.testing.assert_allclose(mapped, np.stack(alone), rtol=1e-6)  # sums in another order

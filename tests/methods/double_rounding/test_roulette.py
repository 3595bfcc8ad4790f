"""The Hessian-aware roulette: its probabilities in closed form, and its draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.methods.double_rounding.roulette import roulette, roulette_probabilities

DRAWS = 6000
ROULETTE = (8, 6, 4, 2)
TRACES = np.array([0.5, 3.0, 2.0, 10.0, -1.0], np.float32)  # mean 2.9
CHOICES = np.array(
    [[0, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 1, 0], [1, 1, 0, 0]], bool
)  # layer 3 is fixed: the mean of the others is 1.125
RULES = ("published", "smooth", "uniform")


def mixture(share, bits):
    bits = np.array(bits, np.float64)
    return (1 - share) / len(bits) + share * bits / bits.sum()


def test_published_roulette_has_a_mean_of_5_or_6_bits():
    given = roulette_probabilities(ROULETTE, TRACES)
    assert given.dtype == jnp.float32
    np.testing.assert_allclose(given[0], [0.25, 0.25, 0.25, 0.25], rtol=1e-6)
    np.testing.assert_allclose(given[1], [0.4, 0.3, 0.2, 0.1], rtol=1e-6)
    np.testing.assert_allclose(given @ np.array(ROULETTE, np.float32), [5, 6, 5, 6, 5], rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_roulette_with_a_mask_is_the_formula_over_the_allowed_bits(rule):
    mean = TRACES[[0, 1, 2, 4]].mean()
    smooth_mean = np.maximum(TRACES, 0)[[0, 1, 2, 4]].mean()
    clipped = np.maximum(TRACES, 0)
    share = {
        "published": TRACES >= mean,
        "smooth": clipped / (clipped + smooth_mean),
        "uniform": np.zeros(5),
    }[rule]
    given = roulette_probabilities(ROULETTE, TRACES, rule=rule, mask=CHOICES)
    for row, allowed, r in zip(given, CHOICES, share, strict=True):
        np.testing.assert_allclose(row[allowed], mixture(r, np.array(ROULETTE)[allowed]), rtol=1e-6)
        assert not row[~allowed].any()


@pytest.mark.parametrize("mask", [None, CHOICES])
@pytest.mark.parametrize("rule", RULES)
def test_roulette_draws_by_its_probabilities(rule, mask):
    keys = jax.random.split(jax.random.key(1), DRAWS)
    draw = jax.jit(jax.vmap(lambda key: roulette(key, ROULETTE, TRACES, rule=rule, mask=mask)))
    drawn = draw(keys)
    assert drawn.dtype == jnp.int32
    frequencies = np.mean(np.asarray(drawn)[..., None] == np.array(ROULETTE), axis=0)
    p = np.asarray(roulette_probabilities(ROULETTE, TRACES, rule=rule, mask=mask), np.float64)
    sigma = np.sqrt(np.maximum(p * (1 - p), 0) / DRAWS)
    assert np.all(np.abs(frequencies - p) <= 5 * sigma + 1e-6)  # float32 probabilities; fixed key


@pytest.mark.slow_but_first
@pytest.mark.parametrize(("rule", "share"), [("published", 1), ("smooth", 0.5), ("uniform", 0)])
@pytest.mark.parametrize("trace", [0.1, 7.3e-8, 3.3e5, 0.0])
@pytest.mark.parametrize("layers", [1, 3, 7])
def test_equal_traces_give_equal_probabilities(layers, trace, rule, share):
    traces = np.full(layers, trace, np.float32)
    given = roulette_probabilities(ROULETTE, traces, rule=rule)
    expected = np.tile(mixture(share, ROULETTE), (layers, 1))
    np.testing.assert_allclose(given, expected, rtol=1e-6)


def mean_bits(traces, rule):
    given = roulette_probabilities(ROULETTE, np.asarray(traces, np.float32), rule=rule)
    return np.asarray(given) @ np.array(ROULETTE, np.float32)


def test_smooth_roulette_rises_with_the_trace():
    means = mean_bits(np.arange(40), "smooth")
    assert np.all(np.diff(means) > 0)
    assert means[0] == pytest.approx(5) and 5 < means[-1] < 6


def test_only_the_published_roulette_has_a_cliff_at_the_mean():
    alike = 1 + 1e-4 * np.array([-1, 1, -2, 2])
    assert np.ptp(mean_bits(alike, "published")) == pytest.approx(1)
    assert np.ptp(mean_bits(alike, "smooth")) < 2e-4


@pytest.mark.parametrize("rule", RULES)
def test_roulette_does_not_depend_on_the_unit_of_the_traces(rule):
    given = [
        roulette_probabilities(ROULETTE, TRACES * np.float32(scale), rule=rule)
        for scale in (1, 1e-12, 1e12)
    ]
    np.testing.assert_allclose(given[1], given[0], rtol=1e-6)
    np.testing.assert_allclose(given[2], given[0], rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_fixed_layers_do_not_count_whatever_their_trace(rule):
    wild = np.where(np.arange(5) == 3, np.float32(np.nan), TRACES)
    given, expected = (
        roulette_probabilities(ROULETTE, traces, rule=rule, mask=CHOICES)
        for traces in (wild, TRACES)
    )
    np.testing.assert_array_equal(given, expected)
    fixed = np.array([[0, 1, 0, 0], [1, 0, 0, 0]], bool)
    bits = roulette(jax.random.key(0), ROULETTE, TRACES[:2], rule=rule, mask=fixed)
    np.testing.assert_array_equal(bits, [6, 8])


@pytest.mark.parametrize("rule", RULES)
def test_roulette_traces_everything_and_compiles_once(rule):
    traced = []

    @jax.jit
    def draw(key, candidates, traces, mask):
        traced.append(mask)
        return roulette(key, candidates, traces, rule=rule, mask=mask)

    random = np.random.default_rng(0)
    for seed in range(4):
        key, traces = jax.random.key(seed), random.normal(size=5).astype(np.float32)
        mask = np.roll(CHOICES, seed, axis=0)
        given = draw(key, jnp.array(ROULETTE), traces, mask)
        plain = roulette(key, ROULETTE, traces, rule=rule, mask=mask)
        np.testing.assert_array_equal(given, plain)
    assert len(traced) == 1


def test_an_unknown_rule_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'rank'; known rules are .*'published'.*'uniform'"):
        roulette(jax.random.key(0), ROULETTE, TRACES, rule="rank")


def test_a_mask_of_other_choices_is_refused():
    with pytest.raises(ValueError, match=r"shape \(5, 4\); wanted .*\(5, 3\)"):
        roulette_probabilities((8, 6, 4), TRACES, mask=CHOICES)

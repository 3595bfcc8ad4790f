import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.supernet.bits import (
    BitConfig,
    check_mask,
    from_json,
    largest,
    roulette,
    roulette_probabilities,
    sample,
    smallest,
    to_json,
)

CANDIDATES = (8, 6, 5, 4, 3, 2)
MASK = np.array(
    [
        [[0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]],
        [[1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]],
        [[1, 0, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1]],
    ],
    bool,
)
NAMES = ("stem", "stage0/conv1", "head")
DRAWS = 6000


def stacked(config):
    """Returns [..., layers, 2], as the mask is ordered."""
    return np.stack([config.weights, config.acts], axis=-1)


def allowed_bits(layer, kind):
    return np.array(CANDIDATES)[MASK[layer, kind]]


@pytest.fixture(scope="module")
def draws():
    keys = jax.random.split(jax.random.key(0), DRAWS)
    config = jax.jit(jax.vmap(lambda key: sample(key, CANDIDATES, MASK)))(keys)
    assert config.weights.dtype == config.acts.dtype == jnp.int32
    return stacked(config)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("layer", range(3))
def test_draws_are_uniform_over_what_the_mask_allows(draws, layer, kind):
    values, counts = np.unique(draws[:, layer, kind], return_counts=True)
    np.testing.assert_array_equal(values, np.sort(allowed_bits(layer, kind)))
    expected = DRAWS / len(values)
    chi_square = np.sum((counts - expected) ** 2 / expected)
    assert chi_square < 21  # 99.9 % of up to 5 degrees of freedom lie below 20.5; fixed key


def test_draws_are_independent(draws):
    columns = draws.reshape(DRAWS, -1).astype(np.float64)
    columns = columns[:, columns.std(axis=0) > 0]
    correlation = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert np.abs(correlation).max() < 4 / np.sqrt(DRAWS)  # four standard deviations


def test_same_key_same_draw_and_other_key_other_draw():
    wide = np.ones((40, 2, len(CANDIDATES)), bool)
    one, again, other = (
        stacked(sample(jax.random.key(seed), CANDIDATES, wide)) for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_choice_functions_trace_mask_and_candidates_and_compile_once():
    traces = []

    @jax.jit
    def choose(key, candidates, mask):
        traces.append(mask)
        return sample(key, candidates, mask), largest(candidates, mask), smallest(candidates, mask)

    random = np.random.default_rng(0)
    for seed in range(5):
        mask = MASK & (random.random(MASK.shape) < 0.7)
        mask |= MASK & ~mask.any(-1, keepdims=True)
        key = jax.random.key(seed)
        given = choose(key, jnp.array(CANDIDATES), mask)
        plain = (
            sample(key, CANDIDATES, mask),
            largest(CANDIDATES, mask),
            smallest(CANDIDATES, mask),
        )
        jax.tree.map(np.testing.assert_array_equal, given, plain)
    assert len(traces) == 1


@pytest.mark.parametrize("candidates", [CANDIDATES, (2, 3, 4, 5, 6, 8), (4, 8, 2, 6, 3, 5)])
def test_largest_and_smallest(candidates):
    values = np.array(candidates)
    top = np.max(np.where(MASK, values, 0), axis=-1)
    bottom = np.min(np.where(MASK, values, 99), axis=-1)
    np.testing.assert_array_equal(stacked(largest(candidates, MASK)), top)
    np.testing.assert_array_equal(stacked(smallest(candidates, MASK)), bottom)
    assert largest(candidates, MASK).weights.dtype == jnp.int32


def test_mask_axis_may_be_mapped():
    masks = jnp.stack([MASK, MASK[::-1]])
    mapped = stacked(jax.vmap(lambda mask: smallest(CANDIDATES, mask))(masks))
    np.testing.assert_array_equal(mapped[1], mapped[0][::-1])


def config(weights=(6, 8, 3), acts=(4, 4, 2)):
    return BitConfig(jnp.array(weights, jnp.int32), jnp.array(acts, jnp.int32))


def test_json_round_trip_in_any_order_of_names():
    text = to_json(config(), NAMES)
    back = from_json(text, NAMES)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), back, config())
    reversed_order = from_json(text, NAMES[::-1])
    np.testing.assert_array_equal(stacked(reversed_order), stacked(config())[::-1])


def test_json_holds_readable_layers():
    content = json.loads(to_json(config(), NAMES))
    assert content["version"] == 1
    assert content["layers"]["stage0/conv1"] == {"weights": 8, "acts": 4}
    assert list(content["layers"]) == list(NAMES)


def test_names_that_need_escapes_survive():
    names = ('a"b', "c\\d", "é\n")
    np.testing.assert_array_equal(from_json(to_json(config(), names), names).acts, [4, 4, 2])


def test_a_changed_layer_changes_one_line():
    one, other = (
        to_json(given, NAMES).splitlines() for given in (config(), config(weights=(6, 5, 3)))
    )
    changed = [(a, b) for a, b in zip(one, other, strict=True) if a != b]
    assert len(changed) == 1
    assert "stage0/conv1" in changed[0][0] and "8" in changed[0][0] and "5" in changed[0][1]


@pytest.mark.parametrize("names", [NAMES[:2], (*NAMES, "more")])
def test_writing_with_the_wrong_number_of_names_is_refused(names):
    with pytest.raises(ValueError, match=rf"\(3,\).*there are {len(names)} layer names"):
        to_json(config(), names)


def test_writing_several_configurations_at_once_is_refused():
    several = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), config())
    with pytest.raises(ValueError, match=r"\(2, 3\).*pass one configuration"):
        to_json(several, NAMES)


def with_content(**changes):
    return json.dumps(json.loads(to_json(config(), NAMES)) | changes)


def with_layer(entry):
    layers = json.loads(to_json(config(), NAMES))["layers"] | {"head": entry}
    return with_content(layers=layers)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits: 4", "not JSON"),
        ("", "not JSON"),
        ("[4]", "format"),
        ("{}", '"format" should be "mpq_jax.bits"'),
        (with_content(format="other"), "format"),
        (with_content(version=2), "version 2.*reads version 1.*update mpq_jax"),
        (with_content(version=None), "version None"),
        (with_content(layers=[]), "layers"),
        (with_content(layers={"stem": {}}), r"missing layers: \['head', 'stage0/conv1'\]; unexpected layers: none"),
        (
            with_layer({"weights": 1, "acts": 1}).replace("head", "tail"),
            r"another model.*missing layers: \['head'\]; unexpected layers: \['tail'\]",
        ),
        (with_layer({"weights": 2}), "acts of layer 'head' is None"),
        (with_layer({"acts": 2}), "weights of layer 'head' is None"),
        (with_layer([4, 4]), "weights of layer 'head' is None"),
        (with_layer({"weights": "4", "acts": 4}), "weights of layer 'head' is '4'; wanted"),
        (with_layer({"weights": 4.0, "acts": 4}), "is 4.0; wanted an integer"),
        (with_layer({"weights": True, "acts": 4}), "is True; wanted an integer"),
        (with_layer({"weights": 4, "acts": 0}), "acts of layer 'head' is 0; wanted"),
        (with_layer({"weights": 33, "acts": 4}), "is 33; wanted an integer, 0 to 32"),
    ],
)
def test_reading_something_else_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        from_json(text, NAMES)


def test_check_mask_accepts_what_allows_something_everywhere():
    check_mask(MASK, NAMES)


def test_check_mask_names_every_empty_row():
    mask = MASK.copy()
    mask[0, 1] = mask[2, 0] = False
    with pytest.raises(ValueError, match=r"for stem \(activations\), head \(weights\); allow"):
        check_mask(jnp.asarray(mask), NAMES)


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

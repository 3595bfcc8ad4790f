import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.supernet.bits import (
    BitConfig,
    check_mask,
    from_json,
    max_config,
    min_config,
    sample,
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
        return (
            sample(key, candidates, mask),
            max_config(candidates, mask),
            min_config(candidates, mask),
        )

    random = np.random.default_rng(0)
    for seed in range(5):
        mask = MASK & (random.random(MASK.shape) < 0.7)
        mask |= MASK & ~mask.any(-1, keepdims=True)
        key = jax.random.key(seed)
        given = choose(key, jnp.array(CANDIDATES), mask)
        plain = (
            sample(key, CANDIDATES, mask),
            max_config(CANDIDATES, mask),
            min_config(CANDIDATES, mask),
        )
        jax.tree.map(np.testing.assert_array_equal, given, plain)
    assert len(traces) == 1


@pytest.mark.parametrize("candidates", [CANDIDATES, (2, 3, 4, 5, 6, 8), (4, 8, 2, 6, 3, 5)])
def test_max_config_and_min_config(candidates):
    values = np.array(candidates)
    top = np.max(np.where(MASK, values, 0), axis=-1)
    bottom = np.min(np.where(MASK, values, 99), axis=-1)
    np.testing.assert_array_equal(stacked(max_config(candidates, MASK)), top)
    np.testing.assert_array_equal(stacked(min_config(candidates, MASK)), bottom)
    assert max_config(candidates, MASK).weights.dtype == jnp.int32


def test_mask_axis_may_be_mapped():
    masks = jnp.stack([MASK, MASK[::-1]])
    mapped = stacked(jax.vmap(lambda mask: min_config(CANDIDATES, mask))(masks))
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
        ("[" * 10**5, "not a bit configuration: the text is nested too deeply"),
        (
            with_layer({"weights": 2, "acts": 2}).replace('"stem"', '"head"'),
            r"not a bit configuration: the text names \['head'\] more than once",
        ),
        ("[4]", "format"),
        ("{}", '"format" should be "mpq_jax.bits"'),
        (with_content(format="other"), "format"),
        (with_content(version=2), "version 2.*reads version 1.*update mpq_jax"),
        (with_content(version=None), "version None"),
        (with_content(layers=[]), "layers"),
        (
            with_content(layers={"stem": {}}),
            r"missing layers: \['head', 'stage0/conv1'\]; unexpected layers: none",
        ),
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

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.search_problems import (
    FREE,
    KEY,
    QUICK,
    Recorder,
    all_bits,
    bits_of,
    budget,
    constraint,
    exact_cost,
    never,
    rugged,
)

from mpq_jax.search.score_cache import ScoreCache
from mpq_jax.search.space import SearchSpace
from mpq_jax.search.strategies import STRATEGIES
from mpq_jax.supernet.bits import BitConfig

OF = {"supernet": "abc", "metric": "loss", "images": [1, 2]}
OTHER_KEY = jax.random.key(4)


def configs(*rows):
    bits = jnp.array(rows, jnp.int32)
    return BitConfig(bits, bits + 1)


def weights_sum(given, key):
    return np.asarray(given.weights, np.float64).sum(-1) / 3  # no short decimals


@pytest.fixture
def path(tmp_path):
    return tmp_path / "search" / "scores.jsonl"


def test_only_what_is_new_is_asked_for_and_all_is_answered_in_order(path):
    score = Recorder(weights_sum)
    cache = ScoreCache(path, OF)
    remembered = cache.remember(score)
    first = remembered(configs([1, 2], [3, 4], [1, 2]), KEY)
    second = remembered(configs([5, 6], [3, 4], [7, 8], [1, 2]), KEY)
    np.testing.assert_array_equal(first, np.array([3, 7, 3]) / 3)
    np.testing.assert_array_equal(second, np.array([11, 7, 15, 3]) / 3)
    asked = [call[..., 0].tolist() for call in score.calls]
    assert [sorted(rows) for rows in asked] == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    assert (cache.known, cache.scored) == (0, 4)
    remembered(configs([1, 2]), OTHER_KEY)  # other images: another score
    assert cache.scored == 5 and len(score.calls) == 3
    assert [value for _, value in cache.configs][-1] == 1.0
    assert len(cache.configs) == 5


def test_a_file_opened_again_gives_the_same_scores_to_the_last_bit(path):
    values = {1: 1 / 3, 2: np.nan, 3: np.inf, 4: -np.inf, 5: 1e-300, 6: float(np.float32(0.1))}
    rows = [[number, 0] for number in values]

    def score(given, key):
        return np.array([values[int(row[0])] for row in given.weights])

    wanted = ScoreCache(path, OF).remember(score)(configs(*rows), KEY)
    again = ScoreCache(path, OF)
    assert (again.known, again.scored) == (6, 0)
    np.testing.assert_array_equal(again.remember(never)(configs(*rows), KEY), wanted)
    assert again.scored == 0
    for (bits, value), row in zip(again.configs, rows, strict=True):
        np.testing.assert_array_equal(bits.weights, row)
        np.testing.assert_array_equal(bits.acts, np.array(row) + 1)
        np.testing.assert_array_equal(value, values[row[0]])


@pytest.mark.parametrize("cut", [1, 2, 20, 60])
def test_a_last_line_that_was_cut_off_is_scored_again(path, cut):
    ScoreCache(path, OF).remember(weights_sum)(configs([1, 2], [3, 4], [5, 6]), KEY)
    whole = path.read_text()
    path.write_text(whole[:-cut])
    score = Recorder(weights_sum)
    cache = ScoreCache(path, OF)
    assert cache.known == 2
    found = cache.remember(score)(configs([5, 6], [3, 4], [1, 2]), KEY)
    np.testing.assert_array_equal(found, np.array([11, 7, 3]) / 3)
    assert score.seen[..., 0].tolist() == [[5, 6]]
    assert path.read_text() == whole


def test_who_may_not_write_writes_nothing(path):
    silent = ScoreCache(path, OF, write=False)
    silent.remember(weights_sum)(configs([1, 2]), KEY)
    assert not path.exists() and silent.scored == 1
    ScoreCache(path, OF).remember(weights_sum)(configs([1, 2]), KEY)
    torn = path.read_text()[:-1]
    path.write_text(torn)
    reader = ScoreCache(path, OF, write=False)
    reader.remember(weights_sum)(configs([1, 2], [3, 4]), KEY)
    assert path.read_text() == torn and reader.scored == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no scores"),
        ('{"format": "mpq_jax.sco', "holds no scores"),
        ("weights,acts\n4,3\n", "holds no scores"),
        ("[]\n", "the scores of something else"),
        ('{"format": "mpq_jax.bits", "version": 1}\n', "the scores of something else"),
    ],
)
def test_foreign_files_are_refused_and_left_alone(path, text, message):
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=message + ".* move it away"):
        ScoreCache(path, OF)
    assert path.read_text() == text


@pytest.mark.parametrize("change", [{"supernet": "abd"}, {"metric": "error"}, {"images": [2, 1]}])
def test_scores_of_something_else_are_refused(path, change):
    ScoreCache(path, OF).remember(weights_sum)(configs([1, 2]), KEY)
    ScoreCache(path, dict(reversed(OF.items())))  # the order of names says nothing
    with pytest.raises(ValueError, match="of something else: .*abc.*; wanted .*; move it away"):
        ScoreCache(path, OF | change)
    header = json.loads(path.read_text().splitlines()[0])
    path.write_text(json.dumps(header | {"version": 2}) + "\n")
    with pytest.raises(ValueError, match="of something else"):
        ScoreCache(path, OF)


class Killed(Exception):
    pass


def killed_after(calls):
    """A score that ends the process, after so many calls, without an answer."""
    left = [calls]

    def score(given, key):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return rugged(given)

    return score


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_killed_search_goes_on_and_ends_alike(name, tmp_path):
    totals = exact_cost(FREE, all_bits(FREE))
    budgets = [
        budget(str(part), constraint(FREE, totals.min() + part * np.ptp(totals)))
        for part in (0.8, 0.6, 0.4, 0.2)
    ]

    def run(score):
        options = QUICK.get(name, {})
        return STRATEGIES[name].search(score, SearchSpace(FREE), budgets, KEY, **options)

    direct, once = Recorder(rugged), Recorder(rugged)
    wanted = run(direct)
    whole = ScoreCache(tmp_path / "whole", OF)
    run(whole.remember(once))
    distinct = {(*pair,) for pair in zip(once.keys, (c.tobytes() for c in once.calls), strict=True)}
    assert len(distinct) == len(once.calls)
    assert whole.scored == len(once.seen) <= len(direct.seen)

    path, scored = tmp_path / "killed", 0
    for calls in (len(once.calls) // 3, len(once.calls) // 3):
        cache = ScoreCache(path, OF)
        assert cache.known == scored
        with pytest.raises(Killed):
            run(cache.remember(killed_after(calls)))
        scored += cache.scored
    path.write_text(path.read_text()[:-3])  # while it was writing
    last = ScoreCache(path, OF)
    assert last.known == scored - 1 > 0
    for found, one in zip(run(last.remember(rugged)), wanted, strict=True):
        np.testing.assert_array_equal(bits_of(found.bits), bits_of(one.bits))
        assert found.costs == one.costs and found.budget == one.budget
        np.testing.assert_array_equal(found.score, one.score)
    assert last.known + last.scored == whole.scored  # nothing was scored twice
    assert path.read_text() == (tmp_path / "whole").read_text()
    finished = ScoreCache(path, OF)
    run(finished.remember(never))
    assert finished.scored == 0

import json
import re
import resource

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
        ('{"format": "mpq_jax.bit', "holds no scores"),
        ("weights,acts\n4,3\n", "holds no scores"),
        ("[]\n", "the scores of something else"),
        ('{"format": "mpq_jax.bits", "version": 1}\n', "the scores of something else"),
        ('{"format": "mpq_jax.scores", "version": 1}\n{}\n', "is of version 1, .* reads version 2"),
        ("\0" * 100, "holds no scores"),
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
    path.write_text(json.dumps(header | {"version": 3}) + "\n")
    with pytest.raises(ValueError, match="is of version 3, and this mpq_jax reads version 2; move"):
        ScoreCache(path, OF)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99, 1])
def test_a_first_line_that_was_not_written_to_its_end_is_no_file(path, share):
    """A full disk leaves an empty file, or a part of the line."""
    ScoreCache(path, OF)
    first = path.read_text().removesuffix("\n")
    path.write_text(first[: round(share * len(first))])
    cache = ScoreCache(path, OF)
    cache.remember(weights_sum)(configs([1, 2]), KEY)
    assert ScoreCache(path, OF).known == 1
    assert path.read_text().startswith(first + "\n")


def test_scores_go_on_after_a_full_disk(path):
    """The last write breaks off in the middle, with an error; the next start goes on."""
    ScoreCache(path, OF).remember(weights_sum)(configs([1, 2], [3, 4]), KEY)
    cache, size = ScoreCache(path, OF), path.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))
    try:
        with pytest.raises(OSError):
            cache.remember(weights_sum)(configs([5, 6]), KEY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.stat().st_size == size + 20
    again = ScoreCache(path, OF)
    assert again.known == 2 and path.stat().st_size == size
    np.testing.assert_array_equal(again.remember(weights_sum)(configs([5, 6]), KEY), [11 / 3])
    assert ScoreCache(path, OF).known == 3


def flip(content, generator):
    place = generator.integers(len(content))
    return (
        content[:place]
        + bytes([content[place] ^ (1 << generator.integers(8))])
        + content[place + 1 :]
    )


def replace_by_digit(content, generator):
    place = generator.integers(len(content))
    return content[:place] + str(generator.integers(10)).encode() + content[place + 1 :]


def drop_bytes(content, generator):
    first, second = sorted(generator.integers(len(content), size=2))
    return content[:first] + content[second:]


def write_zeros(content, generator):
    first, second = sorted(generator.integers(len(content), size=2))
    return content[:first] + bytes(second - first) + content[second:]


def repeat_line(content, generator):
    lines = content.splitlines(keepends=True)
    return b"".join([*lines, lines[generator.integers(len(lines))]])


@pytest.mark.slow_but_first
@pytest.mark.parametrize("mutate", [flip, replace_by_digit, drop_bytes, write_zeros, repeat_line])
@pytest.mark.parametrize("seed", range(20))
def test_damage_never_gives_a_wrong_score(path, mutate, seed, caplog):
    """What is damaged is scored anew, with a warning, or the whole file is refused."""
    rows = [[number, number + 1] for number in range(12)]
    wanted = ScoreCache(path, OF).remember(weights_sum)(configs(*rows), KEY)
    whole = path.read_bytes()
    damaged = mutate(whole, np.random.default_rng(seed))
    path.write_bytes(damaged)
    try:
        cache = ScoreCache(path, OF)
    except ValueError as error:
        assert re.fullmatch(
            f"{path} (holds no scores|holds the scores of something else).*", str(error)
        )
        assert whole.splitlines()[0] != damaged.splitlines()[0] and path.read_bytes() == damaged
        return
    score = Recorder(weights_sum)
    np.testing.assert_array_equal(cache.remember(score)(configs(*rows), KEY), wanted)
    assert len(cache.configs) == len(rows) == cache.known + cache.scored
    broken = set(damaged.split(b"\n")[:-1]) - set(whole.splitlines())
    assert bool(broken) == (f"{path}: damaged lines are dropped" in caplog.text)
    assert set(path.read_bytes().splitlines()) == set(whole.splitlines())


def test_a_line_of_another_file_is_dropped(path, tmp_path, caplog):
    other = tmp_path / "other"
    ScoreCache(other, OF | {"metric": "error"}).remember(weights_sum)(configs([9, 9]), KEY)
    ScoreCache(path, OF).remember(weights_sum)(configs([1, 2]), KEY)
    with path.open("ab") as file:
        file.write(other.read_bytes().splitlines(keepends=True)[1])
    assert ScoreCache(path, OF).known == 1
    assert f"{path}: damaged lines are dropped, and what they held is scored anew: 1" in caplog.text
    assert len(path.read_text().splitlines()) == 2


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

"""The contract that every strategy keeps."""

import inspect
import math

import jax
import numpy as np
import pytest
from helpers.search_problems import (
    FIXED,
    FREE,
    KEY,
    QUICK,
    TABLES,
    Recorder,
    additive,
    all_bits,
    bits_of,
    budget,
    constant,
    constraint,
    cost_table,
    exact_cost,
    never,
    rugged,
)

from mpq_jax.search.ilp import check_budgets
from mpq_jax.search.problem import Constraint
from mpq_jax.search.space import SearchSpace
from mpq_jax.search.strategies import STRATEGIES
from mpq_jax.supernet.bits import BitConfig

SCORES = {"rugged": rugged, "constant": constant}
DESCENTS = ("greedy", "tabu")  # which take no lower bounds


def search(name, score, budgets, *, table=FREE, mask=None, key=KEY, **options):
    """Checks the budgets and searches, as `run.search` does."""
    space = SearchSpace(table, mask)
    check_budgets(space, budgets)
    options = QUICK.get(name, {}) | options
    return STRATEGIES[name].search(score, space, budgets, key, **options)


def config_of(bits):
    return BitConfig(*np.moveaxis(np.asarray(bits), -1, 0))


def share(table, part, kind="bitops", mask=None):
    """Returns a part of the way from the least to the largest cost."""
    totals = exact_cost(table, all_bits(table, mask), kind)
    return float(totals.min() + part * (totals.max() - totals.min()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "score"), [*((which, "rugged") for which in TABLES), ("groups", "constant")]
)
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_budget_is_kept_and_answered_in_its_order(name, which, score):
    table = TABLES[which]
    amounts = {"half": 0.5, "least": 0.0, "most": 1.0, "tight": 0.15}
    amounts = {key: share(table, part) for key, part in amounts.items()}
    budgets = [budget(key, constraint(table, amount)) for key, amount in amounts.items()]
    results = search(name, SCORES[score], budgets, table=table)
    assert [found.budget for found in results] == list(amounts)
    for found, amount in zip(results, amounts.values(), strict=True):
        table.check(found.bits)  # rules, ties
        bits = bits_of(found.bits)
        assert found.bits.weights.dtype == found.bits.acts.dtype == np.int32
        assert list(found.costs) == ["bitops"]
        np.testing.assert_allclose(
            found.costs["bitops"], exact_cost(table, bits), rtol=1e-12
        )  # sums
        assert exact_cost(table, bits) <= amount * (1 + 1e-6)
        for one in FIXED[which]:
            place = table.names.index(one)
            assert bits[place].tolist() == [table.layers[place].max_bits] * 2
        if not math.isnan(found.score):
            assert found.score == SCORES[score](config_of(bits[None]))[0]


@pytest.mark.parametrize("miss", [1e-7, 1e-5])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_limit_is_kept_to_a_millionth(name, miss):
    """Costs are integers here; the least is 1e-7 above one limit and 1e-5 above the other."""
    least = share(FREE, 0.0)
    budgets = [budget("edge", constraint(FREE, least / (1 + miss)))]
    if miss > 1e-6:
        with pytest.raises(ValueError, match="cannot be met"):
            search(name, never, budgets)
    else:
        (found,) = search(name, additive, budgets)
        assert found.costs["bitops"] == least


@pytest.mark.slow
@pytest.mark.parametrize("which", TABLES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_several_limits_are_kept_at_once(name, which):
    table = TABLES[which]
    configs = all_bits(table)
    kinds = ("bytes", "bitops", "act_bytes")
    budgets = []
    for seed in range(3):  # what some configuration costs: that one is within, few others are
        chosen = configs[np.random.default_rng(seed).integers(len(configs))]
        limits = [constraint(table, exact_cost(table, chosen, kind), kind) for kind in kinds]
        budgets.append(budget(f"like {seed}", *limits))
    results = search(name, rugged, budgets, table=table)
    for found, wanted in zip(results, budgets, strict=True):
        table.check(found.bits)
        assert list(found.costs) == list(kinds)
        for kind, one in zip(kinds, wanted.constraints, strict=True):
            assert exact_cost(table, bits_of(found.bits), kind) <= one.limit * (1 + 1e-6)


@pytest.mark.parametrize("most", [math.inf, 1400.0])
@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - set(DESCENTS)))
def test_lower_bounds_are_kept(name, most):
    """Even by a score that wants few bits."""
    one = budget(
        "window", constraint(FREE, most, "bytes", lower_bound=1200.0), constraint(FREE, 4.5e5)
    )
    (found,) = search(name, lambda configs, key: -rugged(configs), [one])
    assert 1200 <= exact_cost(FREE, bits_of(found.bits), "bytes") <= most
    assert found.costs["bitops"] <= 4.5e5


@pytest.mark.parametrize("name", DESCENTS)
def test_descents_refuse_lower_bounds(name):
    with pytest.raises(ValueError, match="bytes has a lower bound, 1300, .*search with ilp"):
        search(name, never, [budget("window", constraint(FREE, 1400, "bytes", lower_bound=1300.0))])


@pytest.mark.parametrize("name", DESCENTS)
def test_descents_refuse_costs_that_fall_with_more_bits(name):
    cost = cost_table(FREE)
    cost[1, FREE.candidates.index(3)] *= 10
    with pytest.raises(ValueError, match="by bitops, 'first' costs more with fewer bits; mask"):
        search(name, never, [budget("any", Constraint("bitops", cost, 1e9))])
    mask = FREE.mask.copy()
    mask[1, 0, FREE.candidates.index(3)] = False
    search(name, additive, [budget("any", Constraint("bitops", cost, 3.5e5))], mask=mask)


def narrowed(table):
    """Fixes, frozen bits and a gap, in entries that lead ties and in such as follow."""
    mask, place = table.mask.copy(), table.candidates.index
    mask[1, 0, place(3)] = False  # first: 4 or 2
    mask[4, 1, place(2)] = False  # the input of last, tied to the weights of first in "groups"
    mask[3, 0, place(4)] = False
    return mask


@pytest.mark.slow_but_first
@pytest.mark.parametrize("which", TABLES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_masks_and_ties_are_honored_in_all_that_is_scored(name, which):
    table = TABLES[which]
    mask = narrowed(table)
    allowed = {bits.tobytes() for bits in all_bits(table, mask)}
    score = Recorder(rugged)
    budgets = [
        budget(str(p), constraint(table, share(table, p, mask=mask))) for p in (0.7, 0.2, 0.0)
    ]
    results = search(name, score, budgets, table=table, mask=mask)
    assert score.calls
    for bits in [*score.seen, *(bits_of(found.bits) for found in results)]:
        assert bits.astype(np.int64).tobytes() in allowed


@pytest.mark.parametrize("name", STRATEGIES)
def test_options_are_the_keyword_arguments_with_defaults(name):
    strategy = STRATEGIES[name]
    parameters = inspect.signature(strategy.search).parameters.values()
    own = {one.name for one in parameters if one.kind is one.KEYWORD_ONLY}
    assert set(strategy.options) == own - {"on_step", "objective"}
    assert all(one.default is not one.empty for one in parameters if one.name in own)


@pytest.mark.slow_but_first
@pytest.mark.parametrize("name", STRATEGIES)
def test_equal_keys_give_equal_searches(name):
    budgets = [budget(str(part), constraint(FREE, share(FREE, part))) for part in (0.6, 0.2)]
    scores = [Recorder(rugged) for _ in range(2)]
    one, other = (search(name, score, budgets) for score in scores)
    for score in zip(scores[0].calls, scores[1].calls, strict=True):
        np.testing.assert_array_equal(*score)
    assert scores[0].keys == scores[1].keys
    for found, again in zip(one, other, strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, again)
    if name != "greedy":  # which wants fresh images for every move
        assert set(scores[0].keys) == {np.asarray(jax.random.key_data(KEY)).tobytes()}
    else:
        assert len(set(scores[0].keys)) == len(scores[0].keys) > 1


def test_budgets_out_of_reach_are_refused_with_the_range():
    low, high = share(FREE, 0.0), share(FREE, 1.0)
    fine = budget("fine", constraint(FREE, high))
    with pytest.raises(ValueError) as error:
        check_budgets(SearchSpace(FREE), [fine, budget("too small", constraint(FREE, low * 0.99))])
    message = str(error.value)
    assert message.startswith("too small: ") and "fine" not in message
    assert f"bitops should be -inf to {low * 0.99:.6g}" in message
    assert f"range is {low:.6g} to {high:.6g}" in message
    assert "largest parts are stem (1.92e+05), narrow (5.6e+04), first (3.6e+04)" in message
    both = budget("both", constraint(FREE, share(FREE, 0.1)), constraint(FREE, 700, "bytes"))
    with pytest.raises(ValueError, match="both: .*bytes cannot be met"):
        check_budgets(SearchSpace(FREE), [both])


@pytest.mark.parametrize("name", STRATEGIES)
def test_budgets_that_nobody_checked_are_refused_as_well(name):
    too_small = budget("too small", constraint(FREE, share(FREE, 0.0) * 0.99))
    with pytest.raises(ValueError, match="bitops cannot be met"):
        STRATEGIES[name].search(
            additive, SearchSpace(FREE), [too_small], KEY, **QUICK.get(name, {})
        )


@pytest.mark.parametrize("names", [[], ["a", "b", "a"]])
def test_budgets_need_names_of_their_own(names):
    with pytest.raises(ValueError, match="give one or more, each with a name of its own"):
        check_budgets(SearchSpace(FREE), [budget(one, constraint(FREE, 1e9)) for one in names])


def test_a_budget_needs_a_constraint():
    with pytest.raises(ValueError, match=r"the constraints are \[\]; give one or more"):
        check_budgets(SearchSpace(FREE), [budget("empty")])


@pytest.mark.slow_but_first
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", STRATEGIES)
def test_scores_that_are_no_numbers_never_win(name, bad):
    """Of a subnet that overflows; those within the budget that do not are many."""

    def broken(configs):
        bits = bits_of(configs)
        return (bits[..., 4, 0] == 2) | (bits[..., 1, 1] == 3)

    def score(configs, key):
        return np.where(broken(configs), bad, rugged(configs))

    budgets = [budget(str(part), constraint(FREE, share(FREE, part))) for part in (0.8, 0.6)]
    for found in search(name, score, budgets):
        assert not broken(found.bits)
        assert not np.isinf(found.score)


@pytest.mark.parametrize("name", ["greedy", "tabu", "evolution", "random"])
def test_where_the_largest_bits_have_no_score_others_win(name):
    def broken(configs):
        return (bits_of(configs)[..., 1:, :] == 4).sum((-2, -1)) >= 6

    def score(configs, key):
        return np.where(broken(configs), np.nan, rugged(configs))

    (found,) = search(name, score, [budget("half", constraint(FREE, share(FREE, 0.4)))])
    assert not broken(found.bits) and np.isfinite(found.score)


@pytest.mark.parametrize("name", ["ilp", "hybrid"])
def test_nothing_is_measured_against_largest_bits_without_a_score(name):
    def score(configs, key):
        return np.full(len(configs.weights), np.nan)

    with pytest.raises(ValueError, match="largest"):
        search(name, score, [budget("half", constraint(FREE, share(FREE, 0.5)))])


HOLES = {  # latencies as they are measured: same speed at several bits, pairs without a kernel
    "plateau": ("free", lambda w, a: np.maximum(w, 3) * np.maximum(a, 3)),
    "steps": ("free", lambda w, a: np.where((w > 3) | (a > 3), 4.0, 1.0)),
    "no 3 bits": ("free", lambda w, a: np.where((w == 3) | (a == 3), np.inf, w * a)),
    "equal pairs": ("tied", lambda w, a: np.where((w != a) & (w != 8), np.inf, w * a)),
    "few pairs": ("free", lambda w, a: np.where((w != a) & (a != 4), np.inf, w * a)),
    "nothing at 4": ("free", lambda w, a: np.where((w == 4) & (a == 4), np.inf, w * a)),
}


@pytest.mark.slow
@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_costs_may_have_plateaus_and_holes(name, hole):
    which, per_mac = HOLES[hole]
    table = TABLES[which]
    choices = np.array(table.candidates, np.float64)
    cost = cost_table(table, "bytes") * 0 + per_mac(choices[:, None], choices)
    cost *= np.array([layer.macs for layer in table.layers])[:, None, None]
    bits = all_bits(table)
    place = (bits[..., None] == choices).argmax(-1)
    if hole == "nothing at 4":  # "narrow" has no other input
        cost[3] = cost_table(table)[3]
    totals = cost[np.arange(5), place[..., 0], place[..., 1]].sum(-1)
    possible = np.unique(totals[np.isfinite(totals)])
    amounts = [possible[0], possible[len(possible) // 3], possible[-1]]
    budgets = [
        budget(f"{amount}", Constraint("latency", cost, float(amount))) for amount in amounts
    ]
    for found, amount in zip(search(name, rugged, budgets, table=table), amounts, strict=True):
        table.check(found.bits)
        assert found.costs["latency"] <= amount * (1 + 1e-6)


@pytest.mark.slow_but_first
@pytest.mark.parametrize("name", ["ilp", "hybrid"])
@pytest.mark.parametrize("which", TABLES)
def test_programs_find_the_best_where_losses_add_up(name, which):
    table = TABLES[which]
    bits = all_bits(table)
    scores = additive(config_of(bits))
    totals = {kind: exact_cost(table, bits, kind) for kind in ("bitops", "bytes")}
    for part in (0.1, 0.3, 0.5, 0.8):
        limits = [constraint(table, share(table, part, kind), kind) for kind in totals]
        within = np.all([totals[one.name] <= one.limit for one in limits], axis=0)
        assert within.any()
        (found,) = search(name, additive, [budget("one", *limits)], table=table)
        (score,) = additive(config_of(bits_of(found.bits)[None]))
        np.testing.assert_allclose(score, scores[within].min(), rtol=1e-12)  # sums


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_table_without_choices_is_its_own_answer(name):
    mask = FREE.mask & (np.arange(4) == FREE.mask.argmax(-1)[..., None])
    (found,) = search(name, additive, [budget("any", constraint(FREE, 1e9))], mask=mask)
    np.testing.assert_array_equal(bits_of(found.bits), bits_of(FREE.max_config))


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_step_is_reported(name):
    steps = []
    budgets = [budget(str(part), constraint(FREE, share(FREE, part))) for part in (0.6, 0.2)]
    search(name, rugged, budgets, on_step=steps.append)
    totals = set(exact_cost(FREE, all_bits(FREE)).tolist())
    assert len(steps) >= 2
    assert all(step.phase and step.change and step.cost in totals for step in steps)
    assert all(type(step.score) is float for step in steps)

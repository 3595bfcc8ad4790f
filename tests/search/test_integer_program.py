import dataclasses
import itertools
import math

import numpy as np
import pytest

from mpq_jax.search import milp, objectives
from mpq_jax.search.integer_program import reachable_costs, solve
from mpq_jax.search.problem import Constraint
from mpq_jax.search.space import SearchSpace
from mpq_jax.supernet import costs
from mpq_jax.supernet.layer_table import Layer, LayerTable
from mpq_jax.supernet.tied_layers import tie_acts_to_weights

CHOICES = (6, 4, 3, 2)


def layer(name, weights, acts, *, macs=1000, params=100, float_acts=False):
    return Layer(
        name=name,
        kind="conv",
        kernel_shape=(1, 1, 1, params),
        macs=macs,
        params=params,
        norm=None,
        weight_candidates=weights,
        act_candidates=acts,
        float_acts=float_acts,
        signed=None,
    )


TABLE = LayerTable(
    (
        layer("stem", (8,), (8,), macs=3000, params=70, float_acts=True),
        layer("first", (4, 3, 2), (4, 3, 2), macs=9000, params=300),
        layer("mixed", (4, 2), (4, 3), macs=4000, params=1100),
        layer("narrow", (4, 3, 2), (4,), macs=7000, params=500),
        layer("last", (4, 3, 2), (4, 3, 2), macs=2000, params=900),
    )
)
RULES = costs.allowed_pairs(TABLE)
SHAPE = RULES.shape
FREE = SearchSpace(TABLE)
SPACES = {"free": FREE, "tied": SearchSpace(tie_acts_to_weights(TABLE))}


def brute_force(objective, budgets, allowed=RULES, table=TABLE):
    """Returns {(weight bits, activation bits) of each layer: objective} of all within budgets."""
    usable = allowed & np.isfinite(objective)
    for budget in budgets:
        usable = usable & np.isfinite(budget.cost)
    found = {}
    for places in itertools.product(*[np.argwhere(row).tolist() for row in usable]):
        entries = [(index, *place) for index, place in enumerate(places)]
        for budget in budgets:
            cost = math.fsum(budget.cost[entry] for entry in entries)
            low = budget.lower_bound - 1e-6 * abs(budget.lower_bound)
            if not low <= cost <= budget.limit + 1e-6 * abs(budget.limit):
                break
        else:
            bits = tuple((table.candidates[w], table.candidates[a]) for w, a in places)
            found[bits] = math.fsum(objective[entry] for entry in entries)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def pairs_of(solution, table=TABLE):
    return tuple(map(tuple, np.array(table.candidates)[solution.choices].tolist()))


def between(cost, share, allowed=RULES):
    """Returns a part of the way from the least to the largest cost."""
    low = np.where(allowed, cost, np.inf).min((1, 2)).sum()
    high = np.where(allowed, cost, -np.inf).max((1, 2)).sum()
    return float(low + share * (high - low))


def drawn(seed, *, scale=1.0):
    return scale * np.random.default_rng(seed).lognormal(0, 1.5, SHAPE)


def check(found, wanted, budgets, allowed=RULES):
    """Asserts that the solutions are the first of all, in order, and correctly exact_cost."""
    expected = list(wanted.items())[: len(found)]
    assert [(pairs_of(solution), solution.objective) for solution in found] == expected
    for solution in found:
        TABLE.check(FREE.bits_of(solution.choices))
        for index, (w, a) in enumerate(pairs_of(solution)):
            assert allowed[index, TABLE.candidates.index(w), TABLE.candidates.index(a)]
        assert list(solution.costs) == [budget.name for budget in budgets]


@pytest.mark.slow_but_first
@pytest.mark.parametrize("pairs", SPACES)
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_solutions_are_those_of_brute_force(seed, number, pairs):
    space = SPACES[pairs]
    allowed = space.pairs
    objective = drawn(seed)
    tables = [drawn(100 + 10 * seed + index) for index in range(number)]
    budgets = [
        Constraint(f"cost {index}", cost, between(cost, 0.6, allowed))
        for index, cost in enumerate(tables)
    ]
    wanted = brute_force(objective, budgets, allowed)
    assert 1 < len(wanted) < np.prod(allowed.sum((1, 2)))  # the budgets matter
    found = solve(space, objective, budgets, count=10)
    assert len(found) == min(10, len(wanted))
    check(found, wanted, budgets, allowed)


@pytest.mark.slow
@pytest.mark.parametrize("pairs", SPACES)
@pytest.mark.parametrize("seed", range(3))
def test_negative_entries_and_windows_agree_with_brute_force(seed, pairs):
    """With `lower_bound`, an objective that wants few bits does not get the fewest."""
    random = np.random.default_rng(seed)
    objective, other = random.normal(size=SHAPE), random.normal(size=SHAPE)
    low, high = {"free": (0.5, 0.6), "tied": (0.1, 0.9)}[pairs]
    budgets = [
        Constraint("mean_bits", costs.cost_table(TABLE, "mean_bits"), limit=3.0, lower_bound=3.0),
        Constraint("other", other, between(other, high), between(other, low)),
    ]
    wanted = brute_force(objective, budgets, SPACES[pairs].pairs)
    found = solve(SPACES[pairs], objective, budgets, count=len(wanted) + 1)
    assert 1 < len(found) == len(wanted)
    check(found, wanted, budgets, SPACES[pairs].pairs)
    for solution in found:
        assert FREE.bits_of(solution.choices).weights[1:].mean() == 3


@pytest.mark.parametrize(("objective_scale", "cost_scale"), [(1e-9, 1e10), (1e6, 1e-5), (1e-30, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_scales_do_not_matter(seed, objective_scale, cost_scale):
    objective = drawn(seed, scale=objective_scale)
    bitops = costs.cost_table(TABLE, "bitops") * 1e6
    latency = drawn(seed + 50, scale=cost_scale)
    budgets = [
        Constraint("bitops", bitops, between(bitops, 0.4)),
        Constraint("latency", latency, between(latency, 0.4)),
    ]
    wanted = brute_force(objective, budgets)
    found = solve(FREE, objective, budgets, count=10)
    assert len(found) == min(10, len(wanted)) > 1
    check(found, wanted, budgets)


def test_layers_of_very_different_weight_all_count():
    """Sensitivities of layers differ by orders of magnitude; the least still gets its best bits."""
    objective = drawn(3) * 10.0 ** np.array([0, 4, -4, 0, -2])[:, None, None]
    bitops = costs.cost_table(TABLE, "bitops")
    budgets = [Constraint("bitops", bitops, between(bitops, 0.5))]
    check(solve(FREE, objective, budgets, count=10), brute_force(objective, budgets), budgets)


@pytest.mark.slow_but_first
@pytest.mark.parametrize(("large", "huge"), [(1e4, 1e9), (1e7, 1e15), (1e7, 1e300)])
@pytest.mark.parametrize("seed", range(3))
def test_a_huge_entry_hides_no_other(seed, large, huge):
    objective = drawn(seed)
    objective[1, TABLE.candidates.index(2), TABLE.candidates.index(2)] = huge
    objective[3, TABLE.candidates.index(4), TABLE.candidates.index(4)] = large
    bitops = costs.cost_table(TABLE, "bitops")
    budgets = [Constraint("bitops", bitops, between(bitops, 0.4))]
    wanted = brute_force(objective, budgets)
    assert 10 < sum(total < large for total in wanted.values()) < len(wanted)
    check(solve(FREE, objective, budgets, count=10), wanted, budgets)


def test_costs_and_bits_of_a_solution_are_those_of_the_library():
    tables = {kind: costs.cost_table(TABLE, kind) for kind in ("bitops", "bytes", "mean_bits")}
    budgets = [Constraint(kind, cost, between(cost, 0.5)) for kind, cost in tables.items()]
    (found,) = solve(FREE, drawn(7), budgets)
    for kind, cost in found.costs.items():
        np.testing.assert_allclose(
            cost, costs.COSTS[kind](TABLE, FREE.bits_of(found.choices)), rtol=1e-6
        )  # float32


def test_ties_are_listed_once_each():
    """Without preferences, every configuration within the budget comes exactly once."""
    cost = costs.cost_table(TABLE, "mean_bits")
    budgets = [Constraint("mean_bits", cost, 3.0, 3.0)]
    objective = np.where(RULES, 0.25, np.inf)
    wanted = brute_force(objective, budgets, SPACES["tied"].pairs)
    found = solve(SPACES["tied"], objective, budgets, count=1000)
    assert len(found) == len(wanted) > 3
    assert {pairs_of(solution) for solution in found} == set(wanted)
    assert {solution.objective for solution in found} == {0.25 * 5}


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("miss", [1e-7, 1e-9, 1e-10, 1e-11])
def test_budgets_hold_to_their_tolerance_and_not_to_that_of_the_solver(miss, side):
    """The best configuration misses by less than the solver sees, or just meets the bound."""
    objective = drawn(11)
    cost = drawn(12, scale=1e5)
    best = next(iter(brute_force(objective, [])))
    total = math.fsum(
        cost[i, TABLE.candidates.index(w), TABLE.candidates.index(a)]
        for i, (w, a) in enumerate(best)
    )
    for inside in (True, False):
        edge = total * (1 + (side if inside else -side) * miss)
        budget = (
            Constraint("cost", cost, edge / (1 + 1e-6))
            if side == 1
            else Constraint("cost", cost, 1e9, edge / (1 - 1e-6))
        )
        found = solve(FREE, objective, [budget], count=3)
        assert (pairs_of(found[0]) == best) is inside
        check(found, brute_force(objective, [budget]), [budget])


def test_infinity_and_the_mask_both_forbid():
    objective, cost, mask = drawn(1), drawn(2), TABLE.mask.copy()
    objective[1, TABLE.candidates.index(4)] = np.inf
    cost[4, :, TABLE.candidates.index(3)] = np.inf
    mask[3, 0, TABLE.candidates.index(2)] = False
    space = SearchSpace(TABLE, mask)
    budgets = [Constraint("cost", cost, 1e9)]
    wanted = brute_force(objective, budgets, space.pairs)
    found = solve(space, objective, budgets, count=20)
    assert len(wanted) == 6 * 4 * 2 * 6
    check(found, wanted, budgets, space.pairs)


def test_what_the_rules_forbid_stays_forbidden_whatever_is_in_the_tables():
    objective = np.where(RULES, drawn(1), np.nan)
    (found,) = solve(FREE, objective, [Constraint("any", drawn(2), 1e9)])
    TABLE.check(FREE.bits_of(found.choices))


def test_fifty_layers_of_four_choices():
    random = np.random.default_rng(0)
    layers = [
        layer(f"layer{i}", CHOICES, CHOICES, macs=int(random.integers(1e6, 1e8)), params=1000)
        for i in range(50)
    ]
    table = LayerTable(tuple(layers))
    errors = random.lognormal(-10, 2, (50, 1)) * 4.0 ** -np.array(CHOICES)
    objective = objectives.hawq(table, random.lognormal(-3, 2, 50), errors)
    tables = {kind: costs.cost_table(table, kind) for kind in ("bitops", "mean_bits")}
    limits = {kind: float(cost[:, 2, 2].sum()) for kind, cost in tables.items()}
    budgets = [Constraint(kind, tables[kind], limits[kind]) for kind in tables]
    for space in (SearchSpace(table), SearchSpace(tie_acts_to_weights(table))):
        found = solve(space, objective, budgets, count=3)
        assert len({pairs_of(solution) for solution in found}) == 3
        assert found[0].objective <= found[1].objective <= found[2].objective
        assert found[0].objective < objective[:, 2, 2].sum()  # better than 3 bits everywhere
        for solution in found:
            table.check(space.bits_of(solution.choices))
            assert all(solution.costs[kind] <= limits[kind] * (1 + 1e-6) for kind in tables)


@pytest.mark.slow_but_first
@pytest.mark.parametrize("seed", [3, 4, 6, 10])  # a relative gap of 1e-4 would show in these
def test_large_hard_problems_are_solved_to_the_end(seed):
    """As by dynamic programming; what a layer gains by bits is nearly what it costs."""
    random = np.random.default_rng(seed)
    macs = random.integers(1, 3000, 40)
    gains = random.uniform(0.95, 1.05, (40, 4)) + 6 - np.array(CHOICES)
    table = LayerTable(
        tuple(layer(f"layer{i}", CHOICES, (4,), macs=int(m)) for i, m in enumerate(macs))
    )
    bitops = costs.cost_table(table, "bitops")
    objective = np.where(np.isfinite(bitops), (macs[:, None] * gains)[:, :, None], np.inf)
    most = int(3.3 * macs.sum())
    (found,) = solve(SearchSpace(table), objective, [Constraint("bitops", bitops, 4.0 * most)])
    slack = int(most * 1e-6)
    best = np.zeros(most + slack + 1)  # by the largest sum of MACs x weight bits
    for one, row in zip(macs, gains, strict=True):
        shifted = [np.append(np.full(one * bits, np.inf), best)[: len(best)] for bits in CHOICES]
        best = np.min(np.stack(shifted) + one * row[:, None], axis=0)
    np.testing.assert_allclose(found.objective, best[-1], rtol=1e-12)  # sums in another order


# Errors.


def message_of(budgets, space=FREE):
    with pytest.raises(ValueError) as error:
        solve(space, drawn(0), budgets)
    return str(error.value)


BITOPS, BYTES, MEAN = (costs.cost_table(TABLE, kind) for kind in ("bitops", "bytes", "mean_bits"))


def test_a_budget_out_of_reach_is_explained():
    low, high = between(BITOPS, 0), between(BITOPS, 1)
    message = message_of(
        [Constraint("bitops", BITOPS, low * 0.99), Constraint("bytes", BYTES, 1e9)]
    )
    assert "bitops cannot be met" in message and "bytes cannot" not in message
    assert f"bitops should be -inf to {low * 0.99:.6g}" in message
    assert f"the reachable range is {low:.6g} to {high:.6g}" in message
    assert f"{between(BYTES, 0):.6g} to {between(BYTES, 1):.6g}" in message
    assert "largest parts are stem (1.92e+05), narrow (5.6e+04), first (3.6e+04)" in message


def test_the_range_is_that_of_what_is_allowed():
    mask = TABLE.mask.copy()
    mask[1, 0, TABLE.candidates.index(2)] = False
    space = SearchSpace(TABLE, mask)
    low = between(BYTES, 0, space.pairs)
    assert low > between(BYTES, 0)
    assert f"{low:.6g} to" in message_of([Constraint("bytes", BYTES, 1.0)], space)


def test_a_lower_bound_out_of_reach_is_explained():
    message = message_of([Constraint("mean_bits", MEAN, 8.0, 4.5)])
    assert "mean_bits cannot be met; mean_bits should be 4.5 to 8" in message
    assert "reachable range is 2 to 4" in message


def test_a_gap_within_the_range_is_no_cost():
    """Means of four layers are quarters: nothing is between 3.01 and 3.2."""
    budgets = [Constraint("mean_bits", MEAN, 3.2, 3.01), Constraint("bitops", BITOPS, 1e9)]
    assert "budget: mean_bits cannot be met; " in message_of(budgets)


def test_budgets_that_exclude_each_other_are_explained():
    budgets = [
        Constraint("mean_bits", MEAN, 4, 3.9),
        Constraint("bytes", BYTES, between(BYTES, 0.2)),
    ]
    assert "each can be met alone, but not all together" in message_of(budgets)


def test_layers_with_nothing_allowed_are_named_with_the_reason():
    latency = np.where(np.arange(5)[:, None, None] == 2, np.inf, np.where(RULES, 1e-5, np.inf))
    message = message_of([Constraint("bytes", BYTES, 1e9), Constraint("latency", latency, 1.0)])
    assert "left for 'mixed': all that the rules allow is forbidden by latency" in message
    size = np.where(np.arange(5)[:, None, None] == 4, np.inf, BYTES)
    message = message_of([Constraint("size", size, 1e9), Constraint("latency", latency, 1.0)])
    assert "left for 'mixed', 'last': all that" in message and "by size, latency" in message


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ([], r"constraints are \[\]; give one or more"),
        ([Constraint("a", BYTES, 1e9)] * 2, r"\['a', 'a'\]; .*each with a name of its own"),
        ([Constraint("objective", BYTES, 1e9)], "each with a name of its own"),
        (
            [Constraint("a", BYTES, math.nan)],
            "a should be -inf to nan; wanted two numbers in order",
        ),
        ([Constraint("a", BYTES, 3.0, math.nan)], "a should be nan to 3.0"),
        ([Constraint("a", BYTES, 3.0, 4.0)], "a should be 4.0 to 3.0"),
        ([Constraint("a", BYTES, -math.inf)], "a should be -inf to -inf"),
        ([Constraint("a", BYTES, math.inf, math.inf)], "a should be inf to inf"),
        (
            [Constraint("a", BYTES[:4], 1e9)],
            r"a is float64 \(4, 4, 4\); wanted numbers of shape \(5, 4, 4\) \(layers",
        ),
        ([Constraint("a", RULES, 1e9)], r"a is bool \(5, 4, 4\); wanted"),
        (
            [Constraint("a", np.where(BYTES == 150, np.nan, BYTES), 1e9)],
            "a is NaN .*, in 'first'; use inf",
        ),
        (
            [Constraint("a", np.where(RULES, -np.inf, 0), 1e9)],
            "-inf .* in 'stem', 'first', 'mixed'",
        ),
    ],
)
def test_malformed_budgets_are_refused(budgets, message):
    with pytest.raises(ValueError, match=message):
        solve(FREE, drawn(0), budgets)


def test_malformed_tables_and_counts_are_refused():
    budgets = [Constraint("bytes", BYTES, 1e9)]
    with pytest.raises(ValueError, match="objective is NaN .* in 'last'"):
        solve(FREE, np.where(np.arange(5)[:, None, None] == 4, np.nan, BYTES), budgets)
    with pytest.raises(ValueError, match=r"objective is float64 \(5, 4\); wanted numbers of shape"):
        solve(FREE, BYTES[..., 0], budgets)
    with pytest.raises(ValueError, match="count is 0; wanted at least 1"):
        solve(FREE, BYTES, budgets, count=0)


def test_a_failure_of_the_solver_is_passed_on(monkeypatch):
    def stop_early(*args, **kwargs):
        return solver(*args, **kwargs | {"options": {"time_limit": 0.0}})

    solver = milp.scipy.optimize.milp
    monkeypatch.setattr(milp.scipy.optimize, "milp", stop_early)
    latency = drawn(1)
    with pytest.raises(RuntimeError, match="not solved: Time limit reached"):
        solve(FREE, drawn(0), [Constraint("latency", latency, between(latency, 0.5))])


# Ties between layers, and what is out of reach with them.


@pytest.mark.parametrize("ties", [((2, 6),), ((2, 9), (3, 4), (6, 8)), ((2, 3, 5, 8, 9),)])
@pytest.mark.parametrize("seed", range(2))
def test_tied_entries_of_different_layers_agree_with_brute_force(seed, ties):
    table = dataclasses.replace(TABLE, tied_groups=ties)
    objective, cost = drawn(seed), drawn(seed + 20)
    allowed = costs.allowed_pairs(table)
    budgets = [Constraint("cost", cost, between(cost, 0.6, allowed))]
    everything = brute_force(objective, budgets, RULES)
    wanted = {
        bits: value
        for bits, value in everything.items()
        if all(len({bits[entry // 2][entry % 2] for entry in group}) == 1 for group in ties)
    }
    space = SearchSpace(table)
    found = solve(space, objective, budgets, count=10)
    assert len(found) == min(10, len(wanted)) > 1
    check(found, wanted, budgets)
    for solution in found:
        table.check(space.bits_of(solution.choices))
    totals = [
        math.fsum(cost[i, CHOICE(w), CHOICE(a)] for i, (w, a) in enumerate(bits))
        for bits in brute_force(objective, [])
        if all(len({bits[entry // 2][entry % 2] for entry in group}) == 1 for group in ties)
    ]
    assert reachable_costs(space, cost) == (min(totals), max(totals))


CHOICE = TABLE.candidates.index


def test_tables_that_leave_tied_layers_nothing_in_common_are_explained():
    table = LayerTable((layer("a", (4, 2), (4,)), layer("b", (4, 2), (4,))), tied_groups=((0, 2),))
    latency = np.ones((2, 2, 2))
    latency[0, 0] = latency[1, 1] = np.inf
    with pytest.raises(ValueError, match="tied .* no bits in common"):
        solve(SearchSpace(table), np.zeros((2, 2, 2)), [Constraint("latency", latency, 9.0)])

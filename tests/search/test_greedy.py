import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers.search_problems import KEY, layer

from mpq_jax.search.greedy import greedy_search
from mpq_jax.search.ilp import check_budgets
from mpq_jax.search.integer_program import reachable_costs
from mpq_jax.search.problem import Budget, Constraint
from mpq_jax.search.space import SearchSpace
from mpq_jax.supernet import costs
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable, trace_layers
from mpq_jax.supernet.rules import Rule, bit_rules


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        for index, features in enumerate((6, 10, 8)):
            x = nn.Conv(features, (3, 3), strides=1 + index % 2, name=f"conv{index}")(x)
            x = nn.Conv(features, (3, 3), feature_group_count=features, name=f"depthwise{index}")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


TABLE = trace_layers(Deep(), (8, 8, 1), rules=bit_rules((6, 5, 4, 3, 2), depthwise_min_bits=3))
COST = {kind: costs.cost_table(TABLE, kind) for kind in ("bitops", "bytes")}
SENSITIVITY = np.random.default_rng(0).uniform(0.2, 3.0, (2, len(TABLE)))


def bits_of(population):
    return np.asarray(population.weights, np.float64), np.asarray(population.acts, np.float64)


def sensible(population, key):
    """Errors as of a real network: a floor, and each layer minds low bits in its own way."""
    return 0.3 + wavering(population, key)


def wavering(population, key):
    """The same without the floor: relative differences are so large that "+" often wins."""
    weights, acts = bits_of(population)
    return (SENSITIVITY[0] * 0.5**weights + SENSITIVITY[1] * 0.5**acts).mean(-1)


def more_bits(population, key):
    weights, acts = bits_of(population)
    return 1e6 ** -((weights + acts).mean(-1))


def constant(population, key):
    return np.full(len(population.weights), 0.5)


def zero(population, key):
    return np.zeros(len(population.weights))


class RandomScore:
    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)

    def __call__(self, population, key):
        return self.generator.uniform(size=len(population.weights)) ** 8


SCORES = {
    "sensible": lambda: sensible,
    "wavering": lambda: wavering,
    "more bits": lambda: more_bits,
    "constant": lambda: constant,
    "zero": lambda: zero,
    "random 1": lambda: RandomScore(1),
    "random 2": lambda: RandomScore(2),
}


def cost_of(bits, kind="bitops"):
    weights, acts = np.asarray(bits.weights, np.int64), np.asarray(bits.acts, np.int64)
    if kind == "bytes":
        return (
            float(sum(w * layer.params for w, layer in zip(weights, TABLE.layers, strict=True))) / 8
        )
    return float(
        sum(w * a * layer.macs for w, a, layer in zip(weights, acts, TABLE.layers, strict=True))
    )


def level(bits, kind="bitops"):
    return cost_of(TABLE.uniform(bits, bits), kind)


def reachable(kind="bitops", mask=TABLE.mask):
    return reachable_costs(SearchSpace(TABLE, mask), COST[kind])


def search(score, amounts, *, kind="bitops", mask=TABLE.mask, **options):
    """Returns what was found for the amounts, and the path."""
    path = []
    budgets = [
        Budget(f"{place}", (Constraint(kind, COST[kind], float(amount)),))
        for place, amount in enumerate(amounts)
    ]
    space = SearchSpace(TABLE, mask)
    found = greedy_search(score, space, budgets, KEY, on_step=path.append, **options)
    return found, path


def change_of(step):
    """Returns (layer, "weights" or "acts", bits) of a step."""
    name, kind, bits = step.change.split(" ")
    return name, kind, int(bits)


def replay(path, start, table=TABLE):
    """Returns the configuration before the first and after every step, as [layers, 2]."""
    states = [np.stack([np.asarray(start.weights), np.asarray(start.acts)], axis=1)]
    for step in path:
        name, kind, bits = change_of(step)
        entry = 2 * table.names.index(name) + ("weights", "acts").index(kind)
        group = next((one for one in table.tied_groups if entry in one), (entry,))
        state = states[-1].copy().ravel()
        state[list(group)] = bits
        states.append(state.reshape(-1, 2))
    return states


def as_config(state):
    return BitConfig(*state.T)


@pytest.mark.slow
@pytest.mark.parametrize("patience", [0, 8])
@pytest.mark.parametrize("kind", ["bitops", "bytes"])
@pytest.mark.parametrize("name", SCORES)
def test_every_budget_is_met_whatever_the_scores(name, kind, patience):
    lowest = reachable(kind)[0]
    amounts = [level(3, kind), level(4, kind), lowest, (level(4, kind) + level(5, kind)) / 2]
    results, path = search(SCORES[name](), amounts, kind=kind, patience=patience)
    for found, amount in zip(results, amounts, strict=True):
        TABLE.check(found.bits)
        assert found.costs == {kind: cost_of(found.bits, kind)}
        assert found.costs[kind] <= amount * (1 + 1e-6)
    by_amount = [results[place].costs[kind] for place in np.argsort(amounts)]
    assert by_amount == sorted(by_amount)
    states = replay(path, TABLE.uniform(5, 5))
    for step, (before, after) in zip(path, itertools.pairwise(states), strict=True):
        assert step.cost == cost_of(as_config(after), kind)
        assert step.phase == change_of(step)[1]
        assert np.sum(before != after) == 1  # one tensor of one layer at a time
    lows = sum(len(c) for layer in TABLE.layers for c in (layer.weight_candidates,) * 2)
    assert len(path) <= (patience + 2) * 2 * lows * 3  # a bound far from endless


@pytest.mark.parametrize("name", SCORES)
def test_no_configuration_is_visited_twice(name):
    _, path = search(SCORES[name](), [level(3)], patience=3)
    states = [state.tobytes() for state in replay(path, TABLE.uniform(5, 5))]
    assert len(set(states)) == len(states)


@pytest.mark.slow_but_first
@pytest.mark.parametrize("name", SCORES)
def test_the_mask_is_honored(name):
    mask = TABLE.mask.copy()
    column = TABLE.candidates.index
    mask[TABLE.names.index("conv0"), 0, column(2)] = False  # frozen
    mask[TABLE.names.index("conv1"), 0] = [bits in (6, 3) for bits in TABLE.candidates]  # a gap
    mask[TABLE.names.index("conv2"), 1] = [bits == 4 for bits in TABLE.candidates]  # no choice
    scored = []
    given = SCORES[name]()

    def score(population, key):
        scored.append(np.stack([population.weights, population.acts], axis=-1))
        return given(population, key)

    lowest, highest = reachable(mask=mask)
    amounts = [lowest, 0.5 * (lowest + highest)]
    results, _ = search(score, amounts, mask=mask)
    seen = np.concatenate([*scored, *[np.stack(found.bits, axis=-1)[None] for found in results]])
    choices = (seen[..., None] == np.array(TABLE.candidates)).argmax(-1)
    layers, tensors = np.indices(choices.shape[1:])
    assert np.all(mask[layers, tensors, choices])
    for found, amount in zip(results, amounts, strict=True):
        assert found.costs["bitops"] <= amount * (1 + 1e-6)


def test_every_move_is_scored_with_a_key_of_its_own():
    keys = []

    def score(population, key):
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return sensible(population, key)

    _, path = search(score, [level(3)])
    assert len(set(keys)) == len(keys) == len(path)


def test_weights_fall_to_the_published_target_before_activations():
    """0.95 of the cost of the anchor's weights at the start's activations."""
    _, path = search(sensible, [level(4)])
    states = replay(path, TABLE.uniform(5, 5))
    target = 0.95 * cost_of(TABLE.uniform(4, 5))
    phases = [
        "acts" if cost_of(as_config(state)) <= target or step.phase == "acts" else "weights"
        for step, state in zip(path, states[:-1], strict=True)
    ]
    switch = phases.index("acts")
    assert [step.phase for step in path] == (
        ["weights"] * switch + ["acts"] * (len(phases) - switch)
    )
    assert 0 < switch < len(phases)
    assert cost_of(as_config(states[switch])) <= target < cost_of(as_config(states[switch - 1]))


@pytest.mark.parametrize(("budget", "anchor"), [(4.2, 4), (3.7, 4), (3.3, 3)])
def test_the_anchor_is_the_uniform_level_nearest_to_the_budget(budget, anchor):
    between = level(int(budget)) + (budget % 1) * (level(int(budget) + 1) - level(int(budget)))
    _, path = search(sensible, [between])
    states = replay(path, TABLE.uniform(5, 5))
    target = 0.95 * cost_of(TABLE.uniform(anchor, 5))
    switch = [step.phase for step in path].index("acts")
    assert cost_of(as_config(states[switch])) <= target < cost_of(as_config(states[switch - 1]))


BITS = (6, 5, 4, 3, 2)
PARTLY_TIED = LayerTable(
    (
        layer("free", BITS, BITS, macs=50),
        layer("tied", BITS, BITS, macs=70),
        layer("other", BITS, BITS, macs=40),
        layer("acts", (4,), BITS, macs=60),
        layer("follows", BITS, BITS, macs=30),
    ),
    tied_groups=((2, 3), (4, 8), (7, 9)),  # its weights and input; two weights; two inputs
)


def test_tied_entries_move_together_and_with_the_weights_if_some_are():
    """The cost of the weights is that of what moves with them, at the start's other inputs."""

    def cost(state):
        return float(
            sum(w * a * one.macs for (w, a), one in zip(state, PARTLY_TIED.layers, strict=True))
        )

    path, scored = [], []

    def score(population, key):
        scored.append(np.stack(bits_of(population), axis=-1))
        return 0.3 + (0.5 ** scored[-1]).sum((-2, -1))

    start = PARTLY_TIED.uniform(5, 5)
    most = cost(np.stack([PARTLY_TIED.uniform(3, 3).weights, PARTLY_TIED.uniform(3, 3).acts], 1))
    one = Budget("3", (Constraint("bitops", costs.cost_table(PARTLY_TIED, "bitops"), most),))
    (found,) = greedy_search(score, SearchSpace(PARTLY_TIED), [one], KEY, on_step=path.append)
    assert found.costs["bitops"] <= most
    for group in PARTLY_TIED.tied_groups:
        flat = np.concatenate(scored).reshape(-1, 10)[:, list(group)]
        assert (flat == flat[:, :1]).all()
    states = replay(path, start, PARTLY_TIED)
    np.testing.assert_array_equal(states[-1], np.stack(found.bits, axis=1))
    assert [step.cost for step in path] == [cost(state) for state in states[1:]]
    assert {change_of(step)[:2] for step in path} <= {
        ("free", "weights"), ("free", "acts"), ("tied", "weights"), ("other", "weights"),
        ("other", "acts"), ("acts", "acts"),
    }  # fmt: skip
    phases = ["acts" if change_of(step)[1] == "acts" else "weights" for step in path]
    switch = phases.index("acts")
    assert phases == ["weights"] * switch + ["acts"] * (len(phases) - switch) and switch > 0

    def of_weights(state):
        mixed = np.full((5, 2), 5)
        mixed[:, 0] = state[:, 0]
        mixed[1, 1] = state[1, 1]  # follows its weights
        return cost(mixed)

    target = 0.95 * of_weights(np.array([[3, 3], [3, 3], [3, 3], [4, 3], [3, 3]]))
    assert of_weights(states[switch]) <= target < of_weights(states[switch - 1])


def expected_move(state, phase, errors_of, visited):
    """The published choice: least 1.5 e / max(e) + B / max(B) over all moves by one candidate."""
    moves = []
    for i, one in enumerate(TABLE.layers):
        allowed = (one.weight_candidates, one.act_candidates)[phase]
        place = allowed.index(state[i, phase])
        for other in (place - 1, place + 1):
            if 0 <= other < len(allowed):
                moved = state.copy()
                moved[i, phase] = allowed[other]
                if moved.tobytes() not in visited:
                    moves.append(moved)
    stacked = np.stack(moves)
    errors = errors_of(BitConfig(stacked[..., 0], stacked[..., 1]), None)
    prices = np.array([cost_of(as_config(moved)) for moved in moves])
    return moves[np.argmin(1.5 * errors / errors.max() + prices / prices.max())]


def test_every_move_is_the_published_choice():
    _, path = search(sensible, [level(3)], patience=1000)
    states = replay(path, TABLE.uniform(5, 5))
    visited = set()
    for step, (before, after) in zip(path, itertools.pairwise(states), strict=True):
        visited.add(before.tobytes())
        phase = ("weights", "acts").index(step.phase)
        np.testing.assert_array_equal(after, expected_move(before, phase, sensible, visited))


TWO = LayerTable(
    tuple(
        layer(name, (5, 4, 3), (5, 4, 3), macs=macs)
        for name, macs in (("heavy", 64), ("light", 32))
    )
)


@pytest.mark.parametrize(
    ("errors", "wanted"),
    [
        # Costs of (heavy down, heavy up, light down, light up) at 4 bits of activations, with
        # 64 and 32 weights: 1152 + ..., that is 64 w1 + 32 w2 = 320, 448, 352, 416 times 4.
        ((0.2, 0.2, 0.2, 0.2), ("heavy", 3)),  # alike: the cheapest
        ((0.4, 0.2, 0.3, 0.1), ("light", 5)),  # 2.21, 1.75, 1.91, 1.30
        ((0.3, 0.4, 0.21, 0.25), ("light", 3)),  # 1.84, 2.50, 1.57, 1.87
        ((0.1, 0.9, 0.1, 0.05), ("heavy", 3)),  # 0.881, 2.5, 0.952, 1.012
        ((0.3, 0.1, 0.3, 0.3), ("heavy", 5)),  # 2.21, 1.50, 2.29, 2.43
    ],
)
def test_the_score_weighs_error_against_cost(errors, wanted):
    order = [("heavy", 3), ("heavy", 5), ("light", 3), ("light", 5)]
    table_of_errors = {
        (3, 4): errors[0],
        (5, 4): errors[1],
        (4, 3): errors[2],
        (4, 5): errors[3],
    }

    def score(population, key):
        pairs = np.asarray(population.weights).tolist()
        return np.array([table_of_errors.get(tuple(pair), 1e-3) for pair in pairs])

    steps = []
    least = Budget("least", (Constraint("bitops", costs.cost_table(TWO, "bitops"), 96.0 * 9),))
    greedy_search(score, SearchSpace(TWO), [least], KEY, start_bits=4, on_step=steps.append)
    name, kind, bits = change_of(steps[0])
    assert (name, bits) == wanted and kind == "weights"
    assert steps[0].score == errors[order.index(wanted)]


def test_one_descent_begins_like_that_of_its_largest_budget():
    both, path = search(sensible, [level(3), level(4)])
    alone, begun = search(sensible, [level(4)])
    jax.tree.map(np.testing.assert_array_equal, both[1].bits, alone[0].bits)
    assert path[: len(begun)] == begun
    assert len(path) > len(begun)


def test_equal_budgets_get_equal_results():
    first, other, second = search(sensible, [level(3), level(4), level(3)])[0]
    jax.tree.map(np.testing.assert_array_equal, first.bits, second.bits)
    assert (first.costs, first.score) == (second.costs, second.score)
    assert (first.budget, other.budget, second.budget) == ("0", "1", "2")


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_budgets_that_the_largest_bits_meet_return_them(factor):
    (found,), path = search(sensible, [factor * level(6)])
    assert path == [] and np.isnan(found.score)
    jax.tree.map(np.testing.assert_array_equal, found.bits, TABLE.uniform(6, 6))


@pytest.mark.parametrize("amount", [level(5), (level(5) + level(6)) / 2])
def test_a_budget_that_the_start_meets_starts_from_the_largest_bits(amount):
    (_, found), path = search(sensible, [level(3), amount])
    states = replay(path, TABLE.uniform(6, 6))
    assert all(step.cost == cost_of(as_config(s)) for step, s in zip(path, states[1:], strict=True))
    assert level(4) < found.costs["bitops"] <= amount * (1 + 1e-6)


def test_the_start_can_be_chosen():
    _, path = search(sensible, [level(3)], start_bits=4)
    states = replay(path, TABLE.uniform(4, 4))
    assert [step.cost for step in path] == [cost_of(as_config(s)) for s in states[1:]]


def test_a_budget_in_bytes_leaves_activations_alone():
    results, path = search(sensible, [level(3, "bytes"), level(2, "bytes")], kind="bytes")
    for found in results:
        np.testing.assert_array_equal(found.bits.acts, TABLE.uniform(5, 5).acts)
    assert {step.phase for step in path} == {"weights"}


@pytest.mark.parametrize("kind", ["bitops", "bytes"])
def test_the_cost_of_the_smallest_uniform_subnet_is_within_reach(kind):
    """As the library reports it, in float32: its rounding must not make it unreachable."""
    for width in range(3, 40):
        channels = (3, 7, 37 * width, 41 * width)
        sizes = [9 * one * other for one, other in itertools.pairwise(channels)]
        table = LayerTable(
            tuple(
                layer(f"conv{i}", BITS, BITS, macs=31 * 29 * size, params=size)
                for i, size in enumerate(sizes)
            )
        )
        limit = Constraint(kind, costs.cost_table(table, kind), float(
            costs.COSTS[kind](table, table.uniform(2, 2))
        ))  # fmt: skip
        check_budgets(SearchSpace(table), [Budget("2", (limit,))])


def test_scores_that_are_no_numbers_never_win():
    """A subnet whose loss overflowed is the worst, not the best."""

    def score(population, key):
        weights, _ = bits_of(population)
        return np.where(np.any(weights == 2, axis=-1), np.nan, sensible(population, None))

    (found,), _ = search(score, [level(4)])
    assert not np.any(np.asarray(found.bits.weights) == 2)


def test_reachable_is_the_range_of_all_configurations():
    class Three(nn.Module):
        @nn.compact
        def __call__(self, x):
            for features in (4, 6, 5):
                x = nn.Dense(features)(x)
            return x

    rules = [Rule("_1", weights=(4, 2), acts=3), Rule(weights=(4, 3), acts=(6, 2))]
    table = trace_layers(Three(), (8,), rules=rules)
    for kind in ("bitops", "bytes"):
        choices = [
            itertools.product(layer.weight_candidates, layer.act_candidates)
            for layer in table.layers
        ]
        totals = [
            sum(
                w * (a * layer.macs if kind == "bitops" else layer.params / 8)
                for (w, a), layer in zip(config, table.layers, strict=True)
            )
            for config in itertools.product(*choices)
        ]
        found = reachable_costs(SearchSpace(table), costs.cost_table(table, kind))
        assert found == (min(totals), max(totals))

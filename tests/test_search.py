import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawing import drawn_variables

from mpq_jax import costs, supernet
from mpq_jax.bits import BitConfig
from mpq_jax.layer_table import Rule, bit_rules, trace_layers
from mpq_jax.recording import CompileCounter
from mpq_jax.search import greedy
from mpq_jax.search.evaluate import make_score

# Scoring many configurations.


class Net(nn.Module):
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="stem")(x))
        x = nn.Conv(6, (3, 3), use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        if self.dropout:
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.relu(nn.Dense(8, name="hidden")(x.mean((1, 2))))
        return nn.Dense(3, name="head")(x)


RULES = bit_rules((4, 3, 2))
SHAPE = (8, 8, 1)
SMALL = trace_layers(Net(), SHAPE, rules=RULES)


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).normal(size=(12, 8, 8, 1)), jnp.float32)


@pytest.fixture(scope="module")
def made(images):
    init = jax.jit(supernet.init, static_argnums=(0, 1))
    return init(Net(), SMALL, drawn_variables(Net(), SHAPE, 1), images)


def configs(seed, count=5):
    choices = np.random.default_rng(seed).choice([4, 3, 2], (2, count, 2))
    fixed = np.full((2, count, 1), 8)
    weights, acts = np.concatenate([fixed, choices, fixed], axis=-1).astype(np.int32)
    return BitConfig(jnp.asarray(weights), jnp.asarray(acts))


LABELS = jnp.arange(12, dtype=jnp.int32) % 3


def naive(made, bits, images, metric):
    """One configuration at a time, with the statistics of the batch."""
    found = []
    forward = jax.jit(
        lambda one: (
            supernet.apply(
                Net(), SMALL, supernet.select(SMALL, made, one), images, train=True
            ).logits
        )
    )
    for index in range(len(bits.weights)):
        logits = np.asarray(forward(jax.tree.map(lambda leaf, i=index: leaf[i], bits)), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses = -log_p[np.arange(12), np.asarray(LABELS)]
        wrong = logits.argmax(-1) != np.asarray(LABELS)
        found.append(wrong.mean() if metric == "error" else losses.mean())
    return found


@pytest.mark.parametrize("metric", ["error", "loss"])
def test_scores_are_those_of_one_forward_for_each_configuration(made, images, metric):
    score = make_score(Net(), SMALL, made, metric=metric)
    before = jax.tree.map(np.array, made)
    with CompileCounter() as counter:
        found = [score(configs(seed), images, LABELS) for seed in (1, 2, 1)]
        score(configs(3), images + 1, LABELS)
    assert counter.counts["score_configs"] == 1
    for scores, seed in zip(found, (1, 2, 1), strict=True):
        wanted = naive(made, configs(seed), images, metric)
        np.testing.assert_allclose(scores, wanted, rtol=1e-5)  # float32 means
    assert len(set(np.asarray(found[0]).tolist())) > 1
    np.testing.assert_array_equal(found[0], found[2])
    jax.tree.map(np.testing.assert_array_equal, made, before)  # no side effects


def test_scoring_switches_dropout_off(made, images):
    model = Net(dropout=0.5)
    assert trace_layers(model, (8, 8, 1), rules=RULES) == SMALL
    found = make_score(model, SMALL, made, metric="loss")(configs(1), images, LABELS)
    wanted = make_score(Net(), SMALL, made, metric="loss")(configs(1), images, LABELS)
    np.testing.assert_array_equal(found, wanted)


def test_an_unknown_metric_is_refused(made):
    with pytest.raises(ValueError, match="'f1'; known metrics are .*error.*loss"):
        make_score(Net(), SMALL, made, metric="f1")


# The greedy descent, on a table without any arrays.


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


def batches():
    while True:
        yield jnp.zeros((1, 8, 8, 1)), jnp.zeros(1, jnp.int32)


def bits_of(population):
    return np.asarray(population.weights, np.float64), np.asarray(population.acts, np.float64)


def sensible(population, images, labels):
    """Errors as of a real network: a floor, and each layer minds low bits in its own way."""
    return 0.3 + wavering(population, images, labels)


def wavering(population, images, labels):
    """The same without the floor: relative differences are so large that "+" often wins."""
    weights, acts = bits_of(population)
    return (SENSITIVITY[0] * 0.5**weights + SENSITIVITY[1] * 0.5**acts).mean(-1)


def more_bits(population, images, labels):
    weights, acts = bits_of(population)
    return 1e6 ** -((weights + acts).mean(-1))


def constant(population, images, labels):
    return np.full(len(population.weights), 0.5)


def zero(population, images, labels):
    return np.zeros(len(population.weights))


class RandomScore:
    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)

    def __call__(self, population, images, labels):
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


def search(score, budgets, *, kind="bitops", mask=None, **options):
    mask = TABLE.mask if mask is None else mask
    return greedy.search(score, TABLE, COST[kind], mask, budgets, batches(), **options)


def replay(path, start):
    """Returns the configuration before the first and after every step, as [layers, 2]."""
    states = [np.stack([np.asarray(start.weights), np.asarray(start.acts)], axis=1)]
    for step in path:
        state = states[-1].copy()
        state[TABLE.names.index(step.layer), ("weights", "acts").index(step.phase)] = step.bits
        states.append(state)
    return states


def as_config(state):
    return BitConfig(*state.T)


@pytest.mark.parametrize("patience", [0, 1, 8])
@pytest.mark.parametrize("kind", ["bitops", "bytes"])
@pytest.mark.parametrize("name", SCORES)
def test_every_budget_is_met_whatever_the_scores(name, kind, patience):
    lowest = greedy.reachable(TABLE, COST[kind], TABLE.mask)[0]
    budgets = [level(3, kind), level(4, kind), lowest, (level(4, kind) + level(5, kind)) / 2]
    result = search(SCORES[name](), budgets, kind=kind, patience=patience)
    assert [found.budget for found in result.found] == budgets
    for found in result.found:
        TABLE.check(found.bits)
        assert found.cost == cost_of(found.bits, kind) <= found.budget
    costs_in_order = [found.cost for found in sorted(result.found)]
    assert costs_in_order == sorted(costs_in_order)
    states = replay(result.path, TABLE.uniform(5, 5))
    for step, (before, after) in zip(result.path, itertools.pairwise(states), strict=True):
        assert step.cost == cost_of(as_config(after), kind)
        assert np.sum(before != after) == 1  # one tensor of one layer at a time
    lows = sum(len(c) for layer in TABLE.layers for c in (layer.weight_candidates,) * 2)
    assert len(result.path) <= (patience + 2) * 2 * lows * 3  # a bound far from endless


@pytest.mark.parametrize("name", SCORES)
def test_no_configuration_is_visited_twice(name):
    result = search(SCORES[name](), [level(3)], patience=3)
    states = [state.tobytes() for state in replay(result.path, TABLE.uniform(5, 5))]
    assert len(set(states)) == len(states)


@pytest.mark.parametrize("name", SCORES)
def test_the_mask_is_honoured(name):
    mask = TABLE.mask.copy()
    column = TABLE.candidates.index
    mask[TABLE.names.index("conv0"), 0, column(2)] = False  # frozen
    mask[TABLE.names.index("conv1"), 0] = [bits in (6, 3) for bits in TABLE.candidates]  # a gap
    mask[TABLE.names.index("conv2"), 1] = [bits == 4 for bits in TABLE.candidates]  # no choice
    scored = []
    given = SCORES[name]()

    def score(population, images, labels):
        scored.append(np.stack([population.weights, population.acts], axis=-1))
        return given(population, images, labels)

    lowest, highest = greedy.reachable(TABLE, COST["bitops"], mask)
    budgets = [lowest, 0.5 * (lowest + highest)]
    result = search(score, budgets, mask=mask)
    seen = np.concatenate(
        [*scored, *[np.stack(found.bits, axis=-1)[None] for found in result.found]]
    )
    choices = (seen[..., None] == np.array(TABLE.candidates)).argmax(-1)
    layers, tensors = np.indices(choices.shape[1:])
    assert np.all(mask[layers, tensors, choices])
    assert all(found.cost <= found.budget for found in result.found)
    assert len({population.shape for population in scored}) == 1  # so that scoring compiles once


def test_weights_fall_to_the_published_target_before_activations():
    """0.95 of the cost of the anchor's weights at the start's activations."""
    result = search(sensible, [level(4)])
    states = replay(result.path, TABLE.uniform(5, 5))
    target = 0.95 * cost_of(TABLE.uniform(4, 5))
    phases = [
        "acts" if cost_of(as_config(state)) <= target or step.phase == "acts" else "weights"
        for step, state in zip(result.path, states[:-1], strict=True)
    ]
    switch = phases.index("acts")
    assert [step.phase for step in result.path] == (
        ["weights"] * switch + ["acts"] * (len(phases) - switch)
    )
    assert 0 < switch < len(phases)
    assert cost_of(as_config(states[switch])) <= target < cost_of(as_config(states[switch - 1]))


@pytest.mark.parametrize(("budget", "anchor"), [(4.2, 4), (3.7, 4), (3.3, 3)])
def test_the_anchor_is_the_uniform_level_nearest_to_the_budget(budget, anchor):
    between = level(int(budget)) + (budget % 1) * (level(int(budget) + 1) - level(int(budget)))
    result = search(sensible, [between])
    states = replay(result.path, TABLE.uniform(5, 5))
    target = 0.95 * cost_of(TABLE.uniform(anchor, 5))
    switch = [step.phase for step in result.path].index("acts")
    assert cost_of(as_config(states[switch])) <= target < cost_of(as_config(states[switch - 1]))


def expected_move(state, phase, errors_of, visited):
    """The published choice: least 1.5 e / max(e) + B / max(B) over all moves by one candidate."""
    moves = []
    for i, layer in enumerate(TABLE.layers):
        allowed = (layer.weight_candidates, layer.act_candidates)[phase]
        place = allowed.index(state[i, phase])
        for other in (place - 1, place + 1):
            if 0 <= other < len(allowed):
                moved = state.copy()
                moved[i, phase] = allowed[other]
                if moved.tobytes() not in visited:
                    moves.append(moved)
    stacked = np.stack(moves)
    errors = errors_of(BitConfig(stacked[..., 0], stacked[..., 1]), None, None)
    prices = np.array([cost_of(as_config(moved)) for moved in moves])
    return moves[np.argmin(1.5 * errors / errors.max() + prices / prices.max())]


def test_every_move_is_the_published_choice():
    result = search(sensible, [level(3)], patience=1000)
    states = replay(result.path, TABLE.uniform(5, 5))
    visited = set()
    for step, (before, after) in zip(result.path, itertools.pairwise(states), strict=True):
        visited.add(before.tobytes())
        phase = ("weights", "acts").index(step.phase)
        np.testing.assert_array_equal(after, expected_move(before, phase, sensible, visited))


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="light")(nn.Dense(8, name="heavy")(x))


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
    table = trace_layers(Two(), (8,), rules=[Rule(weights=(5, 4, 3), acts=(5, 4, 3))])
    order = [("heavy", 3), ("heavy", 5), ("light", 3), ("light", 5)]
    table_of_errors = {
        (3, 4): errors[0],
        (5, 4): errors[1],
        (4, 3): errors[2],
        (4, 5): errors[3],
    }

    def score(population, images, labels):
        pairs = np.asarray(population.weights).tolist()
        return np.array([table_of_errors.get(tuple(pair), 1e-3) for pair in pairs])

    cost = costs.cost_table(table, "bitops")
    steps = []
    budget = greedy.reachable(table, cost, table.mask)[0]
    greedy.search(
        score, table, cost, table.mask, [budget], batches(), start_bits=4, on_step=steps.append
    )
    assert (steps[0].layer, steps[0].bits) == wanted
    assert steps[0].score == errors[order.index(wanted)]


def test_one_descent_begins_like_that_of_its_largest_budget():
    both = search(sensible, [level(3), level(4)])
    alone = search(sensible, [level(4)])
    jax.tree.map(np.testing.assert_array_equal, both.found[1].bits, alone.found[0].bits)
    assert both.path[: len(alone.path)] == alone.path
    assert len(both.path) > len(alone.path)


def test_equal_budgets_get_equal_results():
    first, other, second = search(sensible, [level(3), level(4), level(3)]).found
    assert first == second
    assert other.budget == level(4)


def test_budgets_that_are_already_met_return_the_start():
    for budget, bits in [(level(5), 5), (level(6), 6), (2 * level(6), 6)]:
        result = search(sensible, [budget])
        assert result.path == []
        jax.tree.map(np.testing.assert_array_equal, result.found[0].bits, TABLE.uniform(bits, bits))


def test_a_budget_above_the_start_starts_from_the_largest_bits():
    result = search(sensible, [level(3), (level(5) + level(6)) / 2])
    states = replay(result.path, TABLE.uniform(6, 6))
    assert all(
        step.cost == cost_of(as_config(s)) for step, s in zip(result.path, states[1:], strict=True)
    )
    assert level(5) < result.found[1].cost <= (level(5) + level(6)) / 2


def test_a_budget_in_bytes_leaves_activations_alone():
    result = search(sensible, [level(3, "bytes"), level(2, "bytes")], kind="bytes")
    for found in result.found:
        np.testing.assert_array_equal(found.bits.acts, TABLE.uniform(5, 5).acts)
    assert {step.phase for step in result.path} == {"weights"}


@pytest.mark.parametrize("kind", ["bitops", "bytes"])
def test_the_cost_of_the_smallest_uniform_subnet_is_within_reach(kind):
    """As the library reports it, in float32: its rounding must not make it unreachable."""
    rules = bit_rules((6, 5, 4, 3, 2))
    for width in range(3, 40):
        table = trace_layers(Wide(width), (31, 29, 3), rules=rules)
        budget = float(costs.COSTS[kind](table, table.uniform(2, 2)))
        greedy.check_budgets(table, costs.cost_table(table, kind), table.mask, [budget])


class Wide(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        for features in (7, 37 * self.width, 41 * self.width):
            x = nn.Conv(features, (3, 3))(x)
        return nn.Dense(11)(x.mean((1, 2)))


def test_scores_that_are_no_numbers_never_win():
    """A subnet whose loss overflowed is the worst, not the best."""

    def score(population, images, labels):
        weights, _ = bits_of(population)
        return np.where(np.any(weights == 2, axis=-1), np.nan, sensible(population, None, None))

    (found,) = search(score, [level(4)]).found
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
        cost = costs.cost_table(table, kind)
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
        assert greedy.reachable(table, cost, table.mask) == (min(totals), max(totals))


def test_an_unreachable_budget_names_the_range_and_what_holds_it_there():
    low, high = greedy.reachable(TABLE, COST["bitops"], TABLE.mask)
    parts = [
        layer.macs * min(layer.weight_candidates) * min(layer.act_candidates)
        for layer in TABLE.layers
    ]
    heaviest = TABLE.names[int(np.argmax(parts))]
    with pytest.raises(ValueError) as error:
        search(sensible, [level(4), low * 0.99])
    message = str(error.value)
    assert f"{low * 0.99}" in message and f"{level(4)}" not in message
    assert f"{low:.6g} to {high:.6g}" in message
    assert heaviest in message


def test_a_search_needs_a_budget():
    with pytest.raises(ValueError, match="no budget"):
        search(sensible, [])


def test_cost_tables_in_which_more_bits_are_cheaper_are_refused():
    cost = costs.cost_table(SMALL, "bitops")
    cost[SMALL.names.index("conv"), SMALL.candidates.index(3)] *= 10
    with pytest.raises(ValueError, match="'conv' costs more with fewer bits"):
        greedy.search(lambda *_: None, SMALL, cost, SMALL.mask, [1e12], iter(()))

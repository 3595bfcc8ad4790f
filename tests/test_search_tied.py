import itertools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax import costs
from mpq_jax.bits import BitConfig
from mpq_jax.layer_table import Rule, bit_rules, trace_layers
from mpq_jax.search import greedy, ilp, tied


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for index, width in enumerate((3, 5, 4, 2)):
            x = nn.Conv(width, (3, 3), name=f"conv{index}")(x)
        return nn.Dense(3, name="head")(jnp.mean(x, axis=(1, 2)))


def make_table(candidates=(8, 4, 2), *, first=()):
    return trace_layers(Net(), (6, 6, 2), rules=bit_rules(candidates, first=first))


def error_of(table, seed=0):
    """A made-up error: a random amount for each layer, the more the fewer bits it has."""
    amounts = np.random.default_rng(seed).uniform(0.2, 1, (2, len(table)))
    seen = []

    def score(configs, images, labels):
        seen.append(configs)
        weights, acts = np.asarray(configs.weights), np.asarray(configs.acts)
        return jnp.asarray((amounts[0] * 2.0**-weights + amounts[1] * 2.0**-acts).sum(axis=-1))

    return score, seen


def batches():
    while True:
        yield jnp.zeros((1,)), jnp.zeros((1,), jnp.int32)


@pytest.mark.parametrize("kind", ["bitops", "bytes", "mean_bits"])
def test_costs_are_those_of_equal_bits(kind):
    table = make_table()
    cost = costs.cost_table(table, kind)
    problem = tied.tie(table, cost, error_of(table)[0])
    for weights in itertools.product((8, 4, 2), repeat=3):
        bits = BitConfig(
            jnp.array([8, *weights, 8], jnp.int32),
            jnp.array([8, 8, 8, 8, 8], jnp.int32),  # the mask's one choice
        )
        equal = problem.follow(bits)
        np.testing.assert_array_equal(equal.acts, [8, *weights, 8])
        np.testing.assert_array_equal(equal.weights, bits.weights)
        assert costs.total(table, problem.cost, bits) == costs.total(table, cost, equal)


def test_a_tied_greedy_search_scores_and_finds_equal_bits_only():
    table = make_table()
    cost = costs.cost_table(table, "bitops")
    score, seen = error_of(table)
    problem = tied.tie(table, cost, score)
    budgets = [costs.total(table, cost, table.uniform(bits, bits)) for bits in (4, 2)]
    found = greedy.search(
        problem.score, table, problem.cost, problem.mask, budgets, batches()
    ).found
    configs = [problem.follow(one.bits) for one in found]
    for one, bits, budget in zip(found, configs, budgets, strict=True):
        table.check(bits)
        assert one.cost == costs.total(table, cost, bits) <= budget
    for bits in seen + configs:
        np.testing.assert_array_equal(bits.weights[..., 1:4], bits.acts[..., 1:4])
    assert seen


def test_what_may_be_chosen_is_what_the_programme_may_choose():
    """The integer programme ties by pairs, the greedy search by a mask: the same configurations."""
    first = (
        Rule(pattern="conv1", acts=4),  # only its weights have a choice
        Rule(pattern="conv2", weights=2),  # only its input has one
        Rule(pattern="conv3", weights=(8, 4), acts=(4, 2)),  # 4 bits in common
    )
    table = make_table(first=first)
    problem = tied.tie(table, costs.cost_table(table, "bytes"), error_of(table)[0])
    pairs = ilp.tied(table)
    bits = np.array(table.candidates)
    for layer in range(len(table)):
        weights, acts = (bits[problem.mask[layer, kind]] for kind in (0, 1))
        chosen = set()
        for w, a in itertools.product(weights, acts):
            config = BitConfig(*(jnp.full((len(table),), b, jnp.int32) for b in (w, a)))
            followed = problem.follow(config)
            chosen.add((int(followed.weights[layer]), int(followed.acts[layer])))
        wanted = {(int(bits[w]), int(bits[a])) for w, a in np.argwhere(pairs[layer])}
        assert chosen == wanted, table.names[layer]


def test_layers_without_common_bits_are_refused_by_name():
    table = make_table(first=(Rule(pattern="conv2", weights=(8, 4), acts=(3, 2)),))
    with pytest.raises(ValueError, match="weights and input of conv2 have no bits in common"):
        tied.tie(table, costs.cost_table(table, "bytes"), error_of(table)[0])

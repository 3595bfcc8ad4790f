import math

import numpy as np
import pytest

from mpq_jax.search.tolerance import cheapest_within
from mpq_jax.supernet.bits import BitConfig

LOW, HIGH = 20.0, 800.0


def config(cost):
    return BitConfig(np.array([cost], np.int32), np.array([1], np.int32))


class Network:
    """Whole costs; what is found is just within the limit; accuracy by cost."""

    def __init__(self, accuracy, *, slack=0):
        self.accuracy, self.slack, self.limits, self.asked = accuracy, slack, [], []

    def find(self, limits):
        self.limits.append(list(limits))
        return [config(max(math.floor(limit * (1 + 1e-12)) - self.slack, 1)) for limit in limits]

    def cost_of(self, bits):
        return float(bits.weights[0])

    def accuracy_of(self, bits):
        self.asked.append(int(bits.weights[0]))
        return self.accuracy(self.cost_of(bits))

    def search(self, **options):
        options = {"low": LOW, "high": HIGH, "wanted": 0.5} | options
        return cheapest_within(self.find, self.cost_of, self.accuracy_of, **options)


@pytest.mark.parametrize("edge", [20, 21, 37, 150, 555, 799, 800])
@pytest.mark.parametrize(("points", "rounds"), [(2, 1), (6, 2), (4, 3), (2, 12)])
def test_the_cheapest_limit_is_found_as_closely_as_asked(edge, points, rounds):
    network = Network(lambda cost: float(cost >= edge))
    best, tried = network.search(points=points, rounds=rounds)
    assert best is not None and best.accuracy == 1 and edge <= best.cost <= best.limit
    # The first round leaves a factor of (high / low)^(1 / (points - 1)) between its limits, and
    # each further one divides its logarithm by points + 1.
    left = math.log(HIGH / LOW) / (points - 1) / (points + 1) ** (rounds - 1)
    least = min(one.limit for one in tried if one.accuracy == 1)
    assert edge <= least * (1 + 1e-9) and least <= edge * math.exp(left) * (1 + 1e-9)
    assert best.cost == min(one.cost for one in tried if one.accuracy == 1)
    assert len(network.limits) <= rounds
    assert all(len(limits) == points for limits in network.limits)
    assert [one.limit for one in tried] == [limit for part in network.limits for limit in part]
    assert all(LOW <= one.limit <= HIGH for one in tried)
    assert len(set(network.asked)) == len(network.asked)  # each is asked for once
    for one in tried:
        assert one.cost == network.cost_of(one.bits) <= one.limit * (1 + 1e-9)
        assert one.accuracy == network.accuracy(one.cost)


def test_limits_are_spread_evenly_on_a_logarithmic_scale():
    network = Network(lambda cost: float(cost >= 100))
    network.search(points=3, rounds=2, low=1.0, high=10_000.0)
    np.testing.assert_allclose(network.limits[0], [1, 100, 10_000])
    np.testing.assert_allclose(network.limits[1], 10 ** np.array([0.5, 1, 1.5]))


def test_whatever_was_good_enough_counts():
    """Accuracy need not rise with the limit: the cheapest good one is not next to the edge."""
    network = Network(lambda cost: float(cost in (20, 800)))
    best, tried = network.search()
    assert best is not None and best.cost == 20 and len(tried) == 6  # nothing is below
    falling = Network(lambda cost: 0.5 if cost == 86 else 0.4)  # 20 * 40 ** (2 / 5) = 87.47
    best, _ = falling.search(rounds=1)
    assert best is None
    falling = Network(lambda cost: 0.5 if cost == 87 else 0.4)
    best, _ = falling.search(rounds=3)
    assert best is not None and (best.cost, best.accuracy) == (87, 0.5)


def test_of_good_ones_the_cheapest_is_returned_not_that_of_the_least_limit():
    network = Network(lambda cost: 1.0)
    network.find = lambda limits: [config(70 - 10 * i) for i, _ in enumerate(limits)]
    best, _ = network.search(rounds=1)
    assert best is not None and best.cost == 20


def test_where_nothing_is_good_enough_there_is_none():
    network = Network(lambda cost: 0.49)
    best, tried = network.search(rounds=5)
    assert best is None and len(tried) == 6 and len(network.limits) == 1


def test_limits_that_cannot_be_met_are_left_out():
    network = Network(lambda cost: 1.0)
    found = network.find
    network.find = lambda limits: [
        bits if limit > 100 else None for limit, bits in zip(limits, found(limits), strict=True)
    ]
    best, tried = network.search()
    assert best is not None and 100 < best.limit < 110
    assert all(one.limit > 100 for one in tried)
    network.find = lambda limits: [None for _ in limits]
    assert network.search() == (None, [])


def test_equal_configurations_are_asked_for_once():
    network = Network(lambda cost: 1.0)
    network.find = lambda limits: [config(30) for _ in limits]
    best, tried = network.search()
    assert network.asked == [30] and len(tried) == 6 and best.cost == 30


def test_a_range_of_one_cost():
    best, tried = Network(lambda cost: 1.0).search(low=50.0, high=50.0)
    assert best is not None and best.cost == 50


@pytest.mark.parametrize(
    "wrong", [{"low": 0.0}, {"low": 900.0}, {"points": 1}, {"rounds": 0}, {"high": math.nan}]
)
def test_ranges_and_counts_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="wanted a range above 0, at least 2 points and 1 round"):
        Network(lambda cost: 1.0).search(**wrong)

"""The cheapest configuration whose accuracy is good enough."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mpq_jax.search.problem import same_bits
from mpq_jax.supernet.bits import BitConfig


class Tried(NamedTuple):
    """A configuration that was found for a limit of the cost, and its accuracy.

    Attributes:
        limit: largest cost that was allowed.
        bits: the configuration.
        cost: its cost.
        accuracy: its accuracy, 0 to 1.
    """

    limit: float
    bits: BitConfig
    cost: float
    accuracy: float


def cheapest_within(
    find: Callable[[Sequence[float]], Sequence[BitConfig | None]],
    cost_of: Callable[[BitConfig], float],
    accuracy_of: Callable[[BitConfig], float],
    *,
    low: float,
    high: float,
    wanted: float,
    points: int = 6,
    rounds: int = 2,
) -> tuple[Tried | None, list[Tried]]:
    """Searches the range of costs for the cheapest configuration that is accurate enough.

    Every round searches at several limits, evenly spread on a logarithmic scale; the next round
    goes on between the cheapest limit that was good enough and the next lower one. Accuracy need
    not increase with the limit: whatever was good enough counts.

    Args:
        find: limits -> a configuration for each; None: there is none within this limit.
        cost_of: cost of a configuration.
        accuracy_of: accuracy of a configuration, 0 to 1; each is asked for once.
        low: smallest limit that can be met, above 0.
        high: largest limit worth trying.
        wanted: least accuracy.
        points: limits per round, at least 2.
        rounds: number of rounds.

    Returns:
        The cheapest configuration that is accurate enough, or None; and all that were tried.
    """
    if not (0 < low <= high and points >= 2 and rounds >= 1):
        raise ValueError(
            f"low is {low}, high {high}, points {points} and rounds {rounds}; wanted a range above "
            "0, at least 2 points and 1 round"
        )
    tried: list[Tried] = []
    asked: list[float] = []
    for number in range(rounds):
        # The ends of later rounds are known already.
        spread = np.geomspace(low, high, points + 2 * (number > 0))
        limits = [float(limit) for limit in (spread[1:-1] if number else spread)]
        for limit, bits in zip(limits, find(limits), strict=True):
            asked.append(limit)
            if bits is None:
                continue
            known = [one for one in tried if same_bits(one.bits, bits)]
            accuracy = known[0].accuracy if known else accuracy_of(bits)
            tried.append(Tried(limit, bits, cost_of(bits), accuracy))
        enough = [one.limit for one in tried if one.accuracy >= wanted]
        if not enough:
            break
        high = min(enough)
        low = max((limit for limit in asked if limit < high), default=high)
        if low == high:
            break
    good = [one for one in tried if one.accuracy >= wanted]
    return min(good, key=lambda one: one.cost, default=None), tried

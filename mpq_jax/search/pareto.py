"""Frontiers of cost against loss, both to be small."""

from collections.abc import Sequence

import numpy as np


def frontier(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Returns the places of the points that no other one beats, by ascending cost.

    A point is beaten by one that is no worse in both and better in one. Of equal points, the first
    is kept.
    """
    order = np.lexsort((np.asarray(losses), np.asarray(costs)))  # stable
    kept, lowest = [], np.inf
    for place in order:
        if losses[place] < lowest:
            kept.append(int(place))
            lowest = losses[place]
    return kept


def hypervolume(
    costs: Sequence[float], losses: Sequence[float], *, reference: tuple[float, float]
) -> float:
    """Returns the area between the frontier and a reference point: larger is better.

    Args:
        costs: costs of the points.
        losses: losses of the points.
        reference: cost and loss that are worse than what counts; points beyond add nothing.

    References:
        Zitzler and Thiele, Multiobjective optimization using evolutionary algorithms, PPSN 1998.
    """
    area, height = 0.0, reference[1]
    for place in frontier(costs, losses):
        width = reference[0] - costs[place]
        if width > 0 and losses[place] < height:
            area += width * (height - losses[place])
            height = losses[place]
    return float(area)

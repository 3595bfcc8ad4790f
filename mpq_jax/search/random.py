"""Random search: the best of many configurations just within the budget.

References:
    RFQuant's code (`util/random_search.py`), which draws until the cost is near the budget.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Key

from mpq_jax.search.problem import (
    Budget,
    OnStep,
    Score,
    SearchResult,
    Step,
    first_cost,
    ignore,
    make_result,
    score_choices,
)
from mpq_jax.search.sampling import distinct, generator_of, repair
from mpq_jax.search.space import SearchSpace

PER_SCORE = 64  # configurations that are scored at once


def random_search(
    score: Score,
    space: SearchSpace,
    budgets: Sequence[Budget],
    key: Key[Array, ""],
    *,
    samples: int = 1000,
    window: float = 0.05,
    on_step: OnStep = ignore,
) -> list[SearchResult]:
    """Draws configurations for each budget and returns the best scored one.

    Bits are drawn uniformly, then moved at random until the budget is met and used: rejecting
    draws, as published, would hardly ever meet a tight budget.

    Args:
        score: see `problem`, as for the next three.
        space: the configurations.
        budgets: the budgets.
        key: random key; decides the draws and the images.
        samples: configurations per budget, as published; fewer if there are not so many.
        window: share of the first limit that may stay unused, where that is possible.
        on_step: called after every batch of configurations.

    Raises:
        ValueError: a budget cannot be met.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; wanted at least 1")
    return [
        _best_of(score, space, budget, key, samples=samples, window=window, on_step=on_step)
        for budget in budgets
    ]


def _best_of(score, space, budget, key, *, samples, window, on_step) -> SearchResult:
    generator = generator_of(key)
    drawn = (
        repair(space, budget, space.sample(generator), generator, window=window)
        for _ in range(2 * samples)
    )
    every = distinct(drawn, samples)
    best, lowest = every[0], np.inf
    for first in range(0, len(every), PER_SCORE):
        batch = every[first : first + PER_SCORE]
        scores = score_choices(score, space, batch, key)
        place = int(np.argmin(scores))
        if scores[place] < lowest:
            best, lowest = batch[place], float(scores[place])
        change = f"{first + len(batch)} of {len(every)}"
        on_step(Step("random", change, first_cost(budget, best), lowest))
    return make_result(space, budget, best, lowest)

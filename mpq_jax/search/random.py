"""Random search: the best of many configurations just within the budget.

References:
    RFQuant's code (`util/random_search.py`), which draws until the cost is near the budget.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Key

from mpq_jax.search import ilp
from mpq_jax.search import problem as spaces
from mpq_jax.search.problem import Budget, Found, Score, Space, Step, Watch
from mpq_jax.supernet.layer_table import LayerTable

PER_SCORE = 64  # configurations that are scored at once


def search(
    score: Score,
    table: LayerTable,
    candidates: Sequence[int],
    mask: np.ndarray,
    budgets: Sequence[Budget],
    key: Key[Array, ""],
    *,
    samples: int = 1000,
    window: float = 0.05,
    watch: Watch = spaces.nobody,
) -> list[Found]:
    """Draws configurations for each budget and returns the best scored one.

    Bits are drawn uniformly, then moved at random until the budget is met and used: rejecting
    draws, as published, would all but never meet a tight budget.

    Args:
        score: see `space.Score`; all is scored with one key.
        table: the layers.
        candidates: bits of each choice, `table.candidates`.
        mask: bool [layers, 2, choices], what may be chosen (normally `table.mask`).
        budgets: what to keep within.
        key: random key; decides the draws and the images.
        samples: configurations per budget, as published; fewer if there are not so many.
        window: part of the first limit that may be left unused, where that is possible.
        watch: called after every batch of configurations.

    Returns:
        One configuration per budget, in their order.

    Raises:
        ValueError: a budget cannot be met.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; wanted at least 1")
    space = Space(table, candidates, mask)
    ilp.check(space, budgets)
    found = {}
    for budget in budgets:
        generator = generator_of(key)
        states = distinct(
            (
                into_budget(space, budget, space.drawn(generator), generator, window=window)
                for _ in range(2 * samples)
            ),
            samples,
        )
        best, lowest = states[0], np.inf
        for first in range(0, len(states), PER_SCORE):
            part = states[first : first + PER_SCORE]
            scores = spaces.scored(score, space, part, key)
            place = int(np.argmin(scores))
            if scores[place] < lowest:
                best, lowest = part[place], float(scores[place])
            cost = spaces.first_cost(budget, best)
            watch(Step("random", f"{first + len(part)} of {len(states)}", cost, lowest))
        found[budget.name] = spaces.result(space, budget, best, lowest)
    return spaces.in_order(budgets, found)


def generator_of(key: Key[Array, ""]) -> np.random.Generator:
    """Returns a NumPy generator of a JAX key."""
    return np.random.default_rng(spaces.words_of(key))


def distinct(states, count: int) -> list[np.ndarray]:
    """Returns the first so many different states."""
    found: dict[bytes, np.ndarray] = {}
    for state in states:
        found.setdefault(state.tobytes(), state)
        if len(found) == count:
            break
    return list(found.values())


def into_budget(
    space: Space,
    budget: Budget,
    state: np.ndarray,
    generator: np.random.Generator,
    *,
    window: float,
) -> np.ndarray:
    """Moves a state at random until it is within a budget and leaves little of it unused.

    Entries are lowered until no limit is exceeded; then entries that fit are raised until less
    than `window` of the first limit is left. Where a random descent does not meet the limits, the
    nearest configuration that does is found by an integer program.
    """
    while (over := float(spaces.excess(budget, state))) > 0:
        moves = space.neighbors(state)
        lower = moves[spaces.excess(budget, moves) < over]
        if not len(lower):
            return ilp.nearest(space, budget, state)
        state = lower[generator.integers(len(lower))]
    while (now := spaces.price(budget, state)) < 1 - window:
        moves = space.neighbors(state)
        fits = (spaces.price(budget, moves) > now) & (spaces.excess(budget, moves) == 0)
        if not fits.any():
            return state
        state = moves[fits][generator.integers(fits.sum())]
    return state

"""Evolutionary search within a budget.

References:
    RFQuant's code (`evolution_search.py`), for the numbers; it scores on the test images, and here
    all scores are the caller's.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Key

from mpq_jax.layer_table import LayerTable
from mpq_jax.search import ilp
from mpq_jax.search import space as spaces
from mpq_jax.search.random import distinct, generator_of, into_budget
from mpq_jax.search.space import Budget, Found, Score, Space, Step, Watch

ATTEMPTS = 10  # times as many as wanted: mutations and crossovers that are made at most


def search(
    score: Score,
    table: LayerTable,
    candidates: Sequence[int],
    mask: np.ndarray,
    budgets: Sequence[Budget],
    key: Key[Array, ""],
    *,
    population: int = 50,
    generations: int = 20,
    parents: int = 10,
    mutations: int = 25,
    crossovers: int = 25,
    mutation_probability: float = 0.2,
    window: float = 0.05,
    watch: Watch = spaces.nobody,
) -> list[Found]:
    """Lets configurations within each budget evolve and returns the best one ever scored.

    A generation is made of mutations (each entry is drawn anew with some probability) and uniform
    crossovers of the best so far, and filled up with random configurations. What leaves the budget
    is moved back at random. The defaults are the published ones.

    Args:
        score: see `space.Score`; all is scored with one key.
        table: the layers.
        candidates: bits of each choice, `table.candidates`.
        mask: bool [layers, 2, choices], what may be chosen (normally `table.mask`).
        budgets: what to keep within.
        key: random key; decides the draws and the images.
        population: configurations per generation.
        generations: how many, the first random one included.
        parents: best configurations so far that others are made from.
        mutations: made from one parent each, per generation.
        crossovers: made from two parents each, per generation.
        mutation_probability: of each entry in a mutation.
        window: part of the first limit that may be left unused, where that is possible.
        watch: called after every generation.

    Returns:
        One configuration per budget, in their order.

    Raises:
        ValueError: a budget cannot be met.
    """
    if not (1 <= parents <= population and mutations + crossovers <= population):
        raise ValueError(
            f"parents is {parents}, mutations {mutations} and crossovers {crossovers}; wanted at "
            f"least one parent, and no more than the population of {population} of either"
        )
    space = Space(table, candidates, mask)
    ilp.check(space, budgets)
    found = {}
    for budget in budgets:
        generator = generator_of(key)

        def within(state: np.ndarray, budget=budget, generator=generator) -> np.ndarray:
            return into_budget(space, budget, state, generator, window=window)

        known: dict[bytes, tuple[float, np.ndarray]] = {}
        for generation in range(generations):
            best = sorted(known.values(), key=lambda one: one[0])[:parents]
            pool = [state for _, state in best]
            made = (
                within(state)
                for state in _offspring(
                    space, pool, generator, mutations, crossovers, mutation_probability
                )
            )
            new = distinct((s for s in made if s.tobytes() not in known), mutations + crossovers)
            drawn = (within(space.drawn(generator)) for _ in range(ATTEMPTS * population))
            fill = (state for state in drawn if state.tobytes() not in known)
            new = distinct((state for part in (new, fill) for state in part), population)
            if not new:
                break  # there are no others within the budget
            scores = spaces.scored(score, space, new, key)
            known |= {
                state.tobytes(): (float(value), state)
                for state, value in zip(new, scores, strict=True)
            }
            lowest, state = min(known.values(), key=lambda one: one[0])
            cost = float(spaces.cost_of(budget.limits[0].cost, state))
            watch(Step(f"generation {generation + 1}", f"{len(known)} scored", cost, lowest))
        lowest, state = min(known.values(), key=lambda one: one[0])
        found[budget.name] = spaces.result(space, budget, state, lowest)
    return spaces.in_order(budgets, found)


def _offspring(
    space: Space,
    pool: list[np.ndarray],
    generator: np.random.Generator,
    mutations: int,
    crossovers: int,
    probability: float,
):
    """Yields mutations, then crossovers, some more than are wanted."""
    if not pool:
        return
    for kind in [0] * (ATTEMPTS * mutations) + [1] * (ATTEMPTS * crossovers):
        one, other = (pool[place] for place in generator.integers(len(pool), size=2))
        source = other if kind else space.drawn(generator)
        taken = generator.random(len(space.genes)) < (0.5 if kind else probability)
        state = one
        for gene, take in zip(space.genes, taken, strict=True):
            if take:
                state = space.moved(state, gene, source[gene // 2, gene % 2])
        yield state

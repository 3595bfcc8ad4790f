"""Evolutionary search within a budget.

References:
    RFQuant's code (`evolution_search.py`), for the numbers; it scores on the test images, and here
    all scores are the caller's.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Key

from mpq_jax.search import ilp
from mpq_jax.search import problem as spaces
from mpq_jax.search.problem import Budget, Found, Score, Space, Step, Watch
from mpq_jax.search.random import distinct, generator_of, into_budget
from mpq_jax.supernet.layer_table import LayerTable

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
    if generations < 1:
        raise ValueError(f"generations is {generations}; wanted at least 1")
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
            new: list[np.ndarray] = []
            for made, wanted in (
                (_mutated(space, pool, generator, mutation_probability), mutations),
                (_crossed(space, pool, generator), crossovers),
                (_drawn(space, generator), population),
            ):
                fresh = (within(state) for state in itertools.islice(made, ATTEMPTS * wanted))
                fresh = (state for state in fresh if state.tobytes() not in known)
                new = distinct(itertools.chain(new, fresh), min(len(new) + wanted, population))
            if not new:
                break  # there are no others within the budget
            scores = spaces.scored(score, space, new, key)
            known |= {
                state.tobytes(): (float(value), state)
                for state, value in zip(new, scores, strict=True)
            }
            lowest, state = min(known.values(), key=lambda one: one[0])
            cost = spaces.first_cost(budget, state)
            watch(Step(f"generation {generation + 1}", f"{len(known)} scored", cost, lowest))
        lowest, state = min(known.values(), key=lambda one: one[0])
        found[budget.name] = spaces.result(space, budget, state, lowest)
    return spaces.in_order(budgets, found)


def _drawn(space: Space, generator: np.random.Generator):
    while True:
        yield space.drawn(generator)


def _mutated(space: Space, pool, generator: np.random.Generator, probability: float):
    """Yields states of the pool with some entries drawn anew."""
    while pool:
        one = pool[generator.integers(len(pool))]
        yield _mixed(space, one, space.drawn(generator), generator, probability)


def _crossed(space: Space, pool, generator: np.random.Generator):
    """Yields states whose entries are those of either of two of the pool."""
    while pool:
        one, other = (pool[place] for place in generator.integers(len(pool), size=2))
        yield _mixed(space, one, other, generator, 0.5)


def _mixed(space: Space, one, other, generator: np.random.Generator, probability: float):
    taken = generator.random(len(space.genes)) < probability
    for gene, take in zip(space.genes, taken, strict=True):
        if take:
            one = space.moved(one, gene, other[gene // 2, gene % 2])
    return one

"""Evolutionary search within a budget.

References:
    RFQuant's code (`evolution_search.py`), for the numbers; it scores on the test images, and here
    all scores are the caller's.
"""

import itertools
from collections.abc import Iterator, Sequence

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

ATTEMPTS = 10  # most mutations and crossovers that are made, as a multiple of those wanted


def evolutionary_search(
    score: Score,
    space: SearchSpace,
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
    on_step: OnStep = ignore,
) -> list[SearchResult]:
    """Evolves configurations within each budget and returns the best one ever scored.

    A generation consists of mutations (each variable is drawn anew with some probability) and
    uniform crossovers of the best so far, and is filled up with random configurations. Those that
    exceed the budget are repaired at random. The defaults are the published ones.

    Args:
        score: see `problem`, as for the next three.
        space: the configurations.
        budgets: the budgets.
        key: random key; decides the draws and the images.
        population: configurations per generation.
        generations: number of generations, the first random one included.
        parents: number of the best configurations so far that others are made from.
        mutations: configurations per generation made from one parent each.
        crossovers: configurations per generation made from two parents each.
        mutation_probability: probability that a mutation draws a variable anew.
        window: share of the first limit that may stay unused, where that is possible.
        on_step: called after every generation.

    Raises:
        ValueError: a budget cannot be met, or the numbers do not fit together.
    """
    if generations < 1:
        raise ValueError(f"generations is {generations}; wanted at least 1")
    if not (1 <= parents <= population and mutations + crossovers <= population):
        raise ValueError(
            f"parents is {parents}, mutations {mutations} and crossovers {crossovers}; wanted at "
            f"least one parent, and no more than the population of {population} of either"
        )

    def next_generation(known, budget: Budget, generator: np.random.Generator):
        best = sorted(known.values(), key=lambda pair: pair[0])[:parents]
        pool = [choices for _, choices in best]
        new: list[np.ndarray] = []
        for made, wanted in (
            (_mutated(space, pool, generator, mutation_probability), mutations),
            (_crossed(space, pool, generator), crossovers),
            (_drawn(space, generator), population),
        ):
            repaired = (
                repair(space, budget, choices, generator, window=window)
                for choices in itertools.islice(made, ATTEMPTS * wanted)
            )
            fresh = (choices for choices in repaired if choices.tobytes() not in known)
            new = distinct(itertools.chain(new, fresh), min(len(new) + wanted, population))
        return new

    def evolve(budget: Budget) -> SearchResult:
        generator = generator_of(key)
        known: dict[bytes, tuple[float, np.ndarray]] = {}
        for number in range(generations):
            new = next_generation(known, budget, generator)
            if not new:
                break  # all configurations within the budget are known
            scores = score_choices(score, space, new, key)
            known |= {c.tobytes(): (float(s), c) for c, s in zip(new, scores, strict=True)}
            lowest, best = min(known.values(), key=lambda pair: pair[0])
            cost = first_cost(budget, best)
            on_step(Step(f"generation {number + 1}", f"{len(known)} scored", cost, lowest))
        lowest, best = min(known.values(), key=lambda pair: pair[0])
        return make_result(space, budget, best, lowest)

    return [evolve(budget) for budget in budgets]


def _drawn(space: SearchSpace, generator: np.random.Generator) -> Iterator[np.ndarray]:
    while True:
        yield space.sample(generator)


def _mutated(space, pool, generator, probability: float) -> Iterator[np.ndarray]:
    """Yields configurations of the pool with some variables drawn anew."""
    while pool:
        one = pool[generator.integers(len(pool))]
        yield _mixed(space, one, space.sample(generator), generator, probability)


def _crossed(space, pool, generator) -> Iterator[np.ndarray]:
    """Yields configurations whose variables come from either of two of the pool."""
    while pool:
        one, other = (pool[place] for place in generator.integers(len(pool), size=2))
        yield _mixed(space, one, other, generator, 0.5)


def _mixed(space: SearchSpace, one, other, generator, probability: float) -> np.ndarray:
    """Returns `one` with each variable taken from `other` at some probability."""
    taken = generator.random(len(space.variables)) < probability
    for variable, take in zip(space.variables, taken, strict=True):
        if take:
            one = space.with_choice(one, variable, other[variable])
    return one

"""Random configurations within a budget."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Array, Key

from mpq_jax.search import ilp
from mpq_jax.search.problem import Budget, relative_cost, seed_words, violation
from mpq_jax.search.space import SearchSpace


def generator_of(key: Key[Array, ""]) -> np.random.Generator:
    """Returns a NumPy generator that a JAX key seeds."""
    return np.random.default_rng(seed_words(key))


def distinct(choices: Iterable[np.ndarray], count: int) -> list[np.ndarray]:
    """Returns the first `count` different configurations, or all if there are fewer."""
    found: dict[bytes, np.ndarray] = {}
    for one in choices:
        found.setdefault(one.tobytes(), one)
        if len(found) == count:
            break
    return list(found.values())


def repair(
    space: SearchSpace,
    budget: Budget,
    choices: np.ndarray,
    generator: np.random.Generator,
    *,
    window: float,
) -> np.ndarray:
    """Moves a configuration at random until it is within a budget and leaves little of it unused.

    Variables are lowered until no constraint is violated; then variables are raised, as far as
    they fit, until less than `window` of the first limit is unused. Where a random descent does
    not meet the budget, the nearest configuration that does is found by an integer program.
    """
    while (over := float(violation(budget, choices))) > 0:
        moves = space.neighbors(choices)
        cheaper = moves[violation(budget, moves) < over]
        if not len(cheaper):
            return ilp.nearest(space, budget, choices)
        choices = cheaper[generator.integers(len(cheaper))]
    while (now := relative_cost(budget, choices)) < 1 - window:
        moves = space.neighbors(choices)
        fits = (relative_cost(budget, moves) > now) & (violation(budget, moves) == 0)
        if not fits.any():
            return choices
        choices = moves[fits][generator.integers(fits.sum())]
    return choices

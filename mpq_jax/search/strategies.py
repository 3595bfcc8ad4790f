"""The search strategies by name; `problem` describes what all of them take and return."""

from collections.abc import Callable
from typing import NamedTuple

from mpq_jax.checks import ranges
from mpq_jax.search.evolution import evolutionary_search
from mpq_jax.search.greedy import greedy_search
from mpq_jax.search.hybrid import hybrid_search
from mpq_jax.search.ilp import ilp_search
from mpq_jax.search.problem import SearchResult
from mpq_jax.search.random import random_search
from mpq_jax.search.tabu import tabu_search
from mpq_jax.supernet.rules import MAX_BITS


class Strategy(NamedTuple):
    """A search strategy.

    Attributes:
        search: the function.
        options: names of its options, keyword arguments that have defaults.
    """

    search: Callable[..., list[SearchResult]]
    options: tuple[str, ...]


STRATEGIES = {
    "greedy": Strategy(greedy_search, ("start_bits", "patience")),
    "tabu": Strategy(tabu_search, ("rounds", "proposals", "tabu_tenure")),
    "evolution": Strategy(
        evolutionary_search,
        (
            *("population", "generations", "parents", "mutations", "crossovers"),
            *("mutation_probability", "window"),
        ),
    ),
    "random": Strategy(random_search, ("samples", "window")),
    "ilp": Strategy(ilp_search, ("solutions",)),
    "hybrid": Strategy(hybrid_search, ("solutions", "rounds", "proposals", "tabu_tenure")),
}
RANGES = {  # of the options of all strategies
    "start_bits": ranges.Range(1, MAX_BITS, whole=True),
    "patience": ranges.COUNT_OR_NONE,
    "rounds": ranges.COUNT_OR_NONE,
    "proposals": ranges.COUNT,
    "tabu_tenure": ranges.COUNT_OR_NONE,
    "population": ranges.COUNT,
    "generations": ranges.COUNT,
    "parents": ranges.COUNT,
    "mutations": ranges.COUNT_OR_NONE,
    "crossovers": ranges.COUNT_OR_NONE,
    "mutation_probability": ranges.FRACTION,
    "window": ranges.FRACTION,
    "samples": ranges.COUNT,
    "solutions": ranges.COUNT,
}

"""The searches by name; all are `search(score, table, candidates, mask, budgets, key)`."""

from collections.abc import Callable

from mpq_jax.search import evolution, greedy, hybrid, ilp, random, tabu
from mpq_jax.search.problem import Found

STRATEGIES: dict[str, Callable[..., list[Found]]] = {
    "greedy": greedy.search,
    "exchange": tabu.search,
    "evolution": evolution.search,
    "random": random.search,
    "ilp": ilp.search,
    "hybrid": hybrid.search,
}

"""The searches by name; all are `search(score, table, candidates, mask, budgets, key)`."""

from collections.abc import Callable

from mpq_jax.search import evolution, exchange, greedy, hybrid, ilp, random
from mpq_jax.search.space import Found

STRATEGIES: dict[str, Callable[..., list[Found]]] = {
    "greedy": greedy.search,
    "exchange": exchange.search,
    "evolution": evolution.search,
    "random": random.search,
    "ilp": ilp.search,
    "hybrid": hybrid.search,
}

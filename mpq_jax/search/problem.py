"""What all searches share: the space they move in, budgets, and what they return.

A configuration is searched as a state, the index of each entry's choice: int [layers, 2 (weights,
input)]. Entries that have a choice and lead their group (`LayerTable.ties`) are moved; those tied
to them follow.
"""

import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable

Score = Callable[[BitConfig, Key[Array, ""]], Float[Any, " configs"]]
"""`score(configs, key)`: one number per configuration, smaller is better. The key decides on which
images: configurations are comparable if they were scored with the same one."""

WEIGHTS, ACTS = 0, 1  # columns of a state
TOLERANCE = 1e-6  # relative, of limits: they often are costs that were summed in float32


class Limit(NamedTuple):
    """A bound on a sum over layers, kept to a relative `TOLERANCE`.

    Attributes:
        name: of what is bounded, such as "bitops"; unique in a budget.
        cost: float64 [layers, weight choices, activation choices] in the order of
            `table.candidates`, as from `costs.cost_table`; infinity: not allowed.
        limit: largest cost of a configuration.
        at_least: smallest cost. The Double Rounding paper fixes the mean bits, that is, both.
    """

    name: str
    cost: np.ndarray
    limit: float
    at_least: float = -math.inf

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest cost that count as within the limit."""
        low, high = self.at_least, self.limit
        return low - TOLERANCE * abs(low), high + TOLERANCE * abs(high)


class Budget(NamedTuple):
    """Limits that one configuration shall keep all at once.

    Attributes:
        name: of the budget.
        limits: one or more; the first is what searches take for the price.
    """

    name: str
    limits: tuple[Limit, ...]


class Found(NamedTuple):
    """A configuration that a search found for a budget.

    Attributes:
        budget: its name.
        bits: the configuration.
        costs: by the name of the limit.
        score: how the search scored it; on which images, the search decides. NaN: it did not.
    """

    budget: str
    bits: BitConfig
    costs: dict[str, float]
    score: float


class Step(NamedTuple):
    """A step of a search, for those who watch it.

    Attributes:
        phase: what the search is doing, such as "weights" or "generation 3".
        change: what it changed: "conv1 weights 3".
        cost: of the configuration after it, by the budget's first limit.
        score: of that configuration.
    """

    phase: str
    change: str
    cost: float
    score: float


Watch = Callable[[Step], None]


def nobody(step: Step) -> None:
    """Watches a search and does nothing."""


class Space:
    """The states that a mask and the ties of a table allow."""

    def __init__(self, table: LayerTable, candidates: Sequence[int], mask: np.ndarray):
        """Checks and takes what is searched.

        Args:
            table: the layers.
            candidates: bits of each choice, `table.candidates`.
            mask: bool [layers, 2, choices], what may be chosen (normally `table.mask`).

        Raises:
            ValueError: they do not fit together, or nothing is left of an entry.
        """
        if tuple(candidates) != table.candidates or mask.shape != table.mask.shape:
            raise ValueError(
                f"the candidates are {tuple(candidates)} and the mask has shape {mask.shape}; "
                f"the table has {table.candidates} and {table.mask.shape}"
            )
        self.table, self.group_leaders = table, table.group_leaders
        flat = (mask & table.mask).reshape(-1, len(candidates))
        together = np.ones_like(flat)
        np.logical_and.at(together, self.group_leaders.ravel(), flat)
        self.mask = together[self.group_leaders]
        empty = [table.names[i] for i in np.flatnonzero(~self.mask.any(-1).all(-1))]
        if empty:
            raise ValueError(f"the mask leaves no bits to {', '.join(empty)}")
        choices = self.mask.sum(-1).ravel()
        # Entries that can be moved, each as 2 * layer + column.
        self.genes = [int(entry) for entry in np.unique(self.group_leaders) if choices[entry] > 1]
        self._choices = {
            gene: np.flatnonzero(self.mask.reshape(flat.shape)[gene]) for gene in self.genes
        }
        self._followers = {gene: self.group_leaders == gene for gene in self.genes}

    def choices(self, gene: int) -> np.ndarray:
        """Returns the choices that a gene may take, most bits first."""
        return self._choices[gene]

    def followers(self, gene: int) -> np.ndarray:
        """Returns which entries a gene moves: bool [layers, 2]."""
        return self._followers[gene]

    def column(self, gene: int) -> int:
        """Returns `WEIGHTS` for a gene that moves weights, else `ACTS`."""
        return WEIGHTS if self.followers(gene)[:, WEIGHTS].any() else ACTS

    def moved(self, state: np.ndarray, gene: int, choice: int | np.integer) -> np.ndarray:
        """Returns a state with another choice of one gene."""
        return np.where(self.followers(gene), choice, state)

    def neighbors(self, state: np.ndarray, genes: Sequence[int] | None = None) -> np.ndarray:
        """Returns the states with one gene a choice lower, or higher: [neighbors, layers, 2].

        Args:
            state: where to start from.
            genes: which ones may move; None: all.
        """
        found = []
        for gene in self.genes if genes is None else genes:
            choices = self.choices(gene)
            place = int(np.searchsorted(choices, state[gene // 2, gene % 2]))
            for other in (place + 1, place - 1):
                if 0 <= other < len(choices):
                    found.append(self.moved(state, gene, int(choices[other])))
        return np.array(found, np.int64).reshape(-1, *state.shape)

    def uniform(self, wanted: int) -> np.ndarray:
        """Returns the state of the allowed bits nearest to the wanted, the higher of two."""
        distance = np.abs(np.array(self.table.candidates) - wanted)
        return np.where(self.mask, distance, np.iinfo(np.int64).max).argmin(-1)

    def largest(self) -> np.ndarray:
        """Returns the state of the most bits everywhere."""
        return self.mask.argmax(-1)

    def drawn(self, generator: np.random.Generator) -> np.ndarray:
        """Returns a state whose genes are drawn uniformly."""
        state = self.largest()
        for gene in self.genes:
            state = self.moved(state, gene, int(generator.choice(self.choices(gene))))
        return state

    def state_of(self, bits: BitConfig) -> np.ndarray:
        """Returns the state of a configuration."""
        both = np.stack([np.asarray(bits.weights), np.asarray(bits.acts)], axis=-1)
        return (both[..., None] == np.array(self.table.candidates)).argmax(-1)

    def config(self, states: np.ndarray) -> BitConfig:
        """Returns the bits of states, [..., layers, 2]."""
        bits = np.array(self.table.candidates, np.int32)[states]
        return BitConfig(jnp.asarray(bits[..., WEIGHTS]), jnp.asarray(bits[..., ACTS]))

    def change(self, before: np.ndarray, after: np.ndarray) -> str:
        """Returns in words what differs between two states."""
        return ", ".join(
            f"{self.table.names[gene // 2]} {('weights', 'acts')[gene % 2]} "
            f"{self.table.candidates[after[gene // 2, gene % 2]]}"
            for gene in self.differing(before, after)
        )

    def differing(self, one: np.ndarray, other: np.ndarray) -> list[int]:
        """Returns the genes in which two states differ."""
        differs = (one != other).ravel()
        return [gene for gene in self.genes if differs[gene]]


def cost_of(cost: np.ndarray, states: np.ndarray) -> Any:
    """Returns what states, [..., layers, 2], cost by a table: [...]."""
    rows = np.arange(len(cost))
    return cost[rows, states[..., WEIGHTS], states[..., ACTS]].sum(-1)


def excess(budget: Budget, states: np.ndarray) -> Any:
    """Returns by how much states exceed a budget: 0 within it; relative, summed over limits."""
    over = np.zeros(states.shape[:-2])
    for limit in budget.limits:
        low, high = limit.bounds
        cost = cost_of(limit.cost, states)
        size = next((abs(b) for b in (limit.limit, limit.at_least) if 0 < abs(b) < math.inf), 1.0)
        most, high = (min(b, sys.float_info.max) for b in (limit.limit, high))  # inf: not allowed
        over = over + np.where(cost > high, cost - most, 0) / size
        if low > -math.inf:
            over = over + np.where(cost < low, limit.at_least - cost, 0) / size
    return over


def price(budget: Budget, states: np.ndarray) -> Any:
    """Returns what states cost by the first limit of a budget, as a part of that limit."""
    first = budget.limits[0]
    size = abs(first.limit) if 0 < abs(first.limit) < math.inf else 1.0
    return cost_of(first.cost, states) / size


def first_cost(budget: Budget, state: np.ndarray) -> float:
    """Returns what a state costs by the first limit of a budget."""
    return float(cost_of(budget.limits[0].cost, state))


def tightest_last(budgets: Sequence[Budget]) -> list[Budget]:
    """Returns budgets in the order in which a descent meets them."""
    return sorted(budgets, key=lambda budget: -budget.limits[0].limit)


def result(space: Space, budget: Budget, state: np.ndarray, score: float) -> Found:
    """Returns a state as what a search found for a budget."""
    costs = {limit.name: float(cost_of(limit.cost, state)) for limit in budget.limits}
    return Found(budget.name, space.config(state), costs, float(score))


def scored(
    score: Score, space: Space, states: np.ndarray | Sequence[np.ndarray], key: Key[Array, ""]
) -> np.ndarray:
    """Returns the scores of states in float64; what is no number is infinitely bad."""
    values = np.asarray(score(space.config(np.asarray(states)), key), np.float64)
    return np.where(np.isfinite(values), values, np.inf)


def rises(scores: np.ndarray, now: float) -> np.ndarray:
    """Returns by how much scores are above one; what has none rises without end."""
    return scores - (now if np.isfinite(now) else 0.0)


def in_order(budgets: Sequence[Budget], found: dict[str, Found]) -> list[Found]:
    """Returns what was found in the order of the budgets."""
    return [found[budget.name] for budget in budgets]


def words_of(key: Key[Array, ""]) -> tuple[int, ...]:
    """Returns the words of a random key, for what has to be drawn on the host."""
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def keys(key: Key[Array, ""]) -> Iterator[Key[Array, ""]]:
    """Yields one key after another."""
    count = 0
    while True:
        yield jax.random.fold_in(key, count)
        count += 1


def on_drawn_images(
    score: Callable[[BitConfig, Array, Array], Any], images: Array, labels: Array, *, size: int
) -> Score:
    """Turns a score of images into `score(configs, key)`: the key draws the images.

    Args:
        score: from `scoring.make_score` or `prefix_scoring.make_fast_score`.
        images: normalized, to draw from without replacement.
        labels: theirs.
        size: how many to draw.
    """
    if not 1 <= size <= len(images):
        raise ValueError(f"size is {size}; there are {len(images)} images to draw from")

    @functools.lru_cache(maxsize=1)  # most searches score everything with one key
    def drawn(words: tuple[int, ...]) -> tuple[Array, Array]:
        chosen = np.random.default_rng(words).choice(len(images), size, replace=False)
        return images[chosen], labels[chosen]

    return lambda configs, key: score(configs, *drawn(words_of(key)))

"""Budgets, constraints and results: what all search strategies share.

A strategy is a function

    strategy(score, space, budgets, key, *, <its own options>, on_step=ignore) -> list[SearchResult]

    score: `Score`; strategies that compare all configurations on the same images use `key` for
        every call, others derive keys from it.
    space: `SearchSpace`, the configurations that may be visited.
    budgets: one or more `Budget`s; `ilp.check_budgets` tells beforehand whether they can be met.
    key: random key. Equal keys and equal scores give equal results.
    on_step: called with a `Step` after every step.

and returns one result for each budget, in the order of the budgets. It raises ValueError if a
budget cannot be met. `strategies.STRATEGIES` lists them by name.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from mpq_jax.search.space import SearchSpace
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.costs import layer_costs

Score = Callable[[BitConfig, Key[Array, ""]], Float[Any, " configs"]]
"""`score(configs, key)`: one number per configuration, smaller is better. The key decides on the
images: configurations are comparable if they were scored with the same key."""

TOLERANCE = 1e-6  # relative, of constraints: their limits often are costs summed in float32


class Constraint(NamedTuple):
    """Bounds on a sum over layers, kept to a relative `TOLERANCE`.

    Attributes:
        name: name of the bounded cost, such as "bitops"; unique within a budget.
        cost: float64 [layers, weight choices, activation choices] in the order of
            `table.candidates`, as from `costs.cost_table`; infinity: not allowed.
        limit: largest cost of a configuration.
        lower_bound: smallest cost. The Double Rounding paper fixes the mean bits, that is, both.
        unit: unit of the cost, for messages.
    """

    name: str
    cost: np.ndarray
    limit: float
    lower_bound: float = -math.inf
    unit: str = ""

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest cost that satisfy the constraint."""
        low, high = self.lower_bound, self.limit
        return low - TOLERANCE * abs(low), high + TOLERANCE * abs(high)


class Budget(NamedTuple):
    """Constraints that one configuration has to satisfy together.

    Attributes:
        name: name of the budget.
        constraints: one or more; the first is the one that searches trade against the score.
    """

    name: str
    constraints: tuple[Constraint, ...]


class SearchResult(NamedTuple):
    """The configuration that a strategy found for a budget.

    Attributes:
        budget: name of the budget.
        bits: the configuration.
        costs: cost by name of the constraint.
        score: score on the images that the strategy chose; NaN: it was not scored.
    """

    budget: str
    bits: BitConfig
    costs: dict[str, float]
    score: float


class Step(NamedTuple):
    """A step of a search, as it is reported while the search runs.

    Attributes:
        phase: current phase, such as "weights" or "generation 3".
        change: what the step changed: "conv1 weights 3".
        cost: cost of the configuration after the step, by the budget's first constraint.
        score: score of that configuration.
    """

    phase: str
    change: str
    cost: float
    score: float


OnStep = Callable[[Step], None]


def ignore(step: Step) -> None:
    """Does nothing with a step."""


def total_cost(cost: np.ndarray, choices: np.ndarray) -> Any:
    """Returns the cost of choices, [..., layers, 2], by a table of costs: [...]."""
    return layer_costs(cost, choices).sum(-1)


def violation(budget: Budget, choices: np.ndarray) -> Any:
    """Returns by how much choices violate a budget: relative, summed over constraints; 0: met."""
    total = np.zeros(choices.shape[:-2])
    for constraint in budget.constraints:
        limit, lower_bound = constraint.limit, constraint.lower_bound
        low, high = constraint.bounds
        cost = total_cost(constraint.cost, choices)
        size = next((abs(b) for b in (limit, lower_bound) if 0 < abs(b) < math.inf), 1.0)
        # A cost of infinity is not allowed, so it violates a limit of infinity, too.
        limit, high = min(limit, sys.float_info.max), min(high, sys.float_info.max)
        total = total + np.where(cost > high, cost - limit, 0) / size
        if low > -math.inf:
            total = total + np.where(cost < low, lower_bound - cost, 0) / size
    return total


def relative_cost(budget: Budget, choices: np.ndarray) -> Any:
    """Returns the cost of choices by a budget's first constraint, relative to its limit."""
    first = budget.constraints[0]
    size = abs(first.limit) if 0 < abs(first.limit) < math.inf else 1.0
    return total_cost(first.cost, choices) / size


def first_cost(budget: Budget, choices: np.ndarray) -> float:
    """Returns the cost of a configuration by a budget's first constraint."""
    return float(total_cost(budget.constraints[0].cost, choices))


def largest_first(budgets: Sequence[Budget]) -> list[Budget]:
    """Returns budgets in the order in which a descent meets them."""
    return sorted(budgets, key=lambda budget: -budget.constraints[0].limit)


def in_order_of(budgets: Sequence[Budget], results: Sequence[SearchResult]) -> list[SearchResult]:
    """Returns results in the order of their budgets."""
    by_name = {result.budget: result for result in results}
    return [by_name[budget.name] for budget in budgets]


def make_result(
    space: SearchSpace, budget: Budget, choices: np.ndarray, score: float
) -> SearchResult:
    """Returns choices as the result for a budget."""
    found = {one.name: float(total_cost(one.cost, choices)) for one in budget.constraints}
    return SearchResult(budget.name, space.bits_of(choices), found, float(score))


def score_choices(
    score: Score,
    space: SearchSpace,
    choices: np.ndarray | Sequence[np.ndarray],
    key: Key[Array, ""],
) -> np.ndarray:
    """Returns the scores of choices, [configs, layers, 2], in float64; non-finite become +inf."""
    values = np.asarray(score(space.bits_of(np.asarray(choices)), key), np.float64)
    return np.where(np.isfinite(values), values, np.inf)


def score_increase(scores: np.ndarray, current: float) -> np.ndarray:
    """Returns how much larger scores are than the current one; an infinite one counts as 0."""
    return scores - (current if np.isfinite(current) else 0.0)


def same_bits(one: BitConfig, other: BitConfig) -> bool:
    """Returns whether two configurations are equal."""
    pairs = zip(one, other, strict=True)
    return all(np.array_equal(np.asarray(mine), np.asarray(theirs)) for mine, theirs in pairs)


def seed_words(key: Key[Array, ""]) -> tuple[int, ...]:
    """Returns the words of a random key, to seed a generator on the host."""
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def key_sequence(key: Key[Array, ""]) -> Iterator[Key[Array, ""]]:
    """Yields keys derived from one key, without end."""
    count = 0
    while True:
        yield jax.random.fold_in(key, count)
        count += 1

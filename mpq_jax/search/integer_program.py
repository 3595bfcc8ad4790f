"""Chooses the bits of all layers at once: a 0/1 integer program, solved exactly.

A layer takes one pair (weight bits, activation bits); objective and costs are tables of what each
layer adds at each pair, so any sum over layers can be minimized or bounded.

References:
    Double Rounding, https://arxiv.org/abs/2502.01565, iterative ILP (listing many solutions).
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import LinearConstraint

from mpq_jax.search import milp
from mpq_jax.search.problem import Constraint
from mpq_jax.search.space import COLUMN_NAMES, SearchSpace
from mpq_jax.supernet.costs import layer_costs

# HiGHS takes 1e-6 for zero, in gaps of the objective and in rows. The largest step of one layer is
# scaled to these numbers, so that what it neglects is 1e-12 and 1e-9 of that step.
OBJECTIVE_SIZE, ROW_SIZE = 1e6, 1e3
ROW_MARGIN = 1e-6  # rows are this much wider: HiGHS drops no solution, what is too much we drop


class Solution(NamedTuple):
    """A configuration that satisfies all constraints.

    Attributes:
        choices: int [layers, 2], see `space`.
        objective: sum over layers of the objective's entries.
        costs: cost by name of the constraint.
    """

    choices: np.ndarray
    objective: float
    costs: dict[str, float]


def solve(
    space: SearchSpace,
    objective: np.ndarray,
    constraints: Sequence[Constraint],
    *,
    count: int = 1,
) -> list[Solution]:
    """Returns the configuration of the least objective within all constraints, and the next best.

    Solutions differ in some layer's bits; those of equal objective come in any order. Objectives
    are told apart down to 1e-12 of the largest difference that one layer makes, where gaps count
    for no more than twice what all other layers make together.

    Args:
        space: the configurations.
        objective: float64 [layers, weight choices, activation choices], whose sum is minimized;
            infinity: not allowed.
        constraints: one or more.
        count: number of solutions; fewer are returned if there are no more.

    Raises:
        ValueError: the inputs are malformed, a layer has no pair left, or no configuration
            satisfies the constraints.
        RuntimeError: the solver failed.
    """
    if count < 1:
        raise ValueError(f"count is {count}; wanted at least 1")
    _check_constraints(constraints)
    tables = {"objective": objective} | {one.name: one.cost for one in constraints}
    pairs = _permitted(space, tables)
    found: list[Solution] = []
    for choices in _best_first(space, objective, constraints, pairs):
        costs = {one.name: _total(one.cost, choices) for one in constraints}
        found.append(Solution(choices, _total(objective, choices), costs))
        if len(found) == count:
            break
    if not found:
        raise ValueError(_why_none(space, constraints, pairs))
    return sorted(found, key=lambda solution: solution.objective)


def reachable_costs(space: SearchSpace, cost: np.ndarray) -> tuple[float, float]:
    """Returns the smallest and the largest cost of any configuration.

    Args:
        space: the configurations.
        cost: float64 [layers, weight choices, activation choices]; infinity: not allowed.
    """
    return _range(space, cost, space.pairs & np.isfinite(cost))


def _range(space: SearchSpace, cost: np.ndarray, pairs: np.ndarray) -> tuple[float, float]:
    ends = []
    for sign in (1, -1):
        objective = np.where(pairs, sign * cost, np.inf)
        ends.append(_total(cost, next(_best_first(space, objective, [], pairs))))
    return ends[0], ends[1]


def _best_first(
    space: SearchSpace, objective: np.ndarray, constraints: Sequence[Constraint], pairs: np.ndarray
) -> Iterator[np.ndarray]:
    """Yields all choices that satisfy the constraints, the least objective first."""
    # One variable for each permitted pair of each layer: 1 if the layer takes it.
    layer, weights, acts = np.nonzero(pairs)
    one_each = layer == np.arange(len(pairs))[:, None]
    rows = [LinearConstraint(one_each.astype(np.float64), 1, 1)]
    rows += [_row(one, pairs) for one in constraints]
    rows += _ties(space, layer, np.stack([weights, acts]))
    scaled = _scaled(_without_gaps(objective, pairs), pairs, OBJECTIVE_SIZE)[0][pairs]
    while (values := milp.minimize(scaled, rows, relative_gap=0.0)) is not None:
        # The solver's values are ones and zeros but for rounding.
        taken = np.zeros(pairs.shape)
        taken[layer, weights, acts] = values
        places = taken.reshape(len(pairs), -1).argmax(1)
        choices = np.stack(np.unravel_index(places, pairs.shape[1:]), axis=-1)
        same = (choices[layer] == np.stack([weights, acts], axis=-1)).all(-1)
        rows.append(LinearConstraint(same.astype(np.float64), -np.inf, len(pairs) - 1))
        if all(_satisfies(one, choices) for one in constraints):
            yield choices


def _without_gaps(objective: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Narrows gaps within a layer that no other choice can make up for, which keeps every order.

    Otherwise, one huge entry would be the scale on which all others vanish. A gap decides between
    two configurations by itself where it exceeds what all other layers can differ by.
    """
    narrowed = objective.astype(np.float64)
    ranges = np.array([np.ptp(row[allowed]) for row, allowed in zip(narrowed, pairs, strict=True)])
    for layer in np.argsort(-ranges):
        others = math.fsum(np.delete(ranges, layer))
        if not 0 < others < ranges[layer]:
            continue
        values, places = np.unique(narrowed[layer][pairs[layer]], return_inverse=True)
        gaps = np.minimum(np.diff(values), 2 * others)
        narrowed[layer][pairs[layer]] = (values[0] + np.cumsum([0, *gaps]))[places]
        ranges[layer] = gaps.sum()
    return narrowed


def _row(constraint: Constraint, pairs: np.ndarray) -> LinearConstraint:
    row, least, unit = _scaled(constraint.cost, pairs, ROW_SIZE)
    # A row sums up to 0 at least and `most` at most: clipping only tames numbers beyond.
    most = ROW_SIZE * len(pairs)
    low, high = np.clip(np.array(constraint.bounds) - least, -unit, (most + 1) * unit) / unit
    return LinearConstraint(row[pairs], low - ROW_MARGIN, high + ROW_MARGIN)


def _ties(space: SearchSpace, layer: np.ndarray, choices: np.ndarray) -> list[LinearConstraint]:
    """Returns rows that give tied entries of different layers the same choice.

    Args:
        space: the configurations.
        layer: the layer of each variable of the program.
        choices: its choice of weights, and of the input: [2, variables].
    """
    rows = []
    for leader in space.variables:
        for member in np.argwhere(space.members(leader)).tolist():
            if member[0] == leader[0]:
                continue  # of one layer: its pairs are equal bits already
            for choice in space.allowed(leader):
                leading, tied = (
                    ((layer == index) & (choices[column] == choice)).astype(np.float64)
                    for index, column in (leader, member)
                )
                rows.append(LinearConstraint(tied - leading, 0, 0))
    return rows


def _scaled(cost: np.ndarray, pairs: np.ndarray, size: float) -> tuple[np.ndarray, float, float]:
    """Returns (cost - layer's least) / unit, which is at most `size`; the sum of least; unit."""
    least = np.where(pairs, cost, np.inf).min((1, 2), keepdims=True)
    above = np.where(pairs, cost, least) - least
    unit = float(above.max() or size) / size
    return above / unit, math.fsum(least.flat), unit


def _satisfies(constraint: Constraint, choices: np.ndarray) -> bool:
    low, high = constraint.bounds
    return low <= _total(constraint.cost, choices) <= high


def _total(cost: np.ndarray, choices: np.ndarray) -> float:
    return math.fsum(layer_costs(cost, choices))


def _check_constraints(constraints: Sequence[Constraint]) -> None:
    names = [one.name for one in constraints]
    if not constraints or len({"objective", *names}) <= len(names):
        raise ValueError(
            f"the constraints are {names}; give one or more, each with a name of its own"
        )
    for name, _, high, low, _ in constraints:
        if not (low <= high and low < math.inf and high > -math.inf):
            raise ValueError(f"{name} should be {low} to {high}; wanted two numbers in order")


def _permitted(space: SearchSpace, tables: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the pairs that the space and all tables allow.

    Raises:
        ValueError: a table is malformed, or leaves nothing to some layer.
    """
    for name, values in tables.items():
        if values.shape != space.pairs.shape or values.dtype == bool:
            raise ValueError(
                f"{name} is {values.dtype} {values.shape}; wanted numbers of shape "
                f"{space.pairs.shape} (layers, weight choices, activation choices)"
            )
        if (bad := space.pairs & (np.isnan(values) | (values == -np.inf))).any():
            raise ValueError(
                f"{name} is NaN or -inf where bits are allowed, in {_named(space, bad)}; use inf "
                "for pairs that may not be chosen"
            )
    left = np.logical_and.reduce([space.pairs, *map(np.isfinite, tables.values())])
    empty = space.pairs & ~left.any((1, 2), keepdims=True)
    if empty.any():
        blamed = [name for name, values in tables.items() if (empty & np.isinf(values)).any()]
        raise ValueError(
            f"no pair of bits is left for {_named(space, empty)}: all that the rules allow is "
            f"forbidden by {', '.join(blamed)}"
        )
    return left


def _named(space: SearchSpace, which: np.ndarray) -> str:
    """Returns the names of the layers with a True among their pairs."""
    return ", ".join(repr(space.table.names[i]) for i in np.flatnonzero(which.any((1, 2))))


def _why_none(space: SearchSpace, constraints: Sequence[Constraint], pairs: np.ndarray) -> str:
    """Explains why no configuration satisfies the constraints."""
    anything = np.zeros(pairs.shape)

    def possible(some: Sequence[Constraint]) -> bool:
        return next(_best_first(space, anything, some, pairs), None) is not None

    if not possible([]):
        return f"tied {' or '.join(COLUMN_NAMES)} have no bits in common that all tables allow"
    hopeless = [one.name for one in constraints if len(constraints) == 1 or not possible([one])]
    reason = "each can be met alone, but not all together"
    if hopeless:
        reason = f"{', '.join(hopeless)} cannot be met"
    ranges = "; ".join(_describe_range(space, one, pairs) for one in constraints)
    return f"no configuration is within the budget: {reason}; {ranges}"


def _describe_range(space: SearchSpace, constraint: Constraint, pairs: np.ndarray) -> str:
    low, high = _range(space, constraint.cost, pairs)
    least = np.where(pairs, constraint.cost, np.inf).min((1, 2))
    largest = ", ".join(
        f"{space.table.names[i]} ({least[i]:.4g})" for i in np.argsort(-least, kind="stable")[:3]
    )
    unit = f" {constraint.unit}" if constraint.unit else ""
    return (
        f"{constraint.name} should be {constraint.lower_bound:.6g} to {constraint.limit:.6g}{unit} "
        f"and the reachable range is {low:.6g} to {high:.6g}{unit}; at the low end the largest "
        f"parts are {largest}"
    )

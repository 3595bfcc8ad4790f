"""Chooses the bits of all layers at once: a 0/1 integer program, solved exactly by HiGHS.

A layer takes one pair (weight bits, activation bits); objective and costs are tables of what each
layer adds at each pair, so any sum over layers can be minimized or bounded. `solve` lists the best
solutions without evaluating anything; `search` measures the objective, and the best solutions.

References:
    Dong et al., HAWQ-V2, NeurIPS 2020, https://arxiv.org/abs/1911.03852 (the objective).
    Double Rounding, https://arxiv.org/abs/2502.01565, iterative ILP (listing many solutions).
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key
from scipy.optimize import Bounds, LinearConstraint, milp

from mpq_jax.search import objectives
from mpq_jax.search import problem as spaces
from mpq_jax.search.problem import Budget, Found, Limit, Score, Space, Step, Watch
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.costs import allowed_pairs
from mpq_jax.supernet.layer_table import LayerTable

# HiGHS takes 1e-6 for zero, in gaps of the objective and in rows. The largest step of one layer is
# scaled to these numbers, so that what it neglects is 1e-12 and 1e-9 of that step.
OBJECTIVE_SIZE, ROW_SIZE = 1e6, 1e3
ROW_MARGIN = 1e-6  # rows are this much wider: HiGHS drops no solution, what is too much we drop
INFEASIBLE = 2  # status of scipy.optimize.milp


class Solution(NamedTuple):
    """A configuration within all limits.

    Attributes:
        bits: int32 [layers] for weights and for activations.
        objective: sum over layers of the objective's entries.
        costs: name of the limit -> its cost.
    """

    bits: BitConfig
    objective: float
    costs: dict[str, float]


def search(
    score: Score,
    table: LayerTable,
    candidates: Sequence[int],
    mask: np.ndarray,
    budgets: Sequence[Budget],
    key: Key[Array, ""],
    *,
    objective: np.ndarray | None = None,
    solutions: int = 8,
    watch: Watch = spaces.nobody,
) -> list[Found]:
    """Solves a program per budget and returns the best scored of its best solutions.

    Args:
        score: see `space.Score`; all is scored with one key.
        table: the layers.
        candidates: bits of each choice, `table.candidates`.
        mask: bool [layers, 2, choices], what may be chosen (normally `table.mask`).
        budgets: what to keep within.
        key: random key.
        objective: float64 [layers, weight choices, activation choices] to minimize the sum of, such
            as `objectives.hawq`; None: how much the score rises if one entry alone is lowered from
            the largest configuration, measured here.
        solutions: how many of the best are scored, by budget; 1: none is.
        watch: called after every budget.

    Returns:
        One configuration per budget, in their order.

    Raises:
        ValueError: a budget cannot be met, or the inputs are malformed.
    """
    space = Space(table, candidates, mask)
    check(space, budgets)
    if objective is None:
        rises = objectives.measured_rises(score, space, key)
        objective = objectives.additive(space, rises)
    found = {}
    for budget in budgets:
        best = solve(table, objective, budget.limits, allowed=pairs_of(space), count=solutions)
        states = [space.state_of(one.bits) for one in best]
        scores = np.full(1, np.nan)
        if len(states) > 1:
            scores = spaces.scored(score, space, states, key)
        place = int(np.argmin(scores))
        found[budget.name] = spaces.result(space, budget, states[place], scores[place])
        cost = found[budget.name].costs[budget.limits[0].name]
        watch(Step("program", f"solution {place + 1} of {len(best)}", cost, float(scores[place])))
    return spaces.in_order(budgets, found)


def pairs_of(space: Space) -> np.ndarray:
    """Returns the pairs of bits that a space allows: bool [layers, choices, choices]."""
    return allowed_pairs(space.table) & space.mask[:, 0, :, None] & space.mask[:, 1, None, :]


def check(space: Space, budgets: Sequence[Budget]) -> None:
    """Raises ValueError for budgets out of reach, naming the range and what holds it there."""
    names = [budget.name for budget in budgets]
    if not budgets or len(set(names)) < len(names):
        raise ValueError(f"the budgets are {names}; give one or more, each with a name of its own")
    anything = np.zeros(pairs_of(space).shape)
    for budget in budgets:
        try:
            solve(space.table, anything, budget.limits, allowed=pairs_of(space))
        except ValueError as error:
            raise ValueError(f"{budget.name}: {error}") from error


def nearest(space: Space, budget: Budget, state: np.ndarray) -> np.ndarray:
    """Returns the state within a budget that differs in the fewest entries."""
    own = np.eye(space.mask.shape[-1])[state]  # [layers, 2, choices]
    differing = 2.0 - own[:, 0, :, None] - own[:, 1, None, :]
    (best,) = solve(space.table, differing, budget.limits, allowed=pairs_of(space))
    return space.state_of(best.bits)


def solve(
    table: LayerTable,
    objective: np.ndarray,
    limits: Sequence[Limit],
    *,
    allowed: np.ndarray | None = None,
    count: int = 1,
    within: float = math.inf,
) -> list[Solution]:
    """Returns the configuration of the least objective within all limits, and the next best.

    Solutions differ in some layer's bits; those of equal objective come in any order. Objectives
    are told apart down to 1e-12 of the largest difference that one layer makes.

    Args:
        table: the layers.
        objective: float64 [layers, weight choices, activation choices] to minimize the sum of;
            infinity: not allowed.
        limits: one or more.
        allowed: bool of that shape, besides what rules and ties of the table forbid; None: all.
        count: how many solutions are wanted; fewer are returned if there are no more.
        within: the list ends before an objective above `best + within * abs(best)`, where best is
            that of the first solution.

    Raises:
        ValueError: the inputs are malformed, a layer has no pair left, or no configuration is
            within the limits.
        RuntimeError: the solver failed.
    """
    if count < 1 or not within >= 0:
        raise ValueError(f"count is {count} and within is {within}; wanted >= 1 and >= 0")
    _check_bounds(limits)
    tables = {"objective": objective} | {limit.name: limit.cost for limit in limits}
    pairs = _permitted(table, tables, allowed)
    found: list[Solution] = []
    for choice in _in_order(table, objective, limits, pairs):
        value = _total(objective, choice)
        best = found[0].objective if found else value
        if within < math.inf and value > best + within * abs(best):
            break
        costs = {limit.name: _total(limit.cost, choice) for limit in limits}
        found.append(Solution(_config(table, choice), value, costs))
        if len(found) == count:
            break
    if not found:
        raise ValueError(_why_none(table, limits, pairs))
    return sorted(found, key=lambda solution: solution.objective)


def _in_order(
    table: LayerTable, objective: np.ndarray, limits: Sequence[Limit], pairs: np.ndarray
) -> Iterator[np.ndarray]:
    """Yields every choice within the limits, as places [layers] in a layer's flattened pairs."""
    layer, pair = np.nonzero(pairs.reshape(len(pairs), -1))
    one_each = layer == np.arange(len(pairs))[:, None]
    constraints = [LinearConstraint(one_each.astype(np.float64), 1, 1)]
    constraints += [_row(limit, pairs) for limit in limits]
    constraints += _ties(table, layer, pair)
    to_minimize = _scaled(objective, pairs, OBJECTIVE_SIZE)[0][pairs]
    while True:
        result = milp(
            to_minimize,
            integrality=np.ones_like(to_minimize),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0},
        )
        if result.status == INFEASIBLE:
            return
        if not result.success:
            raise RuntimeError(f"the integer program was not solved: {result.message}")
        values = np.zeros((len(pairs), pairs[0].size))
        values[layer, pair] = result.x
        choice = values.argmax(1)
        taken = (pair == choice[layer]).astype(np.float64)
        constraints.append(LinearConstraint(taken, -np.inf, len(pairs) - 1))  # not all of it again
        if all(_meets(limit, choice) for limit in limits):
            yield choice


def _row(limit: Limit, pairs: np.ndarray) -> LinearConstraint:
    row, least, unit = _scaled(limit.cost, pairs, ROW_SIZE)
    # A row sums up to 0 at least and `most` at most: clipping only tames numbers beyond.
    most = ROW_SIZE * len(pairs)
    low, high = np.clip(np.array(limit.bounds) - least, -unit, (most + 1) * unit) / unit
    return LinearConstraint(row[pairs], low - ROW_MARGIN, high + ROW_MARGIN)


def _ties(table: LayerTable, layer: np.ndarray, pair: np.ndarray) -> list[LinearConstraint]:
    """Returns rows that give tied entries of different layers the same choice."""
    choices = np.stack(np.divmod(pair, len(table.candidates)))  # of weights, of the input
    rows = []
    for group in table.tied_groups:
        for entry in group[1:]:
            if entry // 2 == group[0] // 2:
                continue  # of one layer: its pairs are equal bits already
            for choice in range(len(table.candidates)):
                chosen, leading = (
                    (layer == one // 2) & (choices[one % 2] == choice) for one in (entry, group[0])
                )
                rows.append(LinearConstraint(chosen.astype(float) - leading, 0, 0))
    return rows


def _scaled(cost: np.ndarray, pairs: np.ndarray, size: float) -> tuple[np.ndarray, float, float]:
    """Returns (cost - layer's least) / unit, which is at most `size`; the sum of least; unit."""
    least = np.where(pairs, cost, np.inf).min((1, 2), keepdims=True)
    above = np.where(pairs, cost, least) - least
    unit = float(above.max() or size) / size
    return above / unit, math.fsum(least.flat), unit


def _meets(limit: Limit, choice: np.ndarray) -> bool:
    low, high = limit.bounds
    return low <= _total(limit.cost, choice) <= high


def _total(cost: np.ndarray, choice: np.ndarray) -> float:
    return math.fsum(cost.reshape(len(cost), -1)[np.arange(len(cost)), choice])


def _config(table: LayerTable, choice: np.ndarray) -> BitConfig:
    choices = np.divmod(choice, len(table.candidates))
    return BitConfig(*jnp.asarray(table.candidates, jnp.int32)[np.stack(choices)])


def _check_bounds(limits: Sequence[Limit]) -> None:
    names = [limit.name for limit in limits]
    if not limits or len({"objective", *names}) <= len(names):
        raise ValueError(f"the limits are {names}; give one or more, each with a name of its own")
    for name, _, high, low in limits:
        if not (low <= high and low < math.inf and high > -math.inf):
            raise ValueError(f"{name} should be {low} to {high}; wanted two numbers in order")


def _permitted(
    table: LayerTable, tables: dict[str, np.ndarray], allowed: np.ndarray | None
) -> np.ndarray:
    """Returns the pairs that everything allows; raises ValueError where a table is no such table.

    A layer of which nothing is left is an error, too, that says which table forbids its pairs.
    """
    rules = allowed_pairs(table)
    for name, values in (tables if allowed is None else {"allowed": allowed} | tables).items():
        if values.shape != rules.shape or (values.dtype == bool) != (name == "allowed"):
            raise ValueError(
                f"{name} is {values.dtype} {values.shape}; wanted {rules.shape} (layers, weight "
                "choices, activation choices), bool for allowed and numbers for the others"
            )
    asked = rules if allowed is None else rules & allowed
    for name, values in tables.items():
        if (bad := asked & (np.isnan(values) | (values == -np.inf))).any():
            raise ValueError(
                f"{name} is NaN or -inf where bits are allowed, in {_named(table, bad)}; inf is "
                "for pairs that may not be chosen"
            )
    left = np.logical_and.reduce([asked, *(np.isfinite(values) for values in tables.values())])
    empty = rules & ~left.any((1, 2), keepdims=True)
    if empty.any():
        forbidden = {"allowed": ~asked}
        forbidden |= {name: asked & np.isinf(values) for name, values in tables.items()}
        blamed = [name for name, pairs in forbidden.items() if (empty & pairs).any()]
        raise ValueError(
            f"no pair of bits is left for {_named(table, empty)}: all that the rules allow is "
            f"forbidden by {', '.join(blamed)}"
        )
    return left


def _named(table: LayerTable, which: np.ndarray) -> str:
    """Returns the names of the layers with a True among their pairs."""
    return ", ".join(repr(table.names[index]) for index in np.flatnonzero(which.any((1, 2))))


def _why_none(table: LayerTable, limits: Sequence[Limit], pairs: np.ndarray) -> str:
    any_order = np.zeros(pairs.shape)
    if next(_in_order(table, any_order, [], pairs), None) is None:
        return "tied bits have no choice in common that all of the tables allow"
    hopeless = [
        limit.name
        for limit in limits
        if len(limits) == 1 or next(_in_order(table, any_order, [limit], pairs), None) is None
    ]
    verdict = "each can be met alone, but not all together"
    if hopeless:
        verdict = f"{', '.join(hopeless)} cannot be met"
    ranges = "; ".join(_range(table, limit, pairs) for limit in limits)
    return f"no configuration is within the budgets: {verdict}; {ranges}"


def _range(table: LayerTable, limit: Limit, pairs: np.ndarray) -> str:
    low, high = reachable(table, limit, pairs)
    least = np.where(pairs, limit.cost, np.inf).min((1, 2))
    held_by = ", ".join(f"{table.names[i]} ({least[i]:.4g})" for i in np.argsort(-least)[:3])
    return (
        f"{limit.name} should be {limit.at_least:.6g} to {limit.limit:.6g} and the reachable "
        f"range is {low:.6g} to {high:.6g}; at the low end the largest parts are {held_by}"
    )


def reachable(table: LayerTable, limit: Limit, pairs: np.ndarray) -> tuple[float, float]:
    """Returns the smallest and the largest cost of any configuration.

    Args:
        table: the layers.
        limit: what counts the cost.
        pairs: bool [layers, choices, choices], what may be chosen.
    """
    unbounded = limit._replace(limit=math.inf, at_least=-math.inf)
    finite = pairs & np.isfinite(limit.cost)
    ends = []
    for sign in (1, -1):
        objective = np.where(finite, sign * limit.cost, np.inf)
        choice = next(_in_order(table, objective, [unbounded], finite))
        ends.append(_total(limit.cost, choice))
    return ends[0], ends[1]

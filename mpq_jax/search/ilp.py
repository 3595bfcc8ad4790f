"""Chooses the bits of all layers at once: a 0/1 integer programme, solved exactly by HiGHS.

A layer takes one pair (weight bits, activation bits); objective and costs are tables of what each
layer adds at each pair, so any sum over layers can be minimised or bounded. Nothing is trained or
evaluated here: `solve` lists the best solutions for a caller to measure.

References:
    Dong et al., HAWQ-V2, NeurIPS 2020, https://arxiv.org/abs/1911.03852 (the objective).
    Double Rounding, https://arxiv.org/abs/2502.01565, iterative ILP (listing many solutions).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike as AnyArray
from jaxtyping import Float
from scipy.optimize import Bounds, LinearConstraint, milp

from mpq_jax.bits import BitConfig
from mpq_jax.costs import allowed_pairs
from mpq_jax.layer_table import LayerTable
from mpq_jax.search.greedy import TOLERANCE

# HiGHS takes 1e-6 for zero, in gaps of the objective and in rows. The largest step of one layer is
# scaled to these numbers, so that what it neglects is 1e-12 and 1e-9 of that step.
OBJECTIVE_SIZE, ROW_SIZE = 1e6, 1e3
ROW_MARGIN = 1e-6  # rows are this much wider: HiGHS drops no solution, what is too much we drop
INFEASIBLE = 2  # status of scipy.optimize.milp


class Budget(NamedTuple):
    """A bound on a sum over layers, kept to a relative `TOLERANCE`.

    Attributes:
        name: of the budget, such as "bitops"; unique in a call.
        cost: float64 [layers, weight choices, activation choices] in the order of
            `table.candidates`, as from `costs.cost_table`; infinity: not allowed.
        limit: largest cost of a configuration.
        at_least: smallest cost. The Double Rounding paper fixes the mean bits, that is, both.
    """

    name: str
    cost: np.ndarray
    limit: float
    at_least: float = -math.inf


class Solution(NamedTuple):
    """A configuration within all budgets.

    Attributes:
        bits: int32 [layers] for weights and for activations.
        objective: sum over layers of the objective's entries.
        costs: name of the budget -> its cost.
    """

    bits: BitConfig
    objective: float
    costs: dict[str, float]


def solve(
    table: LayerTable,
    objective: np.ndarray,
    budgets: Sequence[Budget],
    *,
    allowed: np.ndarray | None = None,
    count: int = 1,
    within: float = math.inf,
) -> list[Solution]:
    """Returns the configuration of the least objective within all budgets, and the next best.

    Solutions differ in some layer's bits; those of equal objective come in any order. Objectives
    are told apart down to 1e-12 of the largest difference that one layer makes.

    Args:
        table: the layers.
        objective: float64 [layers, weight choices, activation choices] to minimise the sum of;
            infinity: not allowed.
        budgets: one or more.
        allowed: bool of that shape, such as `tied(table)`, less what the rules forbid; None: all.
        count: how many solutions are wanted; fewer are returned if there are no more.
        within: the list ends before an objective above `best + within * abs(best)`, where best is
            that of the first solution.

    Raises:
        ValueError: the inputs are malformed, a layer has no pair left, or no configuration is
            within the budgets.
        RuntimeError: the solver failed.
    """
    if count < 1 or not within >= 0:
        raise ValueError(f"count is {count} and within is {within}; wanted >= 1 and >= 0")
    _check_bounds(budgets)
    tables = {"objective": objective} | {budget.name: budget.cost for budget in budgets}
    pairs = _permitted(table, tables, allowed)
    found: list[Solution] = []
    for choice in _in_order(objective, budgets, pairs):
        value = _total(objective, choice)
        best = found[0].objective if found else value
        if within < math.inf and value > best + within * abs(best):
            break
        costs = {budget.name: _total(budget.cost, choice) for budget in budgets}
        found.append(Solution(_config(table, choice), value, costs))
        if len(found) == count:
            break
    if not found:
        raise ValueError(_why_none(table, budgets, pairs))
    return sorted(found, key=lambda solution: solution.objective)


def _in_order(
    objective: np.ndarray, budgets: Sequence[Budget], pairs: np.ndarray
) -> Iterator[np.ndarray]:
    """Yields every choice within the budgets, as places [layers] in a layer's flattened pairs."""
    layer, pair = np.nonzero(pairs.reshape(len(pairs), -1))
    one_each = layer == np.arange(len(pairs))[:, None]
    constraints = [LinearConstraint(one_each.astype(np.float64), 1, 1)]
    constraints += [_row(budget, pairs) for budget in budgets]
    to_minimise = _scaled(objective, pairs, OBJECTIVE_SIZE)[0][pairs]
    while True:
        result = milp(
            to_minimise,
            integrality=np.ones_like(to_minimise),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0},
        )
        if result.status == INFEASIBLE:
            return
        if not result.success:
            raise RuntimeError(f"the integer programme was not solved: {result.message}")
        values = np.zeros((len(pairs), pairs[0].size))
        values[layer, pair] = result.x
        choice = values.argmax(1)
        taken = (pair == choice[layer]).astype(np.float64)
        constraints.append(LinearConstraint(taken, -np.inf, len(pairs) - 1))  # not all of it again
        if all(_meets(budget, choice) for budget in budgets):
            yield choice


def _row(budget: Budget, pairs: np.ndarray) -> LinearConstraint:
    row, least, unit = _scaled(budget.cost, pairs, ROW_SIZE)
    # A row sums up to 0 at least and `most` at most: clipping only tames numbers beyond.
    most = ROW_SIZE * len(pairs)
    low, high = np.clip(np.array(_bounds(budget)) - least, -unit, (most + 1) * unit) / unit
    return LinearConstraint(row[pairs], low - ROW_MARGIN, high + ROW_MARGIN)


def _scaled(cost: np.ndarray, pairs: np.ndarray, size: float) -> tuple[np.ndarray, float, float]:
    """Returns (cost - layer's least) / unit, which is at most `size`; the sum of least; unit."""
    least = np.where(pairs, cost, np.inf).min((1, 2), keepdims=True)
    above = np.where(pairs, cost, least) - least
    unit = float(above.max() or size) / size
    return above / unit, math.fsum(least.flat), unit


def _bounds(budget: Budget) -> tuple[float, float]:
    """Returns the smallest and the largest cost that count as within the budget."""
    low, high = budget.at_least, budget.limit
    return low - TOLERANCE * abs(low), high + TOLERANCE * abs(high)


def _meets(budget: Budget, choice: np.ndarray) -> bool:
    low, high = _bounds(budget)
    return low <= _total(budget.cost, choice) <= high


def _total(cost: np.ndarray, choice: np.ndarray) -> float:
    return math.fsum(cost.reshape(len(cost), -1)[np.arange(len(cost)), choice])


def _config(table: LayerTable, choice: np.ndarray) -> BitConfig:
    choices = np.divmod(choice, len(table.candidates))
    return BitConfig(*jnp.asarray(table.candidates, jnp.int32)[np.stack(choices)])


def _check_bounds(budgets: Sequence[Budget]) -> None:
    names = [budget.name for budget in budgets]
    if not budgets or len({"objective", *names}) <= len(names):
        raise ValueError(f"the budgets are {names}; give one or more, each with a name of its own")
    for name, _, high, low in budgets:
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


def _why_none(table: LayerTable, budgets: Sequence[Budget], pairs: np.ndarray) -> str:
    any_order = np.zeros(pairs.shape)
    hopeless = [
        budget.name
        for budget in budgets
        if len(budgets) == 1 or next(_in_order(any_order, [budget], pairs), None) is None
    ]
    verdict = "each can be met alone, but not all together"
    if hopeless:
        verdict = f"{', '.join(hopeless)} cannot be met"
    ranges = "; ".join(_range(table, budget, pairs) for budget in budgets)
    return f"no configuration is within the budgets: {verdict}; {ranges}"


def _range(table: LayerTable, budget: Budget, pairs: np.ndarray) -> str:
    least = np.where(pairs, budget.cost, np.inf).min((1, 2))
    most = np.where(pairs, budget.cost, -np.inf).max((1, 2))
    held_by = ", ".join(f"{table.names[i]} ({least[i]:.4g})" for i in np.argsort(-least)[:3])
    return (
        f"{budget.name} should be {budget.at_least:.6g} to {budget.limit:.6g} and the reachable "
        f"range is {math.fsum(least):.6g} to {math.fsum(most):.6g}; at the low end the largest "
        f"parts are {held_by}"
    )


def tied(table: LayerTable) -> np.ndarray:
    """Returns the pairs of equal weight and activation bits: bool [layers, choices, choices].

    Methods that train equal bits have seen no others. A layer with only one candidate for its
    weights or its activations, as float ones have, keeps all pairs that its rules allow.

    Raises:
        ValueError: a layer with a choice of both has no bits in common.
    """
    pairs = allowed_pairs(table)
    equal = np.eye(len(table.candidates), dtype=bool)
    for index, layer in enumerate(table.layers):
        if min(len(layer.weight_candidates), len(layer.act_candidates)) > 1:
            pairs[index] &= equal
            if not pairs[index].any():
                raise ValueError(
                    f"weights and activations of {layer.name!r} have no bits in common: "
                    f"{layer.weight_candidates} and {layer.act_candidates}; do not tie them"
                )
    return pairs


def hawq_objective(
    table: LayerTable,
    traces: Float[AnyArray, " layers"],
    weight_errors: Float[AnyArray, "layers choices"],
) -> np.ndarray:
    """Returns the average Hessian trace x the squared error of the weights, by layer and bits.

    Half of its sum is the expected rise of the loss. A negative trace, which near a minimum is
    noise of the estimate, counts as 0, so that errors are never rewarded.

    Args:
        table: the layers.
        traces: average trace of each layer's Hessian: trace / number of weights.
        weight_errors: `||Q(W_l, b) - W_l||^2` at each of `table.candidates`; entries that the
            rules forbid are not read.

    Returns:
        float64 [layers, weight choices, activation choices], the same at all activation bits; 0
        in layers without a choice, infinity where the rules forbid.

    References:
        Dong et al., HAWQ-V2, https://arxiv.org/abs/1911.03852, Eq. 2.11.
    """
    errors = np.where(table.mask[:, 0], np.asarray(weight_errors, np.float64), 0)
    return _objective(table, np.maximum(np.asarray(traces, np.float64), 0), errors)


def paper_objective(
    table: LayerTable,
    traces: Float[AnyArray, " layers"],
    weight_errors: Float[AnyArray, "layers choices"],
) -> np.ndarray:
    """Returns the average Hessian trace x weight bits, as the Double Rounding paper prints it.

    Read literally, it punishes bits in sensitive layers, against the paper's text; hence it is not
    the default, and fewer bits are always better unless there is a `Budget.at_least`. Traces (t_l /
    n_l in the paper) are taken as they are and `weight_errors` is not read; otherwise this takes
    and returns the same as `hawq_objective`.

    References:
        Double Rounding, https://arxiv.org/abs/2502.01565, the objective of its iterative ILP.
    """
    del weight_errors
    bits = np.tile(np.array(table.candidates, np.float64), (len(table), 1))
    return _objective(table, np.asarray(traces, np.float64), bits)


def _objective(table: LayerTable, traces: np.ndarray, by_weights: np.ndarray) -> np.ndarray:
    if traces.shape != (len(table),) or by_weights.shape != (len(table), len(table.candidates)):
        raise ValueError(
            f"traces have shape {traces.shape} and weight errors {by_weights.shape}; wanted one "
            f"trace for each of the {len(table)} layers, and errors [layers, choices]"
        )
    chosen = np.where(table.searchable[:, None], traces[:, None] * by_weights, 0)
    return np.where(allowed_pairs(table), chosen[:, :, None], np.inf)


OBJECTIVES: dict[str, Callable[..., np.ndarray]] = {
    "hawq": hawq_objective,
    "paper": paper_objective,
}

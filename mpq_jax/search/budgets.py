"""Budgets by uniform level, by number, or spread over the range of costs."""

from collections.abc import Mapping, Sequence

import numpy as np

from mpq_jax.search.cost_metrics import CostMetric
from mpq_jax.search.integer_program import reachable_costs
from mpq_jax.search.problem import Budget, Constraint
from mpq_jax.search.space import SearchSpace
from mpq_jax.supernet import costs


def budget_amounts(
    space: SearchSpace,
    metric: CostMetric,
    *,
    levels: Sequence[int],
    budgets: Sequence[float],
    pareto_points: int,
) -> dict[str, float]:
    """Returns the largest cost that each budget allows, by the budget's name.

    Args:
        space: the configurations.
        metric: how costs are counted.
        levels: uniform bits whose costs are budgets.
        budgets: costs that are budgets.
        pareto_points: number of further budgets, spread over the range of costs.

    Raises:
        ValueError: a level is none of the candidates, or its cost is not known.
    """
    table = space.table
    unknown = sorted(set(levels) - set(table.bank_bits))
    if unknown:
        raise ValueError(f"levels are {unknown}; the layers choose among {table.bank_bits}")
    amounts = {
        f"{bits}-bit level": costs.total(table, metric.cost, table.uniform(bits, bits))
        for bits in levels
    }
    unmeasured = [name for name, amount in amounts.items() if not np.isfinite(amount)]
    if unmeasured:
        raise ValueError(
            f"the {metric.kind} of the {', '.join(unmeasured)} is not known for all layers; "
            "measure these bits or drop the level"
        )
    numbers = [float(budget) for budget in budgets]
    if pareto_points:
        low, high = reachable_costs(space, metric.cost)
        numbers += np.geomspace(low, high, pareto_points + 2)[1:-1].tolist()
    return amounts | {metric.show(number): number for number in numbers}


def make_budgets(
    metric: CostMetric,
    constraints: Sequence[Constraint],
    amounts: Mapping[str, float],
    *,
    unused: float,
) -> list[Budget]:
    """Returns budgets with all of their constraints.

    Args:
        metric: how the cost is counted.
        constraints: further constraints on every budget.
        amounts: largest cost by name of the budget.
        unused: how much of a budget may be left; infinity: all of it.
    """
    return [
        Budget(name, (Constraint(metric.kind, metric.cost, most, most - unused), *constraints))
        for name, most in amounts.items()
    ]


def largest_step(cost: np.ndarray) -> float:
    """Returns the largest difference between neighboring costs of one layer."""
    by_layer = [np.unique(row[np.isfinite(row)]) for row in cost]
    return max(float(np.diff(row).max(initial=0.0)) for row in by_layer)

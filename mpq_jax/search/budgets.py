"""Budgets by level, by number or spread over the range of costs, and constraints."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from mpq_jax.search.cost_metrics import BASE_UNITS, CostMetric, cost_metrics
from mpq_jax.search.integer_program import reachable_costs, solve
from mpq_jax.search.objectives import check_inputs_are_determined
from mpq_jax.search.options import PAPER, SearchOptions
from mpq_jax.search.problem import TOLERANCE, Budget, Constraint
from mpq_jax.search.space import SearchSpace
from mpq_jax.supernet import costs
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable


class SearchProblem(NamedTuple):
    """The configurations of a search, and what they may cost.

    Attributes:
        space: the configurations.
        metrics: all known ways to count costs, by kind.
        metric: the one of the budgets.
        constraints: constraints on every configuration, besides its budget.
        limits: largest cost that each budget allows, by its name.
        slack: cost that a budget may leave unused; infinity: all of it.
    """

    space: SearchSpace
    metrics: dict[str, CostMetric]
    metric: CostMetric
    constraints: tuple[Constraint, ...]
    limits: dict[str, float]
    slack: float

    def budgets(self, limits: Mapping[str, float]) -> list[Budget]:
        """Returns budgets with all of their constraints, from the limits of their costs."""
        kind, cost = self.metric.kind, self.metric.cost
        unit = BASE_UNITS[kind]
        return [
            Budget(name, (Constraint(kind, cost, most, most - self.slack, unit), *self.constraints))
            for name, most in limits.items()
        ]

    def cost_of(self, bits: BitConfig) -> float:
        """Returns the cost of a configuration by the metric of the budgets."""
        return costs.total(self.space.table, self.metric.cost, bits)

    def allows(self, bits: BitConfig) -> bool:
        """Returns whether a configuration satisfies the constraints besides its budget."""
        return all(
            costs.total(self.space.table, one.cost, bits) <= one.limit for one in self.constraints
        )

    def cost_range(self) -> tuple[float, float]:
        """Returns the smallest and the largest cost, the smallest within the constraints."""
        low, high = reachable_costs(self.space, self.metric.cost)
        if self.constraints:
            anything = Constraint(self.metric.kind, self.metric.cost, math.inf)
            (cheapest,) = solve(self.space, self.metric.cost, (anything, *self.constraints))
            low = cheapest.objective
        return low, high


def beyond_reach(problem: SearchProblem) -> list[str]:
    """Says which budgets are larger than any configuration costs, so that they limit nothing."""
    _, high = reachable_costs(problem.space, problem.metric.cost)
    names = [name for name, most in problem.limits.items() if most > high * (1 + TOLERANCE)]
    shown = problem.metric.show
    return [
        f"the budget of {shown(problem.limits[name])} limits nothing: the most expensive bits cost "
        f"{shown(high)}"
        for name in names
    ]


def make_problem(table: LayerTable, options: SearchOptions) -> SearchProblem:
    """Builds the problem that options describe.

    Raises:
        ValueError: a level is none of the candidates or its cost is not known, or the objective
            does not determine all bits.
    """
    space, metrics = SearchSpace(table), cost_metrics(table, options.latency)
    metric = metrics[options.cost]
    slack = math.inf
    if options.uses_hessian:
        check_inputs_are_determined(table)
        if options.objective == PAPER:
            slack = largest_step(metric.cost)
    constraints = tuple(
        Constraint(f"limit on {kind}", metrics[kind].cost, most, unit=BASE_UNITS[kind])
        for kind, most in options.limits.items()
        if most
    )
    limits = budget_limits(space, metric, options)
    return SearchProblem(space, metrics, metric, constraints, limits, slack)


def budget_limits(
    space: SearchSpace, metric: CostMetric, options: SearchOptions
) -> dict[str, float]:
    """Returns the largest cost that each budget allows, by the budget's name."""
    table = space.table
    unknown = sorted(set(options.levels) - set(table.bank_bits))
    if unknown:
        raise ValueError(f"levels has {unknown}; the layers choose among {table.bank_bits} bits")
    limits = {
        f"{bits}-bit level": costs.total(table, metric.cost, table.uniform(bits, bits))
        for bits in options.levels
    }
    unmeasured = [name for name, most in limits.items() if not np.isfinite(most)]
    if unmeasured:
        raise ValueError(
            f"the {metric.kind} of the {', '.join(unmeasured)} is not known for all layers; "
            "measure these bits or drop the level"
        )
    numbers = [float(budget) for budget in options.budgets]
    if options.pareto_points:
        low, high = reachable_costs(space, metric.cost)
        numbers += np.geomspace(low, high, options.pareto_points + 2)[1:-1].tolist()
    return limits | {metric.show(number): number for number in numbers}


def largest_step(cost: np.ndarray) -> float:
    """Returns the largest difference between neighboring costs of one layer."""
    by_layer = [np.unique(row[np.isfinite(row)]) for row in cost]
    return max(float(np.diff(row).max(initial=0.0)) for row in by_layer)

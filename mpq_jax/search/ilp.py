"""Search by integer program: the best scored of the program's best solutions.

References:
    Dong et al., HAWQ-V2, NeurIPS 2020, https://arxiv.org/abs/1911.03852 (the objective).
    Double Rounding, https://arxiv.org/abs/2502.01565, iterative ILP.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Key

from mpq_jax.search import objectives
from mpq_jax.search.integer_program import solve
from mpq_jax.search.problem import (
    Budget,
    OnStep,
    Score,
    SearchResult,
    Step,
    ignore,
    make_result,
    score_choices,
)
from mpq_jax.search.space import SearchSpace


def ilp_search(
    score: Score,
    space: SearchSpace,
    budgets: Sequence[Budget],
    key: Key[Array, ""],
    *,
    objective: np.ndarray | None = None,
    solutions: int = 8,
    on_step: OnStep = ignore,
) -> list[SearchResult]:
    """Solves a program for each budget and returns the best scored of its best solutions.

    Args:
        score: see `problem`, as for the next three.
        space: the configurations.
        budgets: the budgets.
        key: random key.
        objective: float64 [layers, weight choices, activation choices] whose sum is minimized,
            such as `objectives.hawq`; None: the score increase if one entry alone is lowered from
            the largest configuration, measured here.
        solutions: number of the best solutions that are scored, by budget; 1: none is scored.
        on_step: called after every budget.

    Raises:
        ValueError: a budget cannot be met, or the inputs are malformed.
    """
    if objective is None:
        sensitivity = objectives.measured_sensitivity(score, space, key)
        objective = objectives.additive(space, sensitivity)
    results = []
    for budget in budgets:
        best = solve(space, objective, budget.constraints, count=solutions)
        scores = np.full(1, np.nan)
        if len(best) > 1:
            scores = score_choices(score, space, [one.choices for one in best], key)
        place = int(np.argmin(scores))
        result = make_result(space, budget, best[place].choices, scores[place])
        results.append(result)
        cost = result.costs[budget.constraints[0].name]
        on_step(Step("program", f"solution {place + 1} of {len(best)}", cost, result.score))
    return results


def check_budgets(space: SearchSpace, budgets: Sequence[Budget]) -> None:
    """Raises ValueError for budgets that cannot be met, naming the range and the largest layers."""
    names = [budget.name for budget in budgets]
    if not budgets or len(set(names)) < len(names):
        raise ValueError(f"the budgets are {names}; give one or more, each with a name of its own")
    for budget in budgets:
        try:
            solve(space, np.zeros(space.pairs.shape), budget.constraints)
        except ValueError as error:
            raise ValueError(f"{budget.name}: {error}") from error


def nearest(space: SearchSpace, budget: Budget, choices: np.ndarray) -> np.ndarray:
    """Returns the configuration within a budget that differs in the fewest entries."""
    own = np.eye(space.mask.shape[-1])[choices]  # [layers, 2, choices]
    differing = 2.0 - own[:, 0, :, None] - own[:, 1, None, :]
    (best,) = solve(space, differing, budget.constraints)
    return best.choices

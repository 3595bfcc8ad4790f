"""An integer program on measured sensitivities, refined by exchanges.

The program knows the whole network at once but takes the losses of layers for a sum; exchanges
know what layers do together but only nearby.
"""

import functools
from collections.abc import Sequence

from jaxtyping import Array, Key

from mpq_jax.search import objectives, tabu
from mpq_jax.search.ilp import ilp_search
from mpq_jax.search.problem import (
    Budget,
    OnStep,
    Score,
    SearchResult,
    ignore,
    make_result,
    score_choices,
)
from mpq_jax.search.space import SearchSpace


def hybrid_search(
    score: Score,
    space: SearchSpace,
    budgets: Sequence[Budget],
    key: Key[Array, ""],
    *,
    solutions: int = 8,
    rounds: int = 4,
    proposals: int = 8,
    tabu_tenure: int = 4,
    on_step: OnStep = ignore,
) -> list[SearchResult]:
    """Starts each budget from the best scored solution of its program, then exchanges bits.

    Args:
        score: see `problem`, as for the next three.
        space: the configurations.
        budgets: the budgets.
        key: random key.
        solutions: see `ilp.ilp_search`.
        rounds: see `tabu.tabu_search`, as for the next two.
        proposals: exchanges that are scored in a round.
        tabu_tenure: rounds during which an exchanged variable stays as it is.
        on_step: called after every program and every exchange.

    Raises:
        ValueError: a budget cannot be met.
    """
    score_all = functools.partial(score_choices, score, space, key=key)
    objective = objectives.additive(space, objectives.measured_sensitivity(score, space, key))

    def refine(budget: Budget) -> SearchResult:
        (start,) = ilp_search(
            score, space, [budget], key, objective=objective, solutions=solutions, on_step=on_step
        )
        choices = space.choices_of(start.bits)
        refined = tabu.improve(
            score_all,
            space,
            budget,
            # A program with one solution does not score it, and scores of one key are equal.
            tabu.Scored(choices, float(score_all([choices])[0])),
            rounds=rounds,
            proposals=proposals,
            tabu_tenure=tabu_tenure,
            on_step=on_step,
        )
        return make_result(space, budget, *refined)

    return [refine(budget) for budget in budgets]

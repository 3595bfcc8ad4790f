"""A greedy descent by gain per cost, improved by exchanges with a tabu list.

All configurations are scored on the same images, so that small differences count: a configuration
is lowered where the score increases least for what is saved, and within the budget bits then move
from layers that are little sensitive to layers that are very sensitive.

References:
    Glover, Tabu search, part I, ORSA Journal on Computing 1(3), 1989.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Key

from mpq_jax.search import ilp
from mpq_jax.search.greedy import check_monotone
from mpq_jax.search.problem import (
    Budget,
    OnStep,
    Score,
    SearchResult,
    Step,
    first_cost,
    ignore,
    in_order_of,
    largest_first,
    make_result,
    score_choices,
    score_increase,
    violation,
)
from mpq_jax.search.space import SearchSpace, Variable

LEAST_INCREASE = 1e-9  # of a score: of moves that cost nothing, the one that saves most

ScoreChoices = Callable[[np.ndarray | Sequence[np.ndarray]], np.ndarray]
"""`score_choices` of one score, space and key: all configurations see the same images."""


class Scored(NamedTuple):
    """A configuration and its score.

    Attributes:
        choices: int [layers, 2].
        score: its score.
    """

    choices: np.ndarray
    score: float


def tabu_search(
    score: Score,
    space: SearchSpace,
    budgets: Sequence[Budget],
    key: Key[Array, ""],
    *,
    rounds: int = 4,
    proposals: int = 8,
    tabu_tenure: int = 4,
    on_step: OnStep = ignore,
) -> list[SearchResult]:
    """Descends from the largest bits; exchanges bits within each budget on its way down.

    Args:
        score: see `problem`, as for the next three.
        space: the configurations.
        budgets: budgets without lower bounds.
        key: random key.
        rounds: exchanges per budget.
        proposals: number of moves that are scored in a step of the descent, and of exchanges that
            are scored in a round: the most promising ones.
        tabu_tenure: rounds during which an exchanged variable stays as it is.
        on_step: called after every move.

    Raises:
        ValueError: a budget cannot be met, or more bits cost less somewhere.
    """
    check_monotone(space, budgets)
    score_all = functools.partial(score_choices, score, space, key=key)
    start = space.max_choices()
    now = Scored(start, float(score_all([start])[0]))
    results = []
    for budget in largest_first(budgets):
        now = descend(score_all, space, budget, now, proposals=proposals, on_step=on_step)
        now = improve(
            score_all,
            space,
            budget,
            now,
            rounds=rounds,
            proposals=proposals,
            tabu_tenure=tabu_tenure,
            on_step=on_step,
        )
        results.append(make_result(space, budget, *now))
    return in_order_of(budgets, results)


def descend(
    score_all: ScoreChoices,
    space: SearchSpace,
    budget: Budget,
    start: Scored,
    *,
    proposals: int,
    on_step: OnStep,
) -> Scored:
    """Lowers one variable at a time, the least score increase per saving first.

    A variable's increase when it was last scored tells whether it is worth scoring again.

    Returns:
        The first configuration within the budget.
    """
    now = start
    increases: dict[Variable, float] = {}  # by the variables' next moves
    while (over := float(violation(budget, now.choices))) > 0:
        moves = space.neighbors(now.choices)
        moves = moves[violation(budget, moves) < over]
        if not len(moves) or over == np.inf:  # on a plateau, or where no single move has a cost
            moves = ilp.nearest(space, budget, now.choices)[None]
        variables = [space.changed(now.choices, move)[0] for move in moves]
        saved = (over if over < np.inf else 1.0) - violation(budget, moves)
        expected = np.array([increases.get(one, -np.inf) for one in variables]) / saved
        # All that were never scored, and the most promising of the others.
        chosen = np.argsort(expected, kind="stable")[: np.isneginf(expected).sum() + proposals]
        scores = score_all(moves[chosen])
        increase = score_increase(scores, now.score)
        increases |= {variables[i]: value for i, value in zip(chosen, increase, strict=True)}
        best = int(np.argmin(np.maximum(increase, LEAST_INCREASE) / saved[chosen]))
        after = Scored(moves[chosen[best]], float(scores[best]))
        on_step(_step("descent", space, budget, now, after))
        increases.pop(variables[chosen[best]])
        now = after
    return now


def improve(
    score_all: ScoreChoices,
    space: SearchSpace,
    budget: Budget,
    start: Scored,
    *,
    rounds: int,
    proposals: int,
    tabu_tenure: int,
    on_step: OnStep,
) -> Scored:
    """Raises some variables and lowers others, within a budget.

    In each round all single moves are scored; of pairs of them that stay within the budget, those
    with the best sum are scored as well, and the best is taken even if it is worse than before.

    Returns:
        The best configuration that was scored.
    """
    now, best = start, start
    tabu: dict[Variable, int] = {}  # the last round in which a variable must not change
    visited = {start.choices.tobytes()}
    for number in range(rounds):
        free = [variable for variable in space.variables if tabu.get(variable, -1) < number]
        moves = space.neighbors(now.choices, free)
        moves = moves[np.isfinite(violation(budget, moves))]
        if not len(moves):
            break
        scores = score_all(moves)
        fits = violation(budget, moves) == 0
        best = _better(best, *_scored(moves[fits], scores[fits]))
        increase = score_increase(scores, now.score)
        chosen = _proposals(budget, now.choices, moves, increase, visited, proposals)
        if not chosen:
            break
        after = _better(*_scored(chosen, score_all(chosen)))
        on_step(_step("exchange", space, budget, now, after))
        tabu |= dict.fromkeys(space.changed(now.choices, after.choices), number + tabu_tenure)
        now = after
        visited.add(now.choices.tobytes())
        best = _better(best, now)
    return best


def _scored(choices: Sequence[np.ndarray] | np.ndarray, scores: np.ndarray) -> list[Scored]:
    return [Scored(one, float(score)) for one, score in zip(choices, scores, strict=True)]


def _better(*candidates: Scored) -> Scored:
    """Returns the first of those with the lowest score."""
    return min(candidates, key=lambda one: one.score)


def _proposals(
    budget: Budget,
    choices: np.ndarray,
    moves: np.ndarray,
    increase: np.ndarray,
    visited: set[bytes],
    count: int,
) -> list[np.ndarray]:
    """Returns the most promising configurations within a budget, one or two moves away."""
    first, second = np.triu_indices(len(moves))  # a move with itself is that move alone
    changed = moves != choices
    apart = ~(changed[first] & changed[second]).any((1, 2)) | (first == second)
    first, second = first[apart], second[apart]
    combined = np.where(changed[second], moves[second], moves[first])
    expected = increase[first] + np.where(first == second, 0.0, increase[second])
    fits = (violation(budget, combined) == 0) & np.isfinite(expected)
    found = []
    for place in np.flatnonzero(fits)[np.argsort(expected[fits], kind="stable")]:
        if len(found) < count and combined[place].tobytes() not in visited:
            found.append(combined[place])
    return found


def _step(phase: str, space: SearchSpace, budget: Budget, before: Scored, after: Scored) -> Step:
    change = space.describe_change(before.choices, after.choices)
    return Step(phase, change, first_cost(budget, after.choices), after.score)

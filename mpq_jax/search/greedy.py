"""RFQuant's bidirectional greedy search, made safe and serving a list of budgets.

From uniform bits the search moves one layer at a time by one candidate, down or up: first weights,
then activations. One descent passes all budgets and reports a configuration for each.

References:
    Tang et al., CVPR 2024, https://arxiv.org/abs/2401.01543, as published in code
    (`util/greedy_search.py`). docs/rfquant.md lists the differences.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Key

from mpq_jax.search import ilp
from mpq_jax.search.problem import (
    Budget,
    OnStep,
    Score,
    SearchResult,
    Step,
    first_cost,
    ignore,
    in_order_of,
    key_sequence,
    largest_first,
    make_result,
    relative_cost,
    score_choices,
    violation,
)
from mpq_jax.search.space import ACTS, WEIGHTS, SearchSpace

ERROR_WEIGHT = 1.5  # published weight of the error against the cost
WEIGHT_PHASE_TARGET = 0.95  # published: part of the anchor's cost at which the phase changes
NOT_FINITE = 1e6  # relative error of a configuration whose metric is not finite: the worst
PHASES = {WEIGHTS: "weights", ACTS: "acts"}


def greedy_search(
    score: Score,
    space: SearchSpace,
    budgets: Sequence[Budget],
    key: Key[Array, ""],
    *,
    start_bits: int = 5,
    patience: int = 8,
    on_step: OnStep = ignore,
) -> list[SearchResult]:
    """Descends greedily and returns the configuration found for every budget.

    For each budget, the largest first: lower weights until the cost of the weights (at the start's
    activations) is 0.95 of that of the budget's anchor, the uniform weight bits whose cost is
    nearest to the budget; then lower activations until the budget is met. A phase that cannot
    move on hands over to the other. All candidates of a move are scored on one fresh batch, and
    the smallest `1.5 e / max(e) + c / max(c)` wins. Tied entries move together; a group that
    contains weights moves with the weights.

    The published search may stall or oscillate. Here moves outside the mask are never scored, a
    configuration is visited twice only where every cheaper one has been visited, and after
    `patience` moves without a new lowest cost only cheaper ones are scored; so the search ends, and
    no result exceeds its budget. With several constraints in a budget, a cheaper configuration is
    one that violates them less.

    Args:
        score: see `problem`, as for the next three; each move has a key of its own.
        space: the configurations.
        budgets: budgets without lower bounds.
        key: random key.
        start_bits: uniform bits to start from. If they already meet the largest budget, the search
            starts from the largest bits instead.
        patience: moves without a new lowest cost before only cheaper ones are considered.
        on_step: called after every move.

    Raises:
        ValueError: a budget cannot be met, or more bits cost less somewhere.
    """
    check_monotone(space, budgets)
    ordered = largest_first(budgets)
    descent = _Descent(score, space, ordered[0], key, start_bits, patience)
    results = []
    for budget in ordered:
        descent.descend(budget, on_step)
        results.append(make_result(space, budget, descent.choices, descent.last_score))
    return in_order_of(budgets, results)


def check_monotone(space: SearchSpace, budgets: Sequence[Budget]) -> None:
    """Raises ValueError for constraints that descents cannot keep: more bits must not cost less."""
    for one in (constraint for budget in budgets for constraint in budget.constraints):
        if np.isfinite(one.lower_bound):
            raise ValueError(
                f"{one.name} has a lower bound, {one.lower_bound:g}, which a descent may step "
                "over; remove it or search with ilp"
            )
        for layer, name in enumerate(space.table.names):
            allowed = one.cost[layer][np.ix_(*space.mask[layer])]
            finite = np.where(np.isfinite(allowed), allowed, np.nan)
            if any((np.diff(finite, axis=axis) > 0).any() for axis in (0, 1)):
                raise ValueError(
                    f"by {one.name}, {name!r} costs more with fewer bits; mask the choices that "
                    "cost more than a larger one"
                )


class _Descent:
    """The current configuration of a descent, and those that it has visited."""

    def __init__(self, score, space: SearchSpace, first: Budget, key, start_bits, patience: int):
        self.score, self.space, self.patience = score, space, patience
        self.keys = key_sequence(key)
        self.start = space.uniform(start_bits)
        if violation(first, self.start) in (0, np.inf):
            self.start = space.max_choices()
        self.choices = self.start.copy()
        self.visited = {self.choices.tobytes()}
        self.lowest, self.since_lowest, self.last_score = np.inf, 0, float("nan")

    def descend(self, budget: Budget, on_step: OnStep) -> None:
        """Moves until the budget is met."""
        phase, target = WEIGHTS, self._weight_target(budget)
        self.lowest, self.since_lowest = violation(budget, self.choices), 0
        while violation(budget, self.choices) > 0:
            if phase == WEIGHTS and self._weight_cost(budget, self.choices) <= target:
                phase = ACTS
            if not len(self._cheaper(budget, self._neighbors(phase))):
                phase = 1 - phase  # nothing to lower here: the other tensor has to pay
                target = -np.inf
            on_step(self._take_best(budget, phase, self._moves(budget, phase)))

    def _weight_cost(self, budget: Budget, choices: np.ndarray) -> float:
        """Returns the relative cost of the weights' choices at the start's activations."""
        mixed = self.start
        for variable in self.space.variables:
            if self.space.column(variable) == WEIGHTS:
                mixed = np.where(self.space.members(variable), choices, mixed)
        return float(relative_cost(budget, mixed))

    def _weight_target(self, budget: Budget) -> float:
        """Returns the cost of the weights at which the first phase ends."""
        anchors = [self.space.uniform(bits) for bits in self.space.table.bank_bits]
        relative = [float(relative_cost(budget, anchor)) for anchor in anchors]
        known = [place for place, cost in enumerate(relative) if 0 < cost < np.inf]
        if not known:
            return -np.inf
        nearest = min(known, key=lambda place: abs(np.log(relative[place])))
        return WEIGHT_PHASE_TARGET * self._weight_cost(budget, anchors[nearest])

    def _neighbors(self, phase: int) -> np.ndarray:
        """Returns the configurations with one variable of a phase one candidate down or up."""
        variables = [v for v in self.space.variables if self.space.column(v) == phase]
        return self.space.neighbors(self.choices, variables)

    def _cheaper(self, budget: Budget, moves: np.ndarray) -> np.ndarray:
        return moves[violation(budget, moves) < violation(budget, self.choices)]

    def _moves(self, budget: Budget, phase: int) -> np.ndarray:
        """Returns the neighbors that may be moved to; never none if the phase can go down."""
        neighbors = self._neighbors(phase)
        neighbors = neighbors[np.isfinite(violation(budget, neighbors))]
        is_new = [move.tobytes() not in self.visited for move in neighbors]
        new = neighbors[np.array(is_new, bool)]
        new_cheaper = self._cheaper(budget, new)
        if not len(new_cheaper):
            cheaper = self._cheaper(budget, neighbors)
            # On a plateau, or where no single move has a cost: the nearest within the budget.
            return cheaper if len(cheaper) else ilp.nearest(self.space, budget, self.choices)[None]
        return new if self.since_lowest < self.patience else new_cheaper

    def _take_best(self, budget: Budget, phase: int, moves: np.ndarray) -> Step:
        """Scores moves, takes the one of the published criterion and reports it."""
        errors = score_choices(self.score, self.space, moves, next(self.keys))
        finite = np.isfinite(errors)
        worst = errors[finite].max(initial=0.0) or 1.0
        relative_errors = np.where(finite, errors / worst, NOT_FINITE)
        cost = relative_cost(budget, moves)
        best = int(np.argmin(ERROR_WEIGHT * relative_errors + cost / cost.max()))
        change = self.space.describe_change(self.choices, moves[best])
        self.choices, self.last_score = moves[best], float(errors[best])
        self.visited.add(self.choices.tobytes())
        now = violation(budget, self.choices)
        self.since_lowest = 0 if now < self.lowest else self.since_lowest + 1
        self.lowest = min(self.lowest, now)
        return Step(PHASES[phase], change, first_cost(budget, self.choices), self.last_score)

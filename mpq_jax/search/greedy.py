"""RFQuant's bidirectional greedy search, made safe and serving a list of budgets.

From uniform bits the search moves one layer at a time by one candidate, down or up: first weights,
then activations. One descent passes all budgets and reports a configuration for each.

References:
    Tang et al., CVPR 2024, https://arxiv.org/abs/2401.01543, as published in code
    (`util/greedy_search.py`). docs/rfquant.md lists what is mended.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Key

from mpq_jax.search import ilp
from mpq_jax.search import problem as spaces
from mpq_jax.search.problem import ACTS, WEIGHTS, Budget, Found, Score, Space, Step, Watch
from mpq_jax.supernet.layer_table import LayerTable

ERROR_WEIGHT = 1.5  # published weight of the error against the cost
WEIGHT_PHASE_TARGET = 0.95  # published: part of the anchor's cost at which the phase changes
NOT_FINITE = 1e6  # relative error of a configuration whose metric is not finite: the worst
PHASES = {WEIGHTS: "weights", ACTS: "acts"}


def search(
    score: Score,
    table: LayerTable,
    candidates: Sequence[int],
    mask: np.ndarray,
    budgets: Sequence[Budget],
    key: Key[Array, ""],
    *,
    start_bits: int = 5,
    patience: int = 8,
    watch: Watch = spaces.nobody,
) -> list[Found]:
    """Descends greedily and returns the configuration found for every budget.

    For each budget, the largest first: lower weights until the cost of the weights (at the start's
    activations) is 0.95 of that of the budget's anchor, the uniform weight bits whose cost is
    nearest to the budget; then lower activations until the budget is met. A phase that cannot
    move on hands over to the other. All candidates of a move are scored on one fresh batch, and
    the smallest `1.5 e / max(e) + c / max(c)` wins. Entries that are tied move together; a group
    with weights in it moves with the weights.

    The published search may stall or oscillate. Here moves outside the mask are never scored, a
    configuration is visited twice only where every cheaper one has been visited, and after
    `patience` moves without a new lowest cost only cheaper ones are scored; so the search ends, and
    no result exceeds its budget. With several limits in a budget, a cheaper configuration is one
    that exceeds them by less.

    Args:
        score: see `space.Score`; each move has a key of its own.
        table: the layers.
        candidates: bits of each choice, `table.candidates`.
        mask: bool [layers, 2, choices], what may be chosen (normally `table.mask`).
        budgets: what to keep within, without lower bounds.
        key: random key.
        start_bits: uniform bits to start from. If they already meet the largest budget, the search
            starts from the largest bits instead.
        patience: moves without a new lowest cost before only cheaper ones are considered.
        watch: called after every move.

    Returns:
        One configuration per budget, in their order; the score is that on the last move's images.

    Raises:
        ValueError: a budget cannot be met, or more bits cost less somewhere.
    """
    space = Space(table, candidates, mask)
    ilp.check(space, budgets)
    check_monotone(space, budgets)
    in_order = spaces.tightest_last(budgets)
    descent = _Descent(score, space, in_order[0], key, start_bits, patience)
    found = {}
    for budget in in_order:
        descent.descend(budget, watch)
        found[budget.name] = spaces.result(space, budget, descent.state, descent.last_score)
    return spaces.in_order(budgets, found)


def check_monotone(space: Space, budgets: Sequence[Budget]) -> None:
    """Raises ValueError for limits that a descent cannot keep: more bits must not cost less."""
    for limit in (limit for budget in budgets for limit in budget.limits):
        if np.isfinite(limit.at_least):
            raise ValueError(
                f"{limit.name} has a lower bound, {limit.at_least:g}, which a descent passes by; "
                "drop it or search with ilp"
            )
        for layer, name in enumerate(space.table.names):
            allowed = limit.cost[layer][np.ix_(*space.mask[layer])]
            finite = np.where(np.isfinite(allowed), allowed, np.nan)
            if any((np.diff(finite, axis=axis) > 0).any() for axis in (0, 1)):
                raise ValueError(
                    f"by {limit.name}, {name!r} costs more with fewer bits; mask the choices that "
                    "cost more than a larger one"
                )


class _Descent:
    """The state of a descent, and where it has been."""

    def __init__(self, score, space: Space, first: Budget, key, start_bits: int, patience: int):
        self.score, self.space, self.patience = score, space, patience
        self.keys = spaces.keys(key)
        self.start = space.uniform(start_bits)
        if spaces.excess(first, self.start) in (0, np.inf):
            self.start = space.largest()
        self.state = self.start.copy()
        self.visited = {self.state.tobytes()}
        self.lowest, self.since_lowest, self.last_score = np.inf, 0, float("nan")

    def descend(self, budget: Budget, watch: Watch) -> None:
        phase, target = WEIGHTS, self._weight_target(budget)
        self.lowest, self.since_lowest = spaces.excess(budget, self.state), 0
        while spaces.excess(budget, self.state) > 0:
            if phase == WEIGHTS and self._weight_price(budget, self.state) <= target:
                phase = ACTS
            if not len(self._lower(budget, self._neighbors(phase))):
                phase = 1 - phase  # nothing to lower here: the other tensor has to pay
                target = -np.inf
            watch(self._take_best(budget, phase, self._moves(budget, phase)))

    def _weight_price(self, budget: Budget, state: np.ndarray) -> float:
        mixed = self.start
        for gene in self.space.genes:
            if self.space.column(gene) == WEIGHTS:
                mixed = np.where(self.space.followers(gene), state, mixed)
        return float(spaces.price(budget, mixed))

    def _weight_target(self, budget: Budget) -> float:
        anchors = [self.space.uniform(bits) for bits in self.space.table.bank_bits]
        prices = [float(spaces.price(budget, anchor)) for anchor in anchors]
        known = [place for place, price in enumerate(prices) if 0 < price < np.inf]
        if not known:
            return -np.inf
        nearest = min(known, key=lambda place: abs(np.log(prices[place])))
        return WEIGHT_PHASE_TARGET * self._weight_price(budget, anchors[nearest])

    def _neighbors(self, phase: int) -> np.ndarray:
        """Returns the states with one gene of a phase one candidate down or up."""
        genes = [gene for gene in self.space.genes if self.space.column(gene) == phase]
        return self.space.neighbors(self.state, genes)

    def _lower(self, budget: Budget, states: np.ndarray) -> np.ndarray:
        return states[spaces.excess(budget, states) < spaces.excess(budget, self.state)]

    def _moves(self, budget: Budget, phase: int) -> np.ndarray:
        """Returns the neighbors that may be moved to; never none if the phase can go down."""
        neighbors = self._neighbors(phase)
        neighbors = neighbors[np.isfinite(spaces.excess(budget, neighbors))]
        is_new = [state.tobytes() not in self.visited for state in neighbors]
        new = neighbors[np.array(is_new, bool)]
        new_lower = self._lower(budget, new)
        if not len(new_lower):
            lower = self._lower(budget, neighbors)
            # On a plateau, or where no single move has a cost, the nearest within the budget.
            return lower if len(lower) else ilp.nearest(self.space, budget, self.state)[None]
        return new if self.since_lowest < self.patience else new_lower

    def _take_best(self, budget: Budget, phase: int, moves: np.ndarray) -> Step:
        errors = spaces.scored(self.score, self.space, moves, next(self.keys))
        finite = np.isfinite(errors)
        worst = errors[finite].max(initial=0.0) or 1.0
        relative = np.where(finite, errors / worst, NOT_FINITE)
        prices = spaces.price(budget, moves)
        best = int(np.argmin(ERROR_WEIGHT * relative + prices / prices.max()))
        change = self.space.change(self.state, moves[best])
        self.state, self.last_score = moves[best], float(errors[best])
        self.visited.add(self.state.tobytes())
        now = spaces.excess(budget, self.state)
        self.since_lowest = 0 if now < self.lowest else self.since_lowest + 1
        self.lowest = min(self.lowest, now)
        return Step(PHASES[phase], change, spaces.first_cost(budget, self.state), self.last_score)

"""RFQuant's bidirectional greedy search, made safe and serving a list of budgets.

From uniform bits the search moves one layer at a time by one candidate, down or up: first weights,
then activations. One descent passes all budgets and reports a configuration for each.

References:
    Tang et al., CVPR 2024, https://arxiv.org/abs/2401.01543, as published in code
    (`util/greedy_search.py`). docs/rfquant.md lists what is mended.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mpq_jax.bits import BitConfig
from mpq_jax.layer_table import LayerTable
from mpq_jax.search.evaluate import Score

ERROR_WEIGHT = 1.5  # published weight of the error against the cost
WEIGHT_PHASE_TARGET = 0.95  # published: part of the anchor's cost at which the phase changes
TOLERANCE = 1e-6  # relative: budgets often are costs that were summed in float32
NOT_FINITE = 1e6  # relative error of a configuration whose metric is not finite: the worst
WEIGHTS, ACTS = 0, 1  # columns of a state


class Step(NamedTuple):
    """One move of the descent.

    Attributes:
        phase: "weights" or "acts".
        layer: name of the layer that moved.
        bits: its new bits.
        cost: of the configuration after the move.
        score: the metric of the configuration on the move's batch.
    """

    phase: str
    layer: str
    bits: int
    cost: float
    score: float


class Found(NamedTuple):
    """The configuration for one budget: cost at most `budget`, to a relative `TOLERANCE`."""

    budget: float
    cost: float
    bits: BitConfig


class Result(NamedTuple):
    """What a descent returns: one configuration per budget, in the order given, and its path."""

    found: list[Found]
    path: list[Step]


def reachable(table: LayerTable, cost: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Returns the smallest and the largest cost of any configuration that the mask allows."""
    allowed = mask[:, 0, :, None] & mask[:, 1, None, :]
    low = np.where(allowed, cost, np.inf).min((1, 2)).sum()
    high = np.where(allowed, cost, -np.inf).max((1, 2)).sum()
    return float(low), float(high)


def check_budgets(
    table: LayerTable, cost: np.ndarray, mask: np.ndarray, budgets: Sequence[float]
) -> None:
    """Raises ValueError, naming the range and what holds it there, for unreachable budgets."""
    low, high = reachable(table, cost, mask)
    impossible = [budget for budget in budgets if budget < low * (1 - TOLERANCE)]
    if not budgets or impossible:
        allowed = mask[:, 0, :, None] & mask[:, 1, None, :]
        least = np.where(allowed, cost, np.inf).min((1, 2))
        heaviest = np.argsort(-least)[:3]
        held_by = ", ".join(f"{table.names[i]} ({least[i]:.4g})" for i in heaviest)
        raise ValueError(
            f"no configuration costs as little as {impossible}: the reachable range is {low:.6g} "
            f"to {high:.6g}; at the low end the largest parts are {held_by}"
            if budgets
            else "there is no budget to search for; give at least one"
        )


def _check_monotone(table: LayerTable, cost: np.ndarray, mask: np.ndarray) -> None:
    for layer, name in enumerate(table.names):
        allowed = cost[layer][np.ix_(mask[layer, WEIGHTS], mask[layer, ACTS])]
        if (np.diff(allowed, axis=0) > 0).any() or (np.diff(allowed, axis=1) > 0).any():
            raise ValueError(
                f"in the cost table, {name!r} costs more with fewer bits; mask the choices "
                "that cost more than a larger one"
            )


def search(
    score: Score,
    table: LayerTable,
    cost: np.ndarray,
    mask: np.ndarray,
    budgets: Sequence[float],
    batches: Iterator[tuple[Array, Array]],
    *,
    start_bits: int = 5,
    patience: int = 8,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Result:
    """Descends greedily and returns the configuration found for every budget.

    For each budget, the largest first: lower weights until the cost of the weights (at the start's
    activations) is 0.95 of that of the budget's anchor, the uniform weight bits whose cost is
    nearest to the budget; then lower activations until the budget is met. A phase that cannot
    move on hands over to the other. All candidates of a move are scored on one fresh batch, and
    the smallest `1.5 e / max(e) + c / max(c)` wins.

    The published search may stall or oscillate. Here moves outside the mask are never scored, a
    configuration is visited twice only where every cheaper one has been visited, and after
    `patience` moves without a new lowest cost only cheaper ones are scored; so the search ends, and
    no result exceeds its budget.

    Args:
        score: from `make_score`.
        table: the layers.
        cost: float [layers, weight choices, activation choices], from `costs.cost_table`.
        mask: bool [layers, 2, choices], what may be chosen (normally `table.mask`).
        budgets: largest allowed costs.
        batches: endless (images, labels), one pair per move.
        start_bits: uniform bits to start from. If a budget is above their cost, the search
            starts from the largest bits instead.
        patience: moves without a new lowest cost before only cheaper ones are considered.
        on_step: called after every move.

    Raises:
        ValueError: a budget lies below the reachable range, or more bits cost less somewhere.
    """
    check_budgets(table, cost, mask, budgets)
    _check_monotone(table, cost, mask)
    descent = _Descent(score, table, cost, mask, batches, start_bits, max(budgets), patience)
    by_budget: dict[float, Found] = {}
    for budget in sorted(set(budgets), reverse=True):
        descent.descend(budget, on_step)
        by_budget[budget] = Found(budget, descent.cost_now, descent.config(descent.state))
    return Result([by_budget[budget] for budget in budgets], descent.path)


class _Descent:
    """The state of a descent: choice indices [layers, 2], and where it has been."""

    def __init__(self, score, table, cost, mask, batches, start_bits, top_budget, patience):
        self.score, self.table, self.cost, self.mask = score, table, cost, mask
        self.batches, self.patience = batches, patience
        self.start = self._uniform(start_bits)
        if self.cost_of(self.start) < top_budget:
            self.start = self._uniform(max(table.candidates))
        self.state = self.start.copy()
        self.visited = {self.state.tobytes()}
        self.path: list[Step] = []
        self.lowest, self.since_lowest = self.cost_now, 0
        # One size of population for all moves, so that scoring compiles once.
        self.population = 2 * max(1, int((mask.sum(-1) > 1).sum(0).max()))

    @property
    def cost_now(self) -> float:
        return self.cost_of(self.state)

    def cost_of(self, state: np.ndarray) -> float:
        rows = np.arange(len(self.table))
        return float(self.cost[rows, state[:, WEIGHTS], state[:, ACTS]].sum())

    def config(self, state: np.ndarray) -> BitConfig:
        bits = jnp.array(self.table.candidates, jnp.int32)[state]
        return BitConfig(bits[..., WEIGHTS], bits[..., ACTS])

    def _uniform(self, wanted: int) -> np.ndarray:
        """Returns the allowed choice nearest to the wanted bits, the higher one of two."""
        distance = np.abs(np.array(self.table.candidates) - wanted)
        return np.where(self.mask, distance, np.iinfo(np.int64).max).argmin(-1)

    def descend(self, budget: float, on_step) -> None:
        phase, target = WEIGHTS, self._weight_target(budget)
        while self.cost_now > budget * (1 + TOLERANCE):
            if phase == WEIGHTS and self._weight_cost(self.state) <= target:
                phase = ACTS
            moves = self._moves(phase)
            if not self._can_go_down(phase):
                phase = 1 - phase  # nothing to lower here: the other tensor has to pay
                target = -np.inf
                moves = self._moves(phase)
            on_step(self._take_best(phase, moves))

    def _weight_cost(self, state: np.ndarray) -> float:
        return self.cost_of(np.stack([state[:, WEIGHTS], self.start[:, ACTS]], axis=1))

    def _weight_target(self, budget: float) -> float:
        anchors = [self._uniform(bits) for bits in self.table.bank_bits]
        nearest = min(anchors, key=lambda anchor: abs(np.log(self.cost_of(anchor) / budget)))
        return WEIGHT_PHASE_TARGET * self._weight_cost(nearest)

    def _can_go_down(self, phase: int) -> bool:
        return any(self.cost_of(state) < self.cost_now for _, state in self._neighbours(phase))

    def _neighbours(self, phase: int) -> list[tuple[int, np.ndarray]]:
        """Returns (layer, state) one candidate down or up in one layer."""
        found = []
        for layer in range(len(self.table)):
            allowed = np.flatnonzero(self.mask[layer, phase])
            place = int(np.searchsorted(allowed, self.state[layer, phase]))
            for other in (place + 1, place - 1):  # candidates descend: + 1 is fewer bits
                if 0 <= other < len(allowed):
                    state = self.state.copy()
                    state[layer, phase] = allowed[other]
                    found.append((layer, state))
        return found

    def _moves(self, phase: int) -> list[tuple[int, np.ndarray]]:
        """Returns the neighbours that may be moved to; never empty if the phase can go down."""
        neighbours = self._neighbours(phase)
        new = [move for move in neighbours if move[1].tobytes() not in self.visited]
        down = [move for move in neighbours if self.cost_of(move[1]) < self.cost_now]
        new_down = [move for move in new if self.cost_of(move[1]) < self.cost_now]
        if not new_down:
            return down
        return new if self.since_lowest < self.patience else new_down

    def _take_best(self, phase: int, moves: list[tuple[int, np.ndarray]]) -> Step:
        images, labels = next(self.batches)
        states = np.stack([state for _, state in moves])
        padding = np.repeat(states[:1], self.population - len(states), axis=0)
        population = self.config(np.concatenate([states, padding]))
        errors = np.asarray(self.score(population, images, labels), np.float64)[: len(states)]
        prices = np.array([self.cost_of(state) for state in states])
        finite = np.isfinite(errors)
        worst = errors[finite].max(initial=0.0) or 1.0
        relative = np.where(finite, errors / worst, NOT_FINITE)
        best = int(np.argmin(ERROR_WEIGHT * relative + prices / prices.max()))
        layer, self.state = moves[best]
        self.visited.add(self.state.tobytes())
        self.since_lowest = 0 if self.cost_now < self.lowest else self.since_lowest + 1
        self.lowest = min(self.lowest, self.cost_now)
        step = Step(
            phase="weights" if phase == WEIGHTS else "acts",
            layer=self.table.names[layer],
            bits=self.table.candidates[int(self.state[layer, phase])],
            cost=self.cost_now,
            score=float(errors[best]),
        )
        self.path.append(step)
        return step

"""A greedy descent by gain per cost, improved by exchanges with a tabu list.

All configurations are scored on the same images, so that small differences count: a configuration
is lowered where the score rises least for what is saved, and within the budget bits then wander
from layers that mind little to layers that mind much.

References:
    Glover, Tabu search, part I, ORSA Journal on Computing 1(3), 1989.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Key

from mpq_jax.search import greedy, ilp
from mpq_jax.search import problem as spaces
from mpq_jax.search.problem import Budget, Found, Score, Space, Step, Watch
from mpq_jax.supernet.layer_table import LayerTable

LEAST_RISE = 1e-9  # of a score: of moves that cost nothing, the one that saves most


def search(
    score: Score,
    table: LayerTable,
    candidates: Sequence[int],
    mask: np.ndarray,
    budgets: Sequence[Budget],
    key: Key[Array, ""],
    *,
    rounds: int = 4,
    proposals: int = 8,
    tenure: int = 4,
    watch: Watch = spaces.nobody,
) -> list[Found]:
    """Descends from the largest bits; exchanges bits within each budget on its way down.

    Args:
        score: see `space.Score`; all is scored with one key.
        table: the layers.
        candidates: bits of each choice, `table.candidates`.
        mask: bool [layers, 2, choices], what may be chosen (normally `table.mask`).
        budgets: what to keep within, without lower bounds.
        key: random key.
        rounds: exchanges per budget.
        proposals: moves that are scored in a step of the descent, and exchanges in a round: those
            that promise most.
        tenure: rounds during which what was exchanged stays.
        watch: called after every move.

    Returns:
        One configuration per budget, in their order.

    Raises:
        ValueError: a budget cannot be met, or more bits cost less somewhere.
    """
    space = Space(table, candidates, mask)
    ilp.check(space, budgets)
    greedy.check_monotone(space, budgets)
    state = space.largest()
    now = float(spaces.scored(score, space, [state], key)[0])
    found = {}
    for budget in spaces.tightest_last(budgets):
        state, now = descend(
            score, space, budget, key, state, now, proposals=proposals, watch=watch
        )
        state, now = improve(
            score,
            space,
            budget,
            key,
            state,
            now,
            rounds=rounds,
            proposals=proposals,
            tenure=tenure,
            watch=watch,
        )
        found[budget.name] = spaces.result(space, budget, state, now)
    return spaces.in_order(budgets, found)


def descend(
    score: Score,
    space: Space,
    budget: Budget,
    key,
    state: np.ndarray,
    now: float,
    *,
    proposals: int,
    watch: Watch,
) -> tuple[np.ndarray, float]:
    """Lowers one entry at a time, the least rise of the score per saving first.

    What an entry's rise was when it was scored last says whether it is worth scoring again.

    Returns:
        The first state within the budget, and its score.
    """
    rises: dict[int, float] = {}  # of the entries' next moves
    while (over := float(spaces.excess(budget, state))) > 0:
        moves = space.neighbors(state)
        moves = moves[spaces.excess(budget, moves) < over]
        if not len(moves) or over == np.inf:  # on a plateau, or where no single move has a cost
            moves = ilp.nearest(space, budget, state)[None]
        genes = [space.differing(state, move)[0] for move in moves]
        saved = (over if over < np.inf else 1.0) - spaces.excess(budget, moves)
        promised = np.array([rises.get(gene, -np.inf) for gene in genes]) / saved
        chosen = np.argsort(promised, kind="stable")[: np.isneginf(promised).sum() + proposals]
        scores = spaces.scored(score, space, moves[chosen], key)
        risen = spaces.rises(scores, now)
        rises |= {genes[place]: value for place, value in zip(chosen, risen, strict=True)}
        best = int(np.argmin(np.maximum(risen, LEAST_RISE) / saved[chosen]))
        after = moves[chosen[best]]
        watch(_step("descent", space, budget, state, after, scores[best]))
        rises.pop(genes[chosen[best]])
        state, now = after, float(scores[best])
    return state, now


def improve(
    score: Score,
    space: Space,
    budget: Budget,
    key,
    state: np.ndarray,
    now: float,
    *,
    rounds: int,
    proposals: int,
    tenure: int,
    watch: Watch,
) -> tuple[np.ndarray, float]:
    """Raises some entries and lowers others, within a budget.

    In each round all single moves are scored; of pairs of them that stay within the budget, those
    with the best sum are scored as well, and the best is taken even if it is worse than before.

    Returns:
        The best state that was scored, and its score.
    """
    best, tabu = (state, now), dict[int, int]()
    visited = {state.tobytes()}
    for round_number in range(rounds):
        free = [gene for gene in space.genes if tabu.get(gene, -1) < round_number]
        moves = space.neighbors(state, free)
        moves = moves[np.isfinite(spaces.excess(budget, moves))]
        if not len(moves):
            break
        scores = spaces.scored(score, space, moves, key)
        fits = np.flatnonzero(spaces.excess(budget, moves) == 0)
        if len(fits) and scores[fits].min() < best[1]:
            best = moves[fits[scores[fits].argmin()]], float(scores[fits].min())
        chosen = _proposals(
            space, budget, state, moves, spaces.rises(scores, now), visited, proposals
        )
        if not chosen:
            break
        scores = spaces.scored(score, space, chosen, key)
        place = int(np.argmin(scores))
        watch(_step("exchange", space, budget, state, chosen[place], scores[place]))
        tabu |= dict.fromkeys(space.differing(state, chosen[place]), round_number + tenure)
        state, now = chosen[place], float(scores[place])
        visited.add(state.tobytes())
        if now < best[1]:
            best = state, now
    return best


def _proposals(
    space: Space, budget: Budget, state, moves: np.ndarray, rises: np.ndarray, visited, count: int
) -> list[np.ndarray]:
    """Returns the most promising states within a budget, one or two moves away."""
    first, second = np.triu_indices(len(moves))  # a move with itself is that move alone
    changed = moves != state
    apart = ~(changed[first] & changed[second]).any((1, 2)) | (first == second)
    first, second = first[apart], second[apart]
    states = np.where(changed[second], moves[second], moves[first])
    promised = rises[first] + np.where(first == second, 0.0, rises[second])
    fits = (spaces.excess(budget, states) == 0) & np.isfinite(promised)
    found = []
    for place in np.flatnonzero(fits)[np.argsort(promised[fits], kind="stable")]:
        if len(found) < count and states[place].tobytes() not in visited:
            found.append(states[place])
    return found


def _step(phase: str, space: Space, budget: Budget, before, after, score) -> Step:
    return Step(phase, space.change(before, after), spaces.first_cost(budget, after), float(score))

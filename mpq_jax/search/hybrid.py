"""An integer program on measured sensitivities, refined by exchanges.

The program knows the whole network at once but takes the losses of layers for a sum; exchanges
know what layers do together but only nearby.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Key

from mpq_jax.search import ilp, objectives, tabu
from mpq_jax.search import problem as spaces
from mpq_jax.search.problem import Budget, Found, Score, Space, Watch
from mpq_jax.supernet.layer_table import LayerTable


def search(
    score: Score,
    table: LayerTable,
    candidates: Sequence[int],
    mask: np.ndarray,
    budgets: Sequence[Budget],
    key: Key[Array, ""],
    *,
    solutions: int = 8,
    rounds: int = 4,
    proposals: int = 8,
    tenure: int = 4,
    watch: Watch = spaces.nobody,
) -> list[Found]:
    """Starts each budget from the best scored solution of its program, then exchanges bits.

    Args:
        score: see `space.Score`; all is scored with one key.
        table: the layers.
        candidates: bits of each choice, `table.candidates`.
        mask: bool [layers, 2, choices], what may be chosen (normally `table.mask`).
        budgets: what to keep within.
        key: random key.
        solutions: see `ilp.search`.
        rounds: see `exchange.search`, as for the other two.
        proposals: exchanges that are scored in a round.
        tenure: rounds during which what was exchanged stays.
        watch: called after every program and every exchange.

    Returns:
        One configuration per budget, in their order.

    Raises:
        ValueError: a budget cannot be met.
    """
    space = Space(table, candidates, mask)
    ilp.check(space, budgets)
    objective = objectives.additive(space, objectives.measured_rises(score, space, key))
    found = {}
    for budget in budgets:
        (start,) = ilp.search(
            score,
            table,
            candidates,
            mask,
            [budget],
            key,
            objective=objective,
            solutions=solutions,
            watch=watch,
        )
        state = space.state_of(start.bits)
        now = float(spaces.scored(score, space, [state], key)[0])
        state, now = tabu.improve(
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

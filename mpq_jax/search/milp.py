"""Mixed-integer linear programs, solved exactly by HiGHS."""

from collections.abc import Sequence

import numpy as np
import scipy.optimize
from scipy.optimize import LinearConstraint

INFEASIBLE = 2  # status of scipy.optimize.milp


def minimize(
    objective: np.ndarray,
    rows: Sequence[LinearConstraint],
    *,
    upper: np.ndarray | float = 1.0,
    integral: np.ndarray | bool = True,
    relative_gap: float | None = None,
) -> np.ndarray | None:
    """Minimizes a linear function of variables from 0 to `upper`.

    Args:
        objective: coefficient of each variable.
        rows: linear constraints.
        upper: largest value of each variable, or of all.
        integral: whether each variable, or all of them, must be an integer.
        relative_gap: the solver stops at a solution proven to be so near to the optimum, relative
            to its objective; None: HiGHS's default, 1e-4.

    Returns:
        An optimal value of each variable; None if no values satisfy the constraints.

    Raises:
        RuntimeError: the solver failed.
    """
    bounds = scipy.optimize.Bounds(
        np.zeros_like(objective),  # pyright: ignore[reportArgumentType]
        np.broadcast_to(np.float64(upper), objective.shape),  # pyright: ignore[reportArgumentType]
    )
    result = scipy.optimize.milp(
        objective,
        integrality=np.broadcast_to(integral, objective.shape).astype(np.int64),
        bounds=bounds,
        constraints=list(rows),
        options={} if relative_gap is None else {"mip_rel_gap": relative_gap},
    )
    if result.status == INFEASIBLE:
        return None
    if not result.success:
        raise RuntimeError(f"the integer program was not solved: {result.message}")
    return result.x

"""Objectives of the integer program: tables of what each layer loses at each of its bits."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Key
from jaxtyping import ArrayLike as AnyArray

from mpq_jax.search.problem import Score, score_choices
from mpq_jax.search.space import SearchSpace
from mpq_jax.supernet import sensitivity
from mpq_jax.supernet.costs import allowed_pairs
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.sensitivity import Trace
from mpq_jax.supernet.state import SupernetState
from mpq_jax.supernet.supernet import Supernet


def measured_sensitivity(score: Score, space: SearchSpace, key: Key[Array, ""]) -> np.ndarray:
    """Measures how much the score increases if one entry alone leaves the largest configuration.

    Args:
        score: see `problem.Score`.
        space: the configurations.
        key: random key of the images.

    Returns:
        float64 [layers, 2 (weights, input), choices]: 0 at an entry's most bits, NaN where bits
        are not allowed or a score is not finite; tied entries all hold the increase of their group.

    Raises:
        ValueError: the largest configuration has no finite score.
    """
    largest = space.max_choices()
    moves = [(variable, c) for variable in space.variables for c in space.allowed(variable)]
    lowered = [space.with_choice(largest, variable, choice) for variable, choice in moves]
    scores = score_choices(score, space, [largest, *lowered], key)
    if not np.isfinite(scores[0]):
        raise ValueError(
            "the largest configuration has no finite score, so that nothing can be measured "
            "against it; is the supernet trained?"
        )
    increases = np.full(space.mask.shape, np.nan)
    increases[space.mask & (space.mask.sum(-1, keepdims=True) == 1)] = 0.0
    for (variable, choice), value in zip(moves, scores[1:] - scores[0], strict=True):
        increases[space.members(variable), choice] = value if np.isfinite(value) else np.nan
    return increases


def additive(space: SearchSpace, increases: np.ndarray) -> np.ndarray:
    """Returns the sum of what a layer's weights and input add, each by itself.

    Args:
        space: the configurations.
        increases: float64 [layers, 2, choices], from `measured_sensitivity`.

    Returns:
        float64 [layers, weight choices, activation choices]; a group of tied entries counts once,
        at the entry that leads it. Infinity where bits are not allowed or nothing was measured.
    """
    leaders = space.table.group_leaders
    leads = leaders == np.arange(leaders.size).reshape(leaders.shape)
    own = np.where(leads[..., None] | np.isnan(increases), increases, 0.0)
    total = own[:, 0, :, None] + own[:, 1, None, :]
    return np.where(allowed_pairs(space.table) & np.isfinite(total), total, np.inf)


def hawq(
    table: LayerTable,
    traces: Float[AnyArray, " layers"],
    weight_errors: Float[AnyArray, "layers choices"],
) -> np.ndarray:
    """Returns the average Hessian trace x the squared error of the weights, by layer and bits.

    Half of its sum is the expected increase of the loss. A negative trace, which near a minimum is
    noise of the estimate, counts as 0, so that errors are never rewarded.

    Args:
        table: the layers.
        traces: average trace of each layer's Hessian: trace / number of weights.
        weight_errors: `||Q(W_l, b) - W_l||^2` at each of `table.candidates`; entries that the
            rules forbid are not read.

    Returns:
        float64 [layers, weight choices, activation choices], the same at all activation bits; 0
        in layers without a choice, infinity where the rules forbid.

    References:
        Dong et al., HAWQ-V2, https://arxiv.org/abs/1911.03852, Eq. 2.11.
    """
    errors = np.where(table.mask[:, 0], np.asarray(weight_errors, np.float64), 0)
    return _objective(table, np.maximum(np.asarray(traces, np.float64), 0), errors)


def paper(
    table: LayerTable,
    traces: Float[AnyArray, " layers"],
    weight_errors: Float[AnyArray, "layers choices"],
) -> np.ndarray:
    """Returns the average Hessian trace x weight bits, as the Double Rounding paper prints it.

    Read literally, it punishes bits in sensitive layers, against the paper's text; hence it is not
    the default, and fewer bits are always better unless the cost has a lower bound. Traces
    (t_l / n_l in the paper) are taken as they are and `weight_errors` is not read; otherwise this
    takes and returns the same as `hawq`.

    References:
        Double Rounding, https://arxiv.org/abs/2502.01565, the objective of its iterative ILP.
    """
    del weight_errors
    bits = np.tile(np.array(table.candidates, np.float64), (len(table), 1))
    return _objective(table, np.asarray(traces, np.float64), bits)


def _objective(table: LayerTable, traces: np.ndarray, by_weights: np.ndarray) -> np.ndarray:
    if traces.shape != (len(table),) or by_weights.shape != (len(table), len(table.candidates)):
        raise ValueError(
            f"traces have shape {traces.shape} and weight errors {by_weights.shape}; wanted one "
            f"trace for each of the {len(table)} layers, and errors [layers, choices]"
        )
    chosen = np.where(table.searchable[:, None], traces[:, None] * by_weights, 0)
    return np.where(allowed_pairs(table), chosen[:, :, None], np.inf)


OBJECTIVES: dict[str, Callable[..., np.ndarray]] = {
    "hawq": hawq,
    "paper": paper,
}


def check_inputs_are_determined(table: LayerTable) -> None:
    """Raises ValueError if a Hessian objective, which knows only weights, would choose inputs."""
    if table.searchable_products:
        raise ValueError(
            f"the objectives {sorted(OBJECTIVES)} know only kernels, and "
            f"{table.searchable_products[0]!r} is a "
            "product of activations with a choice of bits; fix its bits by a rule, or use the "
            "measured objective"
        )
    has_choice = np.array([len(layer.act_candidates) > 1 for layer in table.layers])
    if (has_choice & (table.group_leaders[:, 0] != table.group_leaders[:, 1])).any():
        raise ValueError(
            f"the objectives {sorted(OBJECTIVES)} know only weights and would give every input its "
            "fewest bits; tie the inputs to the weights (tie_acts_to_weights), fix them by rules, "
            "or use the measured objective"
        )


def hessian_objective(
    net: Supernet,
    state: SupernetState,
    batches: Iterable[dict[str, Any]],
    key: Key[Array, ""],
    *,
    name: str,
    probes: int,
) -> tuple[np.ndarray, Trace]:
    """Computes an objective from the Hessian traces of the float model inside a supernet.

    Args:
        net: the supernet.
        state: its state.
        batches: labeled batches, see `sensitivity.layer_traces`.
        key: random key of the probes.
        name: a key of `OBJECTIVES`.
        probes: number of random vectors.

    Returns:
        float64 [layers, weight choices, activation choices], and the traces.
    """
    variables = net.float_variables(state, net.table.max_config)
    traces = sensitivity.layer_traces(net, variables, batches, key, probes=probes)
    errors = sensitivity.weight_errors(net, state.trainable)
    weights = np.array([max(layer.params, 1) for layer in net.table.layers])
    return OBJECTIVES[name](net.table, np.asarray(traces.mean) / weights, errors), traces

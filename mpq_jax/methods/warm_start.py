"""Warm starts: variables read from the checkpoint of a finished run, with checks."""

from typing import Any

import jax
import jax.numpy as jnp

from mpq_jax.program import paths
from mpq_jax.supernet.state import SupernetState, TrainableParams
from mpq_jax.supernet.supernet import Supernet

PyTree = Any
SHOWN_DIFFERENCES = 5


def float_variables(saved: dict[str, Any], wanted: PyTree) -> PyTree:
    """Reads the float model from a checkpoint of float training.

    Args:
        saved: checkpoint as nested dicts, from `checkpoints.load_best`.
        wanted: variables of the model to train, or their shapes.

    Raises:
        ValueError: the checkpoint is from another method or for another model.
    """
    if not {"params", "batch_stats"} <= set(saved):
        raise ValueError(
            f"it holds no float run but {sorted(saved)}; train one with --config=FILE:float"
        )
    variables = {name: saved[name] for name in ("params", "batch_stats")}
    _check_shapes(variables, {name: wanted.get(name, {}) for name in variables})
    return variables


def supernet_or_float_variables(net: Supernet, saved: dict[str, Any], wanted: PyTree) -> PyTree:
    """Reads the network from a checkpoint of multi-precision training, or a float model.

    Args:
        net: supernet to train.
        saved: checkpoint as nested dicts. Candidates and quantizer must be those of `net`; the
            checkpoint does not record them.
        wanted: float variables of the model, or their shapes.

    Raises:
        ValueError: the checkpoint is for another model or another number of candidates.
    """
    if "variables" not in saved:
        return float_variables(saved, wanted)
    table, content = net.table, saved["variables"]
    variables = SupernetState(
        TrainableParams(**content["trainable"]), content.get("batch_stats", {}), content["signed"]
    )
    _check_shapes(
        {"weight_step_sizes": variables.trainable.weight_step_sizes},
        {"weight_step_sizes": jnp.zeros((len(table), len(table.candidates)))},
    )
    # Shapes without norm banks are those of the float model.
    single = jax.eval_shape(lambda state: net.float_variables(state, table.max_config), variables)
    _check_shapes(single, {name: wanted.get(name, {}) for name in single})
    return variables


def _check_shapes(loaded: PyTree, wanted: PyTree) -> None:
    shapes, wanted_shapes = (
        {name: tuple(leaf.shape) for name, leaf in paths.flatten(tree).items()}
        for tree in (loaded, wanted)
    )
    if shapes != wanted_shapes:
        different = sorted(dict(shapes.items() ^ wanted_shapes.items()))[:SHOWN_DIFFERENCES]
        raise ValueError(
            "it is of another model than config.model, or of other bits or bn_banks: these "
            f"differ: {', '.join(different)}"
        )

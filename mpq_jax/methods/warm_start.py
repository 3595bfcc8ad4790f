"""Warm starts: variables taken from the checkpoint of a finished run, checked."""

from typing import Any

import jax
import jax.numpy as jnp

from mpq_jax.program import paths
from mpq_jax.supernet.supernet import Supernet, SupernetState, TrainableParams

PyTree = Any
SHOWN_DIFFERENCES = 5


def float_variables(saved: dict[str, Any], wanted: PyTree) -> PyTree:
    """Takes the float model out of a checkpoint of float training.

    Args:
        saved: the checkpoint as nested dicts, from `checkpoints.load_best`.
        wanted: variables of the model that is going to be trained, or their shapes.

    Raises:
        ValueError: the checkpoint is of another method or of another model.
    """
    if not {"params", "batch_stats"} <= set(saved):
        raise ValueError(
            f"it holds no float run but {sorted(saved)}; train one with --config=FILE:float"
        )
    found = {name: saved[name] for name in ("params", "batch_stats")}
    _check_shapes(found, {name: wanted.get(name, {}) for name in found})
    return found


def supernet_or_float_variables(net: Supernet, saved: dict[str, Any], wanted: PyTree) -> PyTree:
    """Takes the network out of a checkpoint of multi-precision training, or a float model.

    Args:
        net: the network that is going to be trained.
        saved: the checkpoint as nested dicts; of the same candidates and the same quantizer, which
            it does not say itself.
        wanted: float variables of the model, or their shapes.

    Raises:
        ValueError: the checkpoint is of another model or of another number of candidates.
    """
    if "variables" not in saved:
        return float_variables(saved, wanted)
    table, held = net.table, saved["variables"]
    variables = SupernetState(
        TrainableParams(**held["trainable"]), held.get("batch_stats", {}), held["signed"]
    )
    _check_shapes(
        {"weight_step_sizes": variables.trainable.weight_step_sizes},
        {"weight_step_sizes": jnp.zeros((len(table), len(table.candidates)))},
    )
    narrow = jax.eval_shape(lambda found: net.float_variables(found, table.max_config), variables)
    _check_shapes(narrow, {name: wanted.get(name, {}) for name in narrow})
    return variables


def _check_shapes(found: PyTree, wanted: PyTree) -> None:
    shapes, wanted_shapes = (
        {name: tuple(leaf.shape) for name, leaf in paths.flatten(tree).items()}
        for tree in (found, wanted)
    )
    if shapes != wanted_shapes:
        other = sorted(dict(shapes.items() ^ wanted_shapes.items()))[:SHOWN_DIFFERENCES]
        raise ValueError(
            "it is of another model than config.model, or of other bits or bn_banks: these "
            f"differ: {', '.join(other)}"
        )

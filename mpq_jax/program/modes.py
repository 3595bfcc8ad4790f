"""Checks that training and evaluation mode of a model are what the library takes them for."""

from typing import Any

import jax
import jax.numpy as jnp

from mpq_jax.program.liveness import find_live
from mpq_jax.program.network import Network
from mpq_jax.program.trace import Program, trace

SHOWN = 3  # names in a message


def check_modes(network: Network, variables: Any, inputs: Any) -> None:
    """Checks which statistics the norms of a model use, by its programs.

    Args:
        network: the model.
        variables: its variables or their shapes.
        inputs: a batch of inputs or its shapes.

    Raises:
        ValueError: norms do not use running statistics in evaluation, or none updates them in
            training, or they are updated in a form that cannot be re-estimated.
    """
    if not variables.get("batch_stats"):
        return
    evaluation = trace(network, variables, inputs, train=False)
    changed = _changed(evaluation)
    if changed:
        raise ValueError(
            f"{network.label} changes running statistics in evaluation mode ({_some(changed)}), so "
            "its outputs depend on the batch; let its norms use running statistics when it is "
            "called with train=False (`use_running_average=not train`)"
        )
    if not find_live(evaluation).variables.intersection(filter(None, evaluation.results)):
        raise ValueError(
            f"{network.label} has running statistics, but does not read them in evaluation mode; "
            "let its norms use them when it is called with train=False"
        )
    key = jax.random.key(0)
    training = trace(network, variables, inputs, train=True, dropout_key=key)
    updated = _changed(training)
    if not updated:
        raise ValueError(
            f"{network.label} does not update its running statistics in training mode; give it an "
            "argument `train`, and let its norms use those of the batch where it is true. "
            "Statistics that never change belong among the parameters"
        )
    unknown = [name for name in updated if name not in training.sites.moments]
    if unknown:
        raise ValueError(
            f"{network.label} updates running statistics in a form that is not known "
            f"({_some(unknown)}); wanted decay * running + (1 - decay) * statistic of the batch"
        )


def _changed(program: Program) -> list[str]:
    """Lists the statistics that a program does not return as it got them; no counters."""
    avals = program.jaxpr.out_avals
    return [
        name
        for name, value, aval in zip(program.results, program.sites.results, avals, strict=True)
        if name is not None and value.leaf != name and jnp.issubdtype(aval.dtype, jnp.floating)
    ]


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"

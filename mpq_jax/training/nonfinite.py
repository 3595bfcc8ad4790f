"""Detects non-finite metrics and state before they are saved."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

SHOWN_LEAVES = 3  # of a state of hundreds


def first_bad_step(metrics: Sequence[Mapping[str, Any]]) -> tuple[int, dict[str, float]] | None:
    """Finds the first step with a metric that is not finite.

    Args:
        metrics: scalars of consecutive steps, on the host.

    Returns:
        Its index in `metrics` and its non-finite metrics by name; None if all are finite.
    """
    for place, scalars in enumerate(metrics):
        bad = {name: float(value) for name, value in scalars.items() if not np.isfinite(value)}
        if bad:
            return place, bad
    return None


def nonfinite_leaves(tree: PyTree) -> list[str]:
    """Names the arrays with a value that is infinite or not a number, by their paths.

    Computed on the devices in one program; only one bit per array comes to the host.

    Args:
        tree: arrays of any types; all processes of a run call this together.
    """
    floats = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    if not floats:
        return []
    names, leaves = zip(*floats, strict=True)
    finite = np.asarray(_all_finite(leaves))
    return [name for name, good in zip(names, finite, strict=True) if not good]


def shorten(names: Sequence[str]) -> str:
    """Joins the first names of a long list and counts the others."""
    more = f" and {len(names) - SHOWN_LEAVES} more" if len(names) > SHOWN_LEAVES else ""
    return ", ".join(names[:SHOWN_LEAVES]) + more


@jax.jit
def _all_finite(leaves: tuple[Array, ...]) -> Bool[Array, " arrays"]:
    """Whether all values of each array are finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])

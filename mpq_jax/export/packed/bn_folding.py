"""Norms of a network as one multiplication and one addition.

folded = fold(variables, norms_of(exported))  # multiplier and offset by path of the norm
"""

from typing import Any

import numpy as np

from mpq_jax.export import program
from mpq_jax.export.exported_model import ExportedModel
from mpq_jax.export.packed import norm_encoding
from mpq_jax.program.norms import Norm, find_norms


def norms_of(exported: ExportedModel) -> dict[str, Norm]:
    """Finds the norms of a network that may be folded, by path."""
    return find_norms(program.of_one_example(exported))


def fold(variables: dict[str, Any], norms: dict[str, Norm]) -> dict[str, norm_encoding.Leaves]:
    """Folds every norm that multiplies and adds one number per channel of the last axis.

    Norms by statistics of the batch, norms along another axis, and norms whose calls differ are
    left out.

    Args:
        variables: variables of the network, on the host, as by `program.flat_variables`; norms may
            have leading row axes.
        norms: its norms.

    Returns:
        "multiplier" and "offset" by path of the norm, float64 [rows..., channels].
    """
    folded = {}
    for path, norm in norms.items():
        try:
            numbers = norm.affine(variables)
        except ValueError:  # along another axis, or computed in a way of its own
            continue
        folded[path] = dict(zip(norm_encoding.FOLDED, numbers, strict=True))
    return folded


def keep(variables: dict[str, Any]) -> dict[str, norm_encoding.Leaves]:
    """Takes the norms with all four leaves in float32 out of a network's variables, as they are."""
    parents = {path.rpartition("/")[0].partition("/")[2] for path in variables}
    kept = {}
    for name in sorted(parents):
        found = [variables.get(norm_encoding.leaf_path(name, leaf)) for leaf in norm_encoding.KEPT]
        leaves = [np.asarray(leaf) for leaf in found if leaf is not None]
        alike = {(leaf.shape, leaf.dtype.name) for leaf in leaves}
        if len(leaves) == len(norm_encoding.KEPT) and alike == {(leaves[0].shape, "float32")}:
            kept[name] = dict(zip(norm_encoding.KEPT, leaves, strict=True))
    return kept

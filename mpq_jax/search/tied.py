"""Search over layers whose weights and input always have the same bits."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mpq_jax.bits import BitConfig
from mpq_jax.layer_table import LayerTable
from mpq_jax.search.evaluate import Score


class Tied(NamedTuple):
    """A search in which a layer's input follows its weights, for searches that know both.

    Attributes:
        cost: float64 [layers, weight, activation choices]; of a tied layer it is that of equal
            bits, whatever the activation bits.
        mask: bool [layers, 2, choices]; a tied layer's input has one choice, which means nothing.
        score: scores configurations after `follow`.
        follow: gives tied inputs the bits of their weights, in one configuration or many.
    """

    cost: np.ndarray
    mask: np.ndarray
    score: Score
    follow: Callable[[BitConfig], BitConfig]


def tie(table: LayerTable, cost: np.ndarray, score: Score) -> Tied:
    """Returns the problem in which layers with a choice for both have equal bits.

    Methods that train equal bits have seen no others. A layer with only one candidate for its
    weights or its input keeps what it may take.

    Args:
        table: the layers.
        cost: float64 [layers, weight, activation choices].
        score: from `make_score`.

    Raises:
        ValueError: a layer with a choice of both has no bits in common.
    """
    tied = (table.mask.sum(axis=-1) > 1).all(axis=-1)
    common = table.mask[:, 0] & table.mask[:, 1]
    lacking = [
        name for name, t, row in zip(table.names, tied, common, strict=True) if t > row.any()
    ]
    if lacking:
        raise ValueError(
            f"weights and input of {', '.join(lacking)} have no bits in common; do not tie them"
        )
    equal = np.diagonal(cost, axis1=1, axis2=2)[:, :, None]
    mask = table.mask.copy()
    mask[tied, 0] = common[tied]
    mask[tied, 1] = np.cumsum(common[tied], axis=1) * common[tied] == 1  # the first choice

    def follow(configs: BitConfig) -> BitConfig:
        acts = jnp.where(jnp.asarray(tied), jnp.asarray(configs.weights), jnp.asarray(configs.acts))
        return configs._replace(acts=acts)

    def tied_score(configs: BitConfig, images: Array, labels: Array) -> Array:
        return score(follow(configs), images, labels)

    return Tied(np.where(tied[:, None, None], equal, cost), mask, tied_score, follow)

"""RFQuant's dynamic bit-width scheduler, which freezes the lowest bits of unstable layers."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mpq_jax.methods.rfquant.options import Options
from mpq_jax.supernet import sensitivity
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.state import TrainableParams
from mpq_jax.supernet.supernet import Supernet


def freeze_ratio(epoch: int, *, epochs: int, options: Options) -> float | None:
    """Computes the fraction of layers to freeze at the start of an epoch; None: no event.

    There is an event if `epoch > start` and `epoch + 1` is a multiple of the period, which is
    longer late in the run. The ratio follows a cosine from its start to its end value. Periods are
    at least one epoch, so that short runs work.

    References:
        RFQuant's published code. At 150 epochs: 54 events, at epochs 7, 9, ..., 107, 119, 134
        and 149, with ratios from 0.5 to 0.2.
    """
    first, last = options.freeze_ratio_start, options.freeze_ratio_end
    if first == 0 and last == 0:
        return None
    start = round(options.freeze_start * epochs)
    early = max(1, round(options.freeze_period * epochs))
    late = max(1, round(options.freeze_late_period * epochs))
    period = early if epoch <= int(options.freeze_late_from * epochs) else late
    if epoch <= start or (epoch + 1) % period != 0:
        return None
    progress = ((epoch - start) // early) / max(1, epochs // early)
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * progress))


def instabilities(
    net: Supernet,
    trainable: TrainableParams,
    mask: Bool[Array, "layers 2 choices"],
    *,
    options: Options,
) -> Float[Array, " freezable"]:
    """Computes the instability of every layer that can be frozen, in the order of the table."""
    table = net.table
    rows = freezable(table)
    common = table.mask[rows, 0].all(axis=0)
    use_common = options.freeze_scores == "common" and common.any()
    kernels = net.kernels(trainable.params)
    scored = [common if use_common else mask[row, 0] for row in rows]
    return jnp.stack(
        [
            sensitivity.instability(
                kernels[row],
                trainable.weight_step_sizes[row],
                jnp.array(table.candidates, jnp.int32),
                allowed,
                proportion=options.freeze_proportion,
            )
            for row, allowed in zip(rows, scored, strict=True)
        ]
    )


def freezable(table: LayerTable) -> list[int]:
    """Lists the indices of the layers with a choice of weight bits; products have no weights."""
    return [i for i, layer in enumerate(table.layers) if layer.weights_searchable]


def freeze(
    table: LayerTable, scores: Float[Array, " freezable"], count: Array, *, options: Options
) -> Bool[Array, "layers 2 choices"]:
    """Masks the lowest bits of the `count` most unstable layers.

    All other layers get back every choice that the rules allow, so at most one candidate of a layer
    is masked. Ties are broken by the order of the table.
    """
    full = table.mask
    rank = jnp.argsort(jnp.argsort(-scores, stable=True), stable=True)
    frozen = jnp.zeros(len(table), bool).at[np.array(freezable(table))].set(rank < count)
    has_choice = full.sum(-1, keepdims=True) > 1
    # Candidates descend: the lowest allowed one is the first from the right.
    lowest = full & has_choice & (np.cumsum(full[..., ::-1], axis=-1)[..., ::-1] == 1)
    if not options.freeze_acts:
        lowest[:, 1] = False
    mask = jnp.asarray(full) & ~(jnp.asarray(lowest) & frozen[:, None, None])
    flat = mask.reshape(-1, mask.shape[-1])
    for group in table.tied_groups:  # a choice masked for one slot is masked for its group
        flat = flat.at[np.array(group)].set(flat[np.array(group)].all(axis=0))
    return flat.reshape(mask.shape)

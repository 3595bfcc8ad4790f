"""Optax pieces: learning rates in fractions of a run, and updates that skip unused rows."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array


def warmup_cosine(
    *,
    peak: float,
    end: float,
    start: float,
    warmup: float,
    steps: int,
    steps_per_epoch: int,
    change: Literal["step", "epoch"],
) -> optax.Schedule:
    """Returns RFQuant's learning rate: linear warm-up, then a cosine that began at step 0.

    With t the part of the run that is over: `start + t / warmup (peak - start)` before `warmup`,
    `end + (peak - end) (1 + cos(pi t)) / 2` from there on.

    Args:
        peak: highest rate.
        end: rate at the end.
        start: rate at the first step of the warm-up.
        warmup: length of the warm-up as a fraction of the run.
        steps: length of the run.
        steps_per_epoch: optimiser steps of an epoch.
        change: "epoch" holds the rate during an epoch (as published), "step" does not.
    """
    if change not in ("step", "epoch"):
        raise ValueError(f'change is {change!r}; wanted "step" or "epoch"')
    warmup_steps = math.ceil(round(warmup * steps, 6))  # compared in whole steps: t is rounded
    held = steps_per_epoch if change == "epoch" else 1

    def rate(step) -> Array:
        held_step = jnp.minimum(jnp.asarray(step, jnp.int32) // held * held, steps)
        t = held_step.astype(jnp.float32) / steps
        cosine = end + 0.5 * (peak - end) * (1 + jnp.cos(jnp.pi * t))
        rising = start + (peak - start) * t / max(warmup, 1e-9)
        return jnp.where(held_step < warmup_steps, rising, cosine)

    return rate


def skip_unused_rows(
    inner: optax.GradientTransformation, *, row_axes: int = 2
) -> optax.GradientTransformationExtraArgs:
    """Makes every row of a parameter a parameter of its own, left alone when it was not used.

    A row that no sampled configuration used has a zero gradient, yet momentum would still move
    it. Here each row has its own state of `inner`, step counter included, and a row with `used`
    false keeps its value and its state (as PyTorch treats a parameter whose gradient is None).

    Args:
        inner: transformation applied to each row.
        row_axes: number of leading axes of every leaf that enumerate rows.

    Returns:
        A transformation whose `update` takes `used`: a tree like the updates, of booleans over
        the row axes of each leaf.
    """

    def over_rows(function):
        for _ in range(row_axes):
            function = jax.vmap(function)
        return function

    def init(params):
        return jax.tree.map(over_rows(inner.init), params)

    def update_leaf(update, state, param, used):
        new_update: Any
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam raises floats to integers
            new_update, new_state = over_rows(inner.update)(update, state, param)

        def keep(new, old):
            return jnp.where(used.reshape(used.shape + (1,) * (new.ndim - row_axes)), new, old)

        zeros = jnp.zeros_like(new_update)
        return keep(new_update, zeros), jax.tree.map(keep, new_state, state)

    def update(updates, state, params=None, *, used, **_):
        if params is None:
            raise ValueError("skip_unused_rows needs the parameters: call update(..., params)")
        leaves, structure = jax.tree.flatten(updates)
        rest = (structure.flatten_up_to(tree) for tree in (state, params, used))
        pairs = [update_leaf(*row) for row in zip(leaves, *rest, strict=True)]
        updates_of, states_of = ([pair[part] for pair in pairs] for part in (0, 1))
        return structure.unflatten(updates_of), structure.unflatten(states_of)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def ema_decay(step: Array, *, decay: float, warmup: bool) -> Array:
    """Returns the decay of an exponential moving average at a step.

    With a warm-up, min(decay, (1 + step) / (10 + step)): early values are forgotten at once, so
    that short runs end with an average of trained values.
    """
    step = jnp.asarray(step).astype(jnp.float32)
    growing = (1.0 + step) / (10.0 + step)
    return jnp.minimum(decay, growing) if warmup else jnp.full_like(growing, decay)

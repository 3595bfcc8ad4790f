"""Optax building blocks: schedules, learning rates by precision, updates that skip unused rows."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from jaxtyping import ArrayLike as AnyArray


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
    """Makes RFQuant's schedule: linear warm-up, then a cosine that starts at step 0.

    With t the completed fraction of the run, the rate is `start + t / warmup (peak - start)` before
    `warmup` and `end + (peak - end) (1 + cos(pi t)) / 2` afterwards.

    Args:
        peak: highest rate.
        end: rate at the end of the run.
        start: rate at the first step of the warm-up.
        warmup: length of the warm-up as a fraction of the run.
        steps: length of the run in steps.
        steps_per_epoch: optimizer steps per epoch.
        change: unit at which the rate changes: "epoch" (constant within an epoch, as published) or
            "step".
    """
    if change not in ("step", "epoch"):
        raise ValueError(f'change is {change!r}; wanted "step" or "epoch"')
    warmup_steps = math.ceil(round(warmup * steps, 6))  # an integer, as t has rounding errors
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
    """Treats every row of a parameter as a separate parameter, and skips rows that were not used.

    A row that no sampled configuration used has a zero gradient, but momentum would still move it.
    Here each row has its own state of `inner`, including the step counter, and a row with `used`
    false keeps its value and its state (as PyTorch does for a parameter without a gradient).

    Args:
        inner: transformation applied to each row.
        row_axes: number of leading axes of every leaf that enumerate rows.

    Returns:
        A transformation whose `update` takes `used`: a tree like the updates, with booleans over
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
        with jax.numpy_dtype_promotion("standard"):  # for Adam, see scale_by_adam
            new_update, new_state = over_rows(inner.update)(update, state, param)

        def keep(new, old):
            return jnp.where(used.reshape(used.shape + (1,) * (new.ndim - row_axes)), new, old)

        zeros = jnp.zeros_like(new_update)
        return keep(new_update, zeros), jax.tree.map(keep, new_state, state)

    def update(updates, state, params=None, *, used, **_):
        if params is None:
            raise ValueError("skip_unused_rows needs the parameters: call update(..., params)")
        leaves, structure = jax.tree.flatten(updates)
        others = (structure.flatten_up_to(tree) for tree in (state, params, used))
        pairs = [update_leaf(*row) for row in zip(leaves, *others, strict=True)]
        updates_of, states_of = ([pair[part] for pair in pairs] for part in (0, 1))
        return structure.unflatten(updates_of), structure.unflatten(states_of)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def ema_decay(step: Array, *, decay: float, warmup: bool) -> Array:
    """Computes the decay of an exponential moving average at a step.

    With a warm-up, it is min(decay, (1 + step) / (10 + step)): early values are forgotten quickly,
    so that the average of a short run consists of trained values.
    """
    step = jnp.asarray(step).astype(jnp.float32)
    growing = (1.0 + step) / (10.0 + step)
    return jnp.minimum(decay, growing) if warmup else jnp.full_like(growing, decay)


def scale_by_adam() -> optax.GradientTransformationExtraArgs:
    """Makes optax's Adam, usable under strict dtype promotion too."""
    inner = optax.scale_by_adam()

    def update(updates, state, params=None, **_):
        with jax.numpy_dtype_promotion("standard"):  # Adam raises floats to integer powers
            return inner.update(updates, state, params)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def scale_by_given_rate() -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by minus the extra argument `learning_rate`.

    This suits optimizers that are called several times per training step, for which a schedule that
    counts calls would run too fast.
    """

    def update(updates, state, params=None, *, learning_rate, **_):
        del params
        return jax.tree.map(lambda leaf: -learning_rate * leaf, updates), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        update,  # pyright: ignore[reportArgumentType]
    )


class AlrsState(NamedTuple):
    """State of `alrs`, with scalars of the last update for logs.

    Attributes:
        inner: state of the inner transformation.
        learning_rate: learning rate of the scales, lambda_b.
        mean_gradient: mean over the layers of their clipped gradients, 0 to 1.
    """

    inner: Any
    learning_rate: Float[Array, ""]
    mean_gradient: Float[Array, ""]


def precision_factor(bits: Int[AnyArray, ""], max_bits: Int[AnyArray, ""]) -> Float[Array, ""]:
    """Computes eta_b, the learning-rate factor of a precision in ALRS.

    With D = max_bits - bits, the factor is 10^(-D/2) for even D and 5 * 10^(-(D+1)/2) for odd D.
    """
    distance = (jnp.asarray(max_bits, jnp.int32) - jnp.asarray(bits, jnp.int32)).astype(jnp.float32)
    odd = distance % 2 == 1
    return jnp.where(odd, 5 * 10 ** (-(distance + 1) / 2), 10 ** (-distance / 2))


ALRS_VARIANTS: dict[str, Callable[[Array, Array], Array]] = {
    "floor": lambda rate, mean: jnp.maximum(rate - mean, 0),
    "literal": lambda rate, mean: rate - mean,
    "relative": lambda rate, mean: rate * (1 - mean),
    "constant": lambda rate, mean: rate,
}


def largest_per_leaf(gradients: Any) -> Float[Array, " layers"]:
    """Computes the largest absolute gradient of every leaf, which holds the scales of one layer."""
    return jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(gradients)])


def alrs(
    inner: optax.GradientTransformation | None = None,
    *,
    max_bits: int,
    variant: str = "relative",
    clip: float = 1.0,
    per_layer: Callable[[Any], Float[Array, " layers"]] = largest_per_leaf,
) -> optax.GradientTransformationExtraArgs:
    """Adaptive learning-rate scaling (ALRS): update rule of quantization scales by precision.

    The scales of precision b are updated at the rate lambda_b along the directions that `inner`
    computes from their gradients, with

        lambda_b = eta_b (lambda - m),  m = mean over layers of min(max |clip(gradient)|, 1)

    and eta_b as in `precision_factor`. As printed, lambda_b is negative if m exceeds the scheduled
    rate lambda, a case that the paper does not discuss; hence the variants:

    - "floor": the printed formula, at least 0, so that scales do not change if m exceeds lambda;
    - "literal": the printed formula; if it is negative, scales ascend;
    - "relative": eta_b lambda (1 - m), as described in the paper's text; never negative;
    - "constant": eta_b lambda, the factor of the precision alone.

    `update` takes the extra arguments `bits` (the precision trained in this update) and
    `learning_rate` (lambda, the scheduled rate). The incoming gradients must be those of the loss:
    put it first in a chain, with the optimizer as `inner`; it applies the learning rate itself.
    `optax.tree_utils.tree_get(state, "learning_rate")` reads lambda_b for logs.

    Args:
        inner: transformation from gradients to directions, without rate and sign, such as
            `scale_by_adam` or `optax.trace` (not `optax.adam`); None: Adam (as published).
        max_bits: bits of the highest precision.
        variant: variant of the formula, a key of `ALRS_VARIANTS`.
        clip: bound of every gradient element in m.
        per_layer: function from the gradients to the largest absolute gradient of each layer's
            scales, [layers]; by default each leaf is one layer.

    Example:
        optimizer = optax.partition(
            {"weights": optax.adam(5e-4), "scales": alrs(max_bits=8)}, labels)
        updates, state = optimizer.update(
            gradients, state, params, bits=4, learning_rate=5e-4)

    References:
        Nearly Lossless Adaptive Bit Switching, https://arxiv.org/abs/2502.01565, section on
        adaptive learning-rate scaling.
    """
    if variant not in ALRS_VARIANTS:
        raise ValueError(f"variant is {variant!r}; wanted one of {sorted(ALRS_VARIANTS)}")
    if clip <= 0:
        raise ValueError(f"clip is {clip}; wanted a positive bound")
    direction = optax.with_extra_args_support(optax.scale_by_adam() if inner is None else inner)

    def init(params):
        zero = jnp.zeros((), jnp.float32)
        return AlrsState(direction.init(params), zero, zero)

    def update(updates, state, params=None, *, bits, learning_rate, **extra_args):
        clipped = jax.tree.map(lambda leaf: jnp.clip(leaf, -clip, clip), updates)
        mean = jnp.mean(jnp.minimum(per_layer(clipped), 1)).astype(jnp.float32)
        rate = jnp.asarray(learning_rate, jnp.float32)
        scaled = precision_factor(bits, max_bits) * ALRS_VARIANTS[variant](rate, mean)
        with jax.numpy_dtype_promotion("standard"):  # for Adam, see scale_by_adam
            directions, inner_state = direction.update(updates, state.inner, params, **extra_args)
        updates = jax.tree.map(lambda leaf: -scaled.astype(leaf.dtype) * leaf, directions)
        return updates, AlrsState(inner_state, scaled, mean)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]

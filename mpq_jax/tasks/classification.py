"""Losses of one batch; all return the mean over the images."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"], *, smoothing: float
) -> Float[Array, ""]:
    """Returns the label-smoothed cross-entropy.

    `(1 - smoothing) nll + smoothing mean over classes of (-log p)`.
    """
    log_p = jax.nn.log_softmax(logits)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean((1 - smoothing) * nll - smoothing * jnp.mean(log_p, axis=-1))


def kl_to_teacher(
    logits: Float[Array, "batch classes"], teacher: Float[Array, "batch classes"]
) -> Float[Array, ""]:
    """Returns KL(softmax(teacher) || softmax(logits)) without temperature."""
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(logits)
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def accuracy(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]
) -> Float[Array, ""]:
    """Returns the top-1 accuracy, 0 to 1."""
    return jnp.mean((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32))

"""Classification losses and accuracy of one batch, as means over its images."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"], *, smoothing: float
) -> Float[Array, ""]:
    """Computes the label-smoothed cross-entropy, in nats.

    The loss of an image is `(1 - smoothing) nll + smoothing * mean(-log p)`, with the mean over the
    classes.
    """
    log_p = jax.nn.log_softmax(logits)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean((1 - smoothing) * nll - smoothing * jnp.mean(log_p, axis=-1))


def kl_to_teacher(
    logits: Float[Array, "batch classes"], teacher: Float[Array, "batch classes"]
) -> Float[Array, ""]:
    """Computes KL(softmax(teacher) || softmax(logits)), without temperature, in nats."""
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(logits)
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def accuracy(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]
) -> Float[Array, ""]:
    """Computes the top-1 accuracy, 0 to 1."""
    return jnp.mean((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32))

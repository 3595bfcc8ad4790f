"""Classification losses and accuracy of one batch, as means over its images.

Models may classify several places of an example, such as pixels or tokens; the mean is then over
all of them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def check(logits: Any, labels: Any) -> None:
    """Raises ValueError unless a model returns one row of logits for each label."""
    if not hasattr(logits, "shape"):
        returned = jax.tree.map(lambda leaf: leaf.shape, logits)
        raise ValueError(
            f"the model returns arrays of shapes {returned}; classification needs one array, "
            "logits [batch, ..., classes]: wrap the model so that it returns them alone"
        )
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"the model returns an array of shape {logits.shape}, and labels have shape "
            f"{labels.shape}; wanted one label for each row of logits, {logits.shape[:-1]}"
        )


def cross_entropy(
    logits: Any, labels: Int[Array, "*batch"], *, smoothing: float
) -> Float[Array, ""]:
    """Computes the label-smoothed cross-entropy, in nats.

    Args:
        logits: float [*batch, classes]; anything else is refused by `check`.
        labels: one for each row of logits.
        smoothing: label smoothing, 0 to 1.

    The loss of an image is `(1 - smoothing) nll + smoothing * mean(-log p)`, with the mean over the
    classes.
    """
    check(logits, labels)
    log_p = jax.nn.log_softmax(logits)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean((1 - smoothing) * nll - smoothing * jnp.mean(log_p, axis=-1))


def kl_to_teacher(
    logits: Float[Array, "*batch classes"], teacher: Float[Array, "*batch classes"]
) -> Float[Array, ""]:
    """Computes KL(softmax(teacher) || softmax(logits)), without temperature, in nats."""
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(logits)
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def accuracy(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]
) -> Float[Array, ""]:
    """Computes the top-1 accuracy, 0 to 1."""
    return jnp.mean((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32))

"""Accuracy and loss of a model over a data set, by one compiled step."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from mpq_jax.bits import BitConfig

PyTree = Any


class Score(NamedTuple):
    """Means over all images.

    Attributes:
        accuracy: top-1, 0 to 1.
        loss: cross-entropy in nats.
        images: how many.
    """

    accuracy: float
    loss: float
    images: int


def make_evaluate(
    predict: Callable[[PyTree, BitConfig | None, Array], Array],
    normalize: Callable[[Array], Array],
) -> Callable[[PyTree, BitConfig | None, Iterable[Mapping[str, Any]]], Score]:
    """Returns `evaluate(variables, bits, batches) -> Score`; no bits ever recompile it.

    Args:
        predict: a method's `predict`.
        normalize: turns a batch's images into the model's input.
    """

    @jax.jit
    def evaluate_batch(variables, bits, batch):
        logits = predict(variables, bits, normalize(batch["image"]))
        weight, labels = batch["weight"], batch["label"]
        right = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.stack([jnp.sum(weight * part) for part in (right, loss, jnp.ones_like(loss))])

    def evaluate(variables, bits, batches) -> Score:
        sums = [evaluate_batch(variables, bits, batch) for batch in batches]
        if not sums:
            raise ValueError("there is not one image to evaluate on; is this split empty?")
        right, loss, images = np.array(jax.device_get(sums), np.float64).sum(axis=0)
        return Score(float(right / images), float(loss / images), int(images))

    return evaluate

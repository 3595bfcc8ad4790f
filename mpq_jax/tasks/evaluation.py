"""Accuracy and loss of a model over a dataset, by one compiled step."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from mpq_jax.tasks import classification

PyTree = Any
Name = TypeVar("Name")


class Score(NamedTuple):
    """Means over all images.

    Attributes:
        accuracy: top-1 accuracy, 0 to 1.
        loss: cross-entropy, in nats.
        images: number of images.
    """

    accuracy: float
    loss: float
    images: int


def make_evaluate(
    predict: Callable[[PyTree, Any, Array], Array],
    normalize: Callable[[Array], Array],
) -> Callable[[PyTree, Any, Iterable[Mapping[str, Any]]], Score]:
    """Makes `evaluate(variables, bits, batches) -> Score`; changing bits never recompiles it.

    Args:
        predict: `(variables, bits, inputs) -> logits`, the `predict` of a method.
        normalize: function from the images of a batch to the model's input.
    """
    evaluate_all = make_evaluate_all(predict, normalize)

    def evaluate(variables, bits, batches) -> Score:
        return evaluate_all(variables, {"": bits}, batches)[""]

    return evaluate


def make_evaluate_all(
    predict: Callable[[PyTree, Any, Array], Array],
    normalize: Callable[[Array], Array],
) -> Callable[[PyTree, Mapping[Name, Any], Iterable[Mapping[str, Any]]], dict[Name, Score]]:
    """Makes `evaluate(variables, configs, batches) -> scores`; `configs` and `scores` are by name.

    The batches are read once for all configurations. Arguments as in `make_evaluate`.
    """

    @jax.jit
    def evaluate_batch(variables, bits, batch):
        logits = predict(variables, bits, normalize(batch["image"]))
        weight, labels = batch["weight"], batch["label"]
        classification.check(logits, labels)
        correct = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        by_example = (jnp.mean(x.reshape(len(x), -1), axis=1) for x in (correct, loss))
        return jnp.stack([jnp.sum(weight * x) for x in (*by_example, jnp.ones_like(weight))])

    def add(totals: dict[Any, np.ndarray], sums: dict[Any, Array]) -> dict[Any, np.ndarray]:
        return totals | {name: totals[name] + jax.device_get(part) for name, part in sums.items()}

    def evaluate(variables, configs, batches) -> dict[Any, Score]:
        totals = dict.fromkeys(configs, np.zeros(3))
        pending: dict[Any, Array] = {}
        for batch in batches:
            sums = {n: evaluate_batch(variables, bits, batch) for n, bits in configs.items()}
            # Fetch results one batch late: devices never wait and hold at most two batches.
            totals, pending = add(totals, pending), sums
        totals = add(totals, pending)
        if configs and not next(iter(totals.values()))[-1]:
            raise ValueError("there is not one image to evaluate on; is the split empty?")
        return {
            n: Score(float(correct / images), float(loss / images), int(images))
            for n, (correct, loss, images) in totals.items()
        }

    return evaluate

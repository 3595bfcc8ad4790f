"""The functions by which a search reads images, made from arrays or given by a program."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mpq_jax.program import network
from mpq_jax.search.scoring import ToDevice, as_arrays
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.fingerprint import fingerprint
from mpq_jax.supernet.state import SupernetState
from mpq_jax.supernet.supernet import Supernet
from mpq_jax.tasks import evaluation

VALIDATION, TEST = "validation", "test"  # splits
BATCH = 128  # images of one evaluation or recalibration step

Batches = Iterator[dict[str, Any]]


class ImageReaders(NamedTuple):
    """Functions that a program on many devices, or with streamed images, has of its own.

    Attributes:
        to_device: `(images, labels) -> (normalized images, labels)` of drawn validation images.
        calibration: `() -> [batches, batch, ...]`, normalized training images.
        labeled_batches: `images -> batches`, "image" (normalized) and "label" of about so many
            images, for Hessian traces.
        evaluate: `(state, bits, split) -> Score` over all images of a split.
        splits: the splits that can be evaluated: `VALIDATION`, and perhaps `TEST`.
        identity: `() -> JSON`, what tells these images from others, for the cache of scores.
    """

    to_device: ToDevice
    calibration: Callable[[], Array]
    labeled_batches: Callable[[int], Batches]
    evaluate: Callable[[SupernetState, BitConfig, str], evaluation.Score]
    splits: tuple[str, ...]
    identity: Callable[[], dict[str, Any]]


def readers_of_arrays(
    net: Supernet,
    images: Any,
    labels: Any,
    *,
    calibration_images: Any | None = None,
    test_images: Any | None = None,
    test_labels: Any | None = None,
) -> ImageReaders:
    """Makes the functions from normalized images, [images, ...], or any pytree of such arrays.

    Args:
        net: the supernet.
        images: validation images.
        labels: their labels.
        calibration_images: training images; None: the validation images.
        test_images: test images; None: there are none.
        test_labels: their labels.

    Raises:
        ValueError: images and labels do not match.
    """
    splits = {VALIDATION: (images, labels)}
    if test_images is not None or test_labels is not None:
        splits[TEST] = (test_images, test_labels)
    for name, (some_images, some_labels) in splits.items():
        counts = [
            0 if some is None else network.batch_size(some) for some in (some_images, some_labels)
        ]
        if counts[0] != counts[1] or not counts[0]:
            raise ValueError(
                f"there are {counts[0]} {name} images and {counts[1]} labels; wanted one label for "
                "each image, and at least one image"
            )
    training: Any = images if calibration_images is None else calibration_images

    def calibration() -> Array:
        size = min(BATCH, network.batch_size(training))
        count = network.batch_size(training) // size

        def in_batches(leaf: Any) -> Array:
            return jnp.asarray(leaf[: count * size]).reshape(count, size, *leaf.shape[1:])

        return jax.tree.map(in_batches, training)

    def labeled_batches(count: int) -> Batches:
        most = min(count, len(labels))
        size = min(BATCH, most)
        for first in range(0, most - size + 1, size):
            some, some_labels = as_arrays(
                *network.take((images, labels), slice(first, first + size))
            )
            yield {"image": some, "label": some_labels}

    def evaluate(state: SupernetState, bits: BitConfig, split: str) -> evaluation.Score:
        return _evaluate(net)(state, bits, _padded_batches(*splits[split]))

    def identity() -> dict[str, Any]:
        return {"images": fingerprint((images, labels, training))}

    return ImageReaders(as_arrays, calibration, labeled_batches, evaluate, tuple(splits), identity)


def _padded_batches(images: Any, labels: Any) -> Batches:
    """Yields batches of one size; the last is filled up with images of weight 0."""
    size = min(BATCH, len(labels))
    whole = {"image": images, "label": labels, "weight": np.ones(len(labels), np.float32)}

    def padded(leaf: Any) -> np.ndarray:
        room = [(0, size - len(leaf))] + [(0, 0)] * (leaf.ndim - 1)
        return np.pad(np.asarray(leaf), room)

    for first in range(0, len(labels), size):
        yield jax.tree.map(padded, network.take(whole, slice(first, first + size)))


@functools.lru_cache(maxsize=4)  # one compiled program serves all searches of a supernet
def _evaluate(net: Supernet):
    def predict(state: SupernetState, bits: BitConfig | None, images: jax.Array) -> jax.Array:
        assert bits is not None
        return net.apply(state, bits, images)

    return evaluation.make_evaluate(predict, lambda images: images)

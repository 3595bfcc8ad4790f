"""Scores on images that a key draws, as strategies take them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from mpq_jax.program import network
from mpq_jax.search.problem import Score, seed_words
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.scoring import BatchScore

ToDevice = Callable[[Any, Any], tuple[Array, Array]]
"""`(images, labels) -> (normalized images, labels)`, on the devices that score."""


def as_arrays(images: Any, labels: Any) -> tuple[Array, Array]:
    """Returns images, which are normalized already, and labels as JAX arrays."""
    return jax.tree.map(jnp.asarray, (images, labels))


def on_drawn_images(
    score: BatchScore, images: Any, labels: Any, *, size: int, to_device: ToDevice = as_arrays
) -> Score:
    """Returns `score(configs, key)`: on images that the key draws without replacement.

    Args:
        score: from `scoring.make_score` or `prefix_scoring.make_fast_score`.
        images: images of this process; each process draws its own.
        labels: their labels.
        size: number of images that this process draws.
        to_device: prepares what was drawn.
    """
    count = network.batch_size(images)
    if not 1 <= size <= count:
        raise ValueError(f"size is {size}; there are {count} images to draw from")

    @functools.lru_cache(maxsize=1)  # most strategies score everything with one key
    def drawn(words: tuple[int, ...]) -> tuple[Array, Array]:
        generator = np.random.default_rng([*words, jax.process_index()])
        chosen = generator.choice(count, size, replace=False)
        return to_device(network.take(images, chosen), labels[chosen])

    def score_drawn(configs: BitConfig, key: Key[Array, ""]) -> Array:
        return score(configs, *drawn(seed_words(key)))

    return score_drawn

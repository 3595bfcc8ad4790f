"""Normalization and augmentation of images on the device, inside jit.

Augment the uint8 images first, then normalize them: padding adds black pixels.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, PRNGKeyArray, UInt8

MAX_PIXEL = 255  # uint8


def normalize(
    images: UInt8[Array, "batch height width channel"],
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> Float32[Array, "batch height width channel"]:
    """Scales images to mean zero and standard deviation one in each channel.

    Args:
        images: pixels from 0 to 255.
        mean: mean of each channel, on the 0 to 1 scale.
        std: standard deviation of each channel, on the 0 to 1 scale.
    """
    shape = (1, 1, 1, images.shape[-1])
    pixels = images.astype(jnp.float32) / MAX_PIXEL
    means, stds = (jnp.array(values, jnp.float32).reshape(shape) for values in (mean, std))
    return (pixels - means) / stds


def random_crop(
    key: PRNGKeyArray, images: UInt8[Array, "batch height width channel"], *, padding: int
) -> UInt8[Array, "batch height width channel"]:
    """Shifts each image by a random number of pixels of its own and fills the gap with zeros.

    Args:
        key: PRNG key.
        images: images of any size.
        padding: zeros added on each side before cropping to the original size, in pixels; the
            largest shift.
    """
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    tops, lefts = jax.random.randint(key, (2, images.shape[0]), 0, 2 * padding + 1)

    def crop(image: Array, top: Array, left: Array) -> Array:
        start = (top, left, jnp.zeros_like(top))
        return jax.lax.dynamic_slice(image, start, images.shape[1:])

    return jax.vmap(crop)(padded, tops, lefts)


def random_flip(
    key: PRNGKeyArray,
    images: UInt8[Array, "batch height width channel"],
    *,
    probability: float = 0.5,
) -> UInt8[Array, "batch height width channel"]:
    """Mirrors each image left to right with the given probability."""
    flip = jax.random.bernoulli(key, probability, (images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def augment(
    key: PRNGKeyArray,
    images: UInt8[Array, "batch height width channel"],
    *,
    padding: int,
    flip_probability: float,
) -> UInt8[Array, "batch height width channel"]:
    """Crops and mirrors images at random.

    Args:
        key: PRNG key; crop and flip use separate keys derived from it.
        images: images of any size.
        padding: as in `random_crop`; 0 leaves the images in place. Static under jit.
        flip_probability: as in `random_flip`; 0 never mirrors. Static under jit.
    """
    key_crop, key_flip = jax.random.split(key)
    if padding:
        images = random_crop(key_crop, images, padding=padding)
    if flip_probability:
        images = random_flip(key_flip, images, probability=flip_probability)
    return images

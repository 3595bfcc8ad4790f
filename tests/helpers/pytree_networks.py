"""Networks whose inputs or outputs are not one array, for tests of exports."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

SHAPE = (6, 6, 3)


class Detector(nn.Module):
    """Finds one box in each cell of an image."""

    @nn.compact
    def __call__(self, image):
        x = nn.relu(nn.Conv(6, (3, 3), strides=3, name="features")(image))
        x = x.reshape(x.shape[0], -1, 6)
        scores = nn.Dense(5, name="scores")(x)
        return {"boxes": nn.Dense(4, name="boxes")(x), "scores": [scores, scores.max(-1)]}


class Reader(nn.Module):
    """Reads tokens, as many as a mask says."""

    @nn.compact
    def __call__(self, inputs):
        mask = inputs["mask"][..., None]
        words = nn.Embed(10, 8, name="words")(inputs["tokens"]) * mask
        return nn.Dense(10, name="head")(nn.relu(nn.Dense(8, name="dense")(words.sum(1))))


class Pair(nn.Module):
    """Takes two arguments, and asks for the batch size."""

    @nn.compact
    def __call__(self, image, facts):
        x = nn.Dense(8, name="of_image")(image.reshape(len(image), -1))
        y = nn.relu(x + nn.Dense(8, name="of_facts")(facts))
        return nn.Dense(10, name="head")(y), y


class Found(NamedTuple):
    """A box and its class."""

    box: jax.Array
    label: jax.Array


class Finder(nn.Module):
    """Returns a named tuple."""

    kind: type = Found

    @nn.compact
    def __call__(self, image):
        x = image.reshape(-1, 108)
        return self.kind(nn.Dense(4, name="box")(x), nn.Dense(3, name="label")(x).argmax(-1))


def batch_of(dtype, *sizes):
    return jax.ShapeDtypeStruct((2, *sizes), dtype)


NETWORKS = {  # model and its inputs
    "detector": (Detector(), batch_of(jnp.float32, *SHAPE)),
    "reader": (Reader(), {"tokens": batch_of(jnp.int32, 5), "mask": batch_of(bool, 5)}),
    "pair": (Pair(), (batch_of(jnp.float32, *SHAPE), batch_of(jnp.float32, 3))),
    "finder": (Finder(), batch_of(jnp.float32, *SHAPE)),
}

"""A small network with blocks of attention, for tests of products of activations."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mpq_jax.models.vit import attention

SHAPE, PATCH, TOKENS, HEADS, SIZE, CLASSES = (4, 4, 2), 2, 4, 2, 3, 3
DIM = HEADS * SIZE
SCORES, MIX = PRODUCTS = ("block0/product", "block0/product#2")
PRODUCT_MACS = HEADS * TOKENS * TOKENS * SIZE  # of each of them
PRODUCT_INPUTS = ((TOKENS * DIM, TOKENS * DIM), (HEADS * TOKENS * TOKENS, TOKENS * DIM))
IMAGES = jnp.asarray(np.random.default_rng(1).normal(size=(8, *SHAPE)), jnp.float32)
LABELS = jnp.arange(8, dtype=jnp.int32) % CLASSES


class Block(nn.Module):
    """Attention alone."""

    @nn.compact
    def __call__(self, x):
        def heads(name):
            return nn.Dense(DIM, name=name)(x).reshape(*x.shape[:2], HEADS, SIZE)

        y = attention(*(heads(name) for name in ("query", "key", "value")))
        return x + nn.Dense(DIM, name="out")(y.reshape(x.shape))


class TinyVit(nn.Module):
    """Patches, blocks of attention, and a head."""

    depth: int = 1

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(DIM, (PATCH, PATCH), (PATCH, PATCH), name="stem")(x)
        x = x.reshape(len(x), TOKENS, DIM)
        for index in range(self.depth):
            x = Block(name=f"block{index}")(x)
        return nn.Dense(CLASSES, name="head")(x.mean(1))


class Turn(nn.Module):
    """One turn of a loop over blocks."""

    @nn.compact
    def __call__(self, x, _):
        return Block(name="block")(x), None


class Scanned(nn.Module):
    """Blocks in a loop of two turns."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(DIM, (PATCH, PATCH), (PATCH, PATCH), name="stem")(x)
        turns = nn.scan(Turn, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = turns(name="turns")(x.reshape(len(x), TOKENS, DIM), None)
        return nn.Dense(CLASSES, name="head")(x.mean(1))

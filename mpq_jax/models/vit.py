"""Vision Transformers, in the layout of the published PyTorch models (pre-norm, class token).

References:
    Dosovitskiy et al., An Image is Worth 16x16 Words: Transformers for Image Recognition at
    Scale, ICLR 2021, https://arxiv.org/abs/2010.11929, Eq. 1-4.
    Touvron et al., Training data-efficient image transformers & distillation through attention,
    ICML 2021, https://arxiv.org/abs/2012.12877, Table 1 (the sizes Ti and S).
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mpq_jax.models import computation

EPSILON = 1e-6  # of the norms, as in the published models
KERNEL_INIT = nn.initializers.xavier_uniform()  # as in the authors' code
EMBEDDING_INIT = nn.initializers.truncated_normal(0.02)  # as in DeiT's code, also of the head


def attention(
    query: Float[Array, "batch queries heads size"],
    key: Float[Array, "batch tokens heads size"],
    value: Float[Array, "batch tokens heads size"],
) -> Float[Array, "batch queries heads size"]:
    """Averages the values, weighted by the softmax of query x key / sqrt(size).

    The operands of the products keep their dtype; the softmax is computed in float32.
    """
    scores = jnp.einsum("bqhs,bths->bhqt", query, key, preferred_element_type=jnp.float32)
    weights = nn.softmax(scores * query.shape[-1] ** -0.5).astype(value.dtype)
    return jnp.einsum("bhqt,bths->bqhs", weights, value)


class Block(nn.Module):
    """Self-attention, then a perceptron with one hidden layer, both pre-norm and residual.

    Attributes:
        heads: number of attention heads.
        hidden: size of the hidden layer.
        dropout: fraction of values dropped after attention and perceptron and in the hidden layer.
        drop_path: fraction of the images that skip attention or perceptron in training.
        dtype: computation dtype of the layers.
    """

    heads: int
    hidden: int
    dropout: float
    drop_path: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens dim"], train: bool
    ) -> Float[Array, "batch tokens dim"]:
        """Applies the block."""
        dense = functools.partial(nn.Dense, kernel_init=KERNEL_INIT, dtype=self.dtype)
        norm = functools.partial(nn.LayerNorm, epsilon=EPSILON, dtype=self.dtype)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        drop_path = nn.Dropout(self.drop_path, broadcast_dims=(1, 2), deterministic=not train)
        dim = x.shape[-1]
        per_head = (*x.shape[:2], self.heads, dim // self.heads)

        y = norm(name="norm1")(x)
        query, key, value = (
            dense(dim, name=name)(y).reshape(per_head) for name in ("query", "key", "value")
        )
        y = attention(query, key, value).reshape(x.shape)
        x = x + drop_path(drop(dense(dim, name="out")(y)))

        y = nn.gelu(dense(self.hidden, name="mlp1")(norm(name="norm2")(x)), approximate=False)
        return x + drop_path(drop(dense(dim, name="mlp2")(drop(y))))


class ViT(nn.Module):
    """Vision Transformer for images of one size, divisible by `patch_size`, fixed at `init`.

    Every projection is an `nn.Dense` and the patch embedding is an `nn.Conv`, so each is a layer
    with its own bit-widths. The softmax of attention stays float; its two matrix products have
    bits where a rule of kind "product" gives them.

    Attributes:
        num_classes: size of the output.
        patch_size: side of the square patches, in pixels.
        dim: size of a token.
        depth: number of blocks.
        heads: number of attention heads, a divisor of `dim`.
        mlp_ratio: size of the hidden layers as a multiple of `dim`.
        dropout: fraction of values dropped in training.
        drop_path: stochastic depth: fraction of the images that skip attention or perceptron of the
            last block in training; it grows linearly from zero in the first block.
        dtype: "float32" or "bfloat16", see `computation.type_of`.
        remat: whether to recompute blocks in the backward pass, see `computation.block_of`.
    """

    num_classes: int
    patch_size: int = 16
    dim: int = 192
    depth: int = 12
    heads: int = 3
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: Any = "float32"
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool = True) -> Float[Array, "b k"]:
        """Computes the logits of a batch of normalized images."""
        self._check(x.shape[1], x.shape[2])
        dtype = computation.type_of(self.dtype)
        block = computation.block_of(Block, remat=self.remat)
        patch = (self.patch_size, self.patch_size)
        x = nn.Conv(self.dim, patch, patch, padding="VALID", dtype=dtype, name="patch_embed")(x)
        x = x.reshape(x.shape[0], -1, self.dim)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.dim))
        token = jnp.broadcast_to(token.astype(dtype), (x.shape[0], 1, self.dim))
        x = jnp.concatenate([token, x], axis=1)
        position = self.param("position_embedding", EMBEDDING_INIT, (1, *x.shape[1:]))
        x = nn.Dropout(self.dropout, deterministic=not train)(x + position.astype(dtype))
        for index in range(self.depth):
            x = block(
                heads=self.heads,
                hidden=int(self.mlp_ratio * self.dim),
                dropout=self.dropout,
                drop_path=self.drop_path * index / max(self.depth - 1, 1),
                dtype=dtype,
                name=f"block{index}",
            )(x, train)
        x = nn.LayerNorm(epsilon=EPSILON, dtype=dtype, name="norm")(x[:, 0])
        head = nn.Dense(self.num_classes, kernel_init=EMBEDDING_INIT, dtype=dtype, name="head")
        return head(x).astype(jnp.float32)

    def _check(self, height: int, width: int) -> None:
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"the images are {height}x{width} pixels, which patch_size {self.patch_size} does "
                "not divide; choose another patch_size or resize the images"
            )
        if self.dim % self.heads:
            raise ValueError(
                f"dim is {self.dim} and heads {self.heads}; wanted a dim that heads divide"
            )

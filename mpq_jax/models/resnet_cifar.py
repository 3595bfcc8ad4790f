"""ResNets for small images (as of CIFAR): three stages of basic blocks.

References:
    He et al., Deep Residual Learning for Image Recognition, CVPR 2016,
    https://arxiv.org/abs/1512.03385, section 4.2.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mpq_jax.models import computation
from mpq_jax.models.resnet import KERNEL_INIT, NORM


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut.

    Attributes:
        channels: output channels.
        stride: stride of the first convolution.
        shortcut: shortcut of a block that changes the shape: "A" (subsampled and padded with zero
            channels) or "B" (1x1 convolution).
        dtype: computation dtype of the layers.
    """

    channels: int
    stride: int
    shortcut: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 c2"]:
        """Applies the block."""
        conv = functools.partial(
            nn.Conv, self.channels, use_bias=False, kernel_init=KERNEL_INIT, dtype=self.dtype
        )
        norm = functools.partial(NORM, use_running_average=not train, dtype=self.dtype)
        strides = (self.stride, self.stride)
        residual = x
        if self.stride != 1 or x.shape[-1] != self.channels:
            residual = (
                _pad_shortcut(x, self.stride, self.channels)
                if self.shortcut == "A"
                else norm(name="shortcut_norm")(conv((1, 1), strides, name="shortcut_conv")(x))
            )
        y = nn.relu(norm(name="norm1")(conv((3, 3), strides, padding=1, name="conv1")(x)))
        y = norm(name="norm2")(conv((3, 3), padding=1, name="conv2")(y))
        return nn.relu(y + residual)


def _pad_shortcut(x: Float[Array, "b h w c"], stride: int, channels: int):
    missing = channels - x.shape[-1]
    padding = ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2))
    return jnp.pad(x[:, ::stride, ::stride], padding)


class ResNetCifar(nn.Module):
    """ResNet-(6 n + 2) with n blocks in each of three stages (ResNet-8: 1, ResNet-20: 3).

    Attributes:
        num_classes: size of the output.
        blocks_per_stage: number of blocks in each stage, n.
        width: channels of the first stage; every further stage doubles them and halves the image.
        stem_stride: stride of the first convolution; 1 in the paper, 2 is four times as fast.
        shortcut: "A" (parameter-free, as in the paper's CIFAR networks) or "B" (1x1 convolution).
        dtype: "float32" or "bfloat16", see `computation.type_of`.
        remat: whether to recompute blocks in the backward pass, see `computation.block_of`.
    """

    num_classes: int
    blocks_per_stage: int
    width: int = 16
    stem_stride: int = 1
    shortcut: str = "A"
    dtype: Any = "float32"
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool = True) -> Float[Array, "b k"]:
        """Computes the logits of a batch of normalized images."""
        if self.shortcut not in ("A", "B"):
            raise ValueError(f'shortcut is {self.shortcut!r}; wanted "A" or "B"')
        dtype = computation.type_of(self.dtype)
        block = computation.block_of(Block, remat=self.remat)
        stem = nn.Conv(
            self.width,
            (3, 3),
            (self.stem_stride, self.stem_stride),
            padding=1,
            use_bias=False,
            kernel_init=KERNEL_INIT,
            dtype=dtype,
            name="stem_conv",
        )
        x = nn.relu(NORM(use_running_average=not train, dtype=dtype, name="stem_norm")(stem(x)))
        for stage in range(3):
            for index in range(self.blocks_per_stage):
                stride = 2 if stage > 0 and index == 0 else 1
                name, width = f"stage{stage}_block{index}", self.width * 2**stage
                x = block(width, stride, self.shortcut, dtype, name=name)(x, train)
        head = nn.Dense(self.num_classes, dtype=dtype, name="head")
        return head(jnp.mean(x, axis=(1, 2))).astype(jnp.float32)

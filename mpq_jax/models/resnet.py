"""ResNets for ImageNet-sized images: basic or bottleneck blocks with 1x1-convolution shortcuts.

References:
    He et al., Deep Residual Learning for Image Recognition, CVPR 2016,
    https://arxiv.org/abs/1512.03385, Table 1.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mpq_jax.models import computation

NORM = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)
KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")
EXPANSION = 4  # output channels of a bottleneck block per inner channel, Table 1


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut, which is a 1x1 convolution if the shape changes.

    Attributes:
        channels: output channels.
        stride: stride of the first convolution.
        dtype: computation dtype of the layers.
    """

    channels: int
    stride: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 c2"]:
        """Applies the block."""
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=KERNEL_INIT, dtype=self.dtype)
        norm = functools.partial(NORM, use_running_average=not train, dtype=self.dtype)
        strides = (self.stride, self.stride)
        residual = _shortcut(x, self.channels, strides, conv, norm)
        y = conv(self.channels, (3, 3), strides, padding=1, name="conv1")(x)
        y = nn.relu(norm(name="norm1")(y))
        y = norm(name="norm2")(conv(self.channels, (3, 3), padding=1, name="conv2")(y))
        return nn.relu(y + residual)


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut like that of `BasicBlock`.

    Attributes:
        channels: channels of the 3x3 convolution; the output has `EXPANSION` times as many.
        stride: stride of the 3x3 convolution ("v1.5", as in torchvision; in the paper, the 1x1
            convolution before it has the stride).
        dtype: computation dtype of the layers.
    """

    channels: int
    stride: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 c2"]:
        """Applies the block."""
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=KERNEL_INIT, dtype=self.dtype)
        norm = functools.partial(NORM, use_running_average=not train, dtype=self.dtype)
        strides, channels_out = (self.stride, self.stride), EXPANSION * self.channels
        residual = _shortcut(x, channels_out, strides, conv, norm)
        y = nn.relu(norm(name="norm1")(conv(self.channels, (1, 1), name="conv1")(x)))
        y = conv(self.channels, (3, 3), strides, padding=1, name="conv2")(y)
        y = nn.relu(norm(name="norm2")(y))
        y = norm(name="norm3")(conv(channels_out, (1, 1), name="conv3")(y))
        return nn.relu(y + residual)


def _shortcut(x: Float[Array, "b h w c"], channels: int, strides: tuple[int, int], conv, norm):
    if strides == (1, 1) and x.shape[-1] == channels:
        return x
    return norm(name="shortcut_norm")(conv(channels, (1, 1), strides, name="shortcut_conv")(x))


class ResNet(nn.Module):
    """ResNet for images of about 224 px (ResNet-18: stage_sizes (2, 2, 2, 2)).

    Attributes:
        num_classes: size of the output.
        stage_sizes: number of blocks in each stage.
        width: `channels` of the blocks in the first stage; every further stage doubles them and
            halves the image.
        block: `BasicBlock` or `BottleneckBlock`.
        dtype: "float32" or "bfloat16", see `computation.type_of`.
        remat: whether to recompute blocks in the backward pass, see `computation.block_of`.
    """

    num_classes: int
    stage_sizes: Sequence[int]
    width: int = 64
    block: Callable[..., nn.Module] = BasicBlock
    dtype: Any = "float32"
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool = True) -> Float[Array, "b k"]:
        """Computes the logits of a batch of normalized images."""
        dtype, block = (
            computation.type_of(self.dtype),
            computation.block_of(self.block, remat=self.remat),
        )
        stem = nn.Conv(
            self.width,
            (7, 7),
            (2, 2),
            padding=3,
            use_bias=False,
            kernel_init=KERNEL_INIT,
            dtype=dtype,
            name="stem_conv",
        )
        x = nn.relu(NORM(use_running_average=not train, dtype=dtype, name="stem_norm")(stem(x)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=[(1, 1), (1, 1)])  # pyright: ignore[reportArgumentType]
        for stage, size in enumerate(self.stage_sizes):
            for index in range(size):
                stride = 2 if stage > 0 and index == 0 else 1
                name = f"stage{stage}_block{index}"
                x = block(self.width * 2**stage, stride, dtype, name=name)(x, train)
        head = nn.Dense(self.num_classes, dtype=dtype, name="head")
        return head(jnp.mean(x, axis=(1, 2))).astype(jnp.float32)

"""MobileNetV2: inverted residuals with linear bottlenecks, in torchvision's layout.

References:
    Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018,
    https://arxiv.org/abs/1801.04381, Tables 1 and 2.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mpq_jax.models import computation
from mpq_jax.models.resnet import KERNEL_INIT, NORM

CHANNEL_DIVISOR = 8  # channels are multiples of it, as in the authors' code
MAX_CHANNEL_LOSS = 0.1  # largest fraction of the channels that rounding may remove, likewise
STEM_CHANNELS, LAST_CHANNELS = 32, 1280  # Table 2
HEAD_INIT = nn.initializers.normal(0.01)  # torchvision


class Stage(NamedTuple):
    """One row of the paper's Table 2.

    Attributes:
        expansion: inner channels per input channel of each block (t in the paper).
        channels: output channels at width multiplier 1 (c).
        blocks: number of blocks (n).
        stride: stride of the first block (s).
    """

    expansion: int
    channels: int
    blocks: int
    stride: int


STAGES = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Expands, convolves depthwise, projects linearly (Table 1).

    If the output has the shape of the input, the input is added. An expansion of 1 has no expanding
    convolution.

    Attributes:
        channels: output channels.
        stride: stride of the depthwise convolution.
        expansion: inner channels per input channel.
        dtype: computation dtype of the layers.
    """

    channels: int
    stride: int
    expansion: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 c2"]:
        """Applies the block."""
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=KERNEL_INIT, dtype=self.dtype)
        norm = functools.partial(NORM, use_running_average=not train, dtype=self.dtype)
        strides, inner = (self.stride, self.stride), self.expansion * x.shape[-1]
        y = x
        if self.expansion != 1:
            y = nn.relu6(norm(name="expand_norm")(conv(inner, (1, 1), name="expand")(y)))
        depthwise = conv(
            inner, (3, 3), strides, padding=1, feature_group_count=inner, name="depthwise"
        )
        y = nn.relu6(norm(name="depthwise_norm")(depthwise(y)))
        y = norm(name="project_norm")(conv(self.channels, (1, 1), name="project")(y))
        return x + y if self.stride == 1 and x.shape[-1] == self.channels else y


class MobileNetV2(nn.Module):
    """MobileNetV2 for images of about 224 px.

    Attributes:
        num_classes: size of the output.
        width_multiplier: multiplier of all channels; the last convolution never gets fewer.
        dropout: fraction of the features dropped before the classifier in training.
        stem_stride: stride of the first convolution; 1 suits small images.
        stages: rows of Table 2, in order.
        dtype: "float32" or "bfloat16", see `computation.type_of`.
        remat: whether to recompute blocks in the backward pass, see `computation.block_of`.
    """

    num_classes: int
    width_multiplier: float = 1.0
    dropout: float = 0.2
    stem_stride: int = 2
    stages: Sequence[Stage] = STAGES
    dtype: Any = "float32"
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool = True) -> Float[Array, "b k"]:
        """Computes the logits of a batch of normalized images."""
        dtype = computation.type_of(self.dtype)
        block = computation.block_of(InvertedResidual, remat=self.remat)
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=KERNEL_INIT, dtype=dtype)
        norm = functools.partial(NORM, use_running_average=not train, dtype=dtype)
        scaled = functools.partial(scale_channels, multiplier=self.width_multiplier)
        strides = (self.stem_stride, self.stem_stride)
        x = conv(scaled(STEM_CHANNELS), (3, 3), strides, padding=1, name="stem_conv")(x)
        x = nn.relu6(norm(name="stem_norm")(x))
        for number, stage in enumerate(self.stages):
            for index in range(stage.blocks):
                x = block(
                    scaled(stage.channels),
                    stage.stride if index == 0 else 1,
                    stage.expansion,
                    dtype,
                    name=f"stage{number}_block{index}",
                )(x, train)
        last = scale_channels(LAST_CHANNELS, multiplier=max(1.0, self.width_multiplier))
        x = nn.relu6(norm(name="last_norm")(conv(last, (1, 1), name="last_conv")(x)))
        x = nn.Dropout(self.dropout, deterministic=not train)(jnp.mean(x, axis=(1, 2)))
        head = nn.Dense(self.num_classes, kernel_init=HEAD_INIT, dtype=dtype, name="head")
        return head(x).astype(jnp.float32)


def scale_channels(channels: int, *, multiplier: float) -> int:
    """Rounds `channels` x `multiplier` to a nearby multiple of `CHANNEL_DIVISOR`.

    Ties are rounded up. So is a number that would lose more than `MAX_CHANNEL_LOSS` of itself.

    References:
        `make_divisible` of the authors' code, https://github.com/tensorflow/models,
        research/slim/nets/mobilenet; torchvision's `_make_divisible`.
    """
    exact = channels * multiplier
    nearest = int(exact + CHANNEL_DIVISOR / 2) // CHANNEL_DIVISOR * CHANNEL_DIVISOR
    nearest = max(CHANNEL_DIVISOR, nearest)
    return nearest + CHANNEL_DIVISOR if nearest < (1 - MAX_CHANNEL_LOSS) * exact else nearest

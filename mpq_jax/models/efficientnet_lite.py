"""EfficientNet-Lite: EfficientNets that are easy to quantize, in the authors' layout.

There is no squeeze-and-excitation, ReLU6 replaces swish, and the stem, the last convolution and the
depth of the first and the last stage do not scale with the network.

References:
    Tan & Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, ICML 2019,
    https://arxiv.org/abs/1905.11946, Table 1 and section 3.3.
    The authors' code, https://github.com/tensorflow/tpu, models/official/efficientnet/lite.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mpq_jax.models import computation
from mpq_jax.models.mobilenet_v2 import scale_channels

STEM_CHANNELS, LAST_CHANNELS = 32, 1280
EPSILON = 1e-3  # of the norms
NORM = functools.partial(nn.BatchNorm, momentum=0.99)
KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
DEPTHWISE_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "normal")  # one channel in and out
HEAD_INIT = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")  # up to 1 / sqrt(outputs)
PADDINGS = ("same", "symmetric")


class Stage(NamedTuple):
    """One row of the paper's Table 1.

    Attributes:
        expansion: inner channels per input channel of each block.
        kernel_size: kernel size of the depthwise convolutions.
        channels: output channels at width 1.
        blocks: number of blocks at depth 1.
        stride: stride of the first block.
    """

    expansion: int
    kernel_size: int
    channels: int
    blocks: int
    stride: int


STAGES = (
    Stage(1, 3, 16, 1, 1),
    Stage(6, 3, 24, 2, 2),
    Stage(6, 5, 40, 2, 2),
    Stage(6, 3, 80, 3, 2),
    Stage(6, 5, 112, 3, 1),
    Stage(6, 5, 192, 4, 2),
    Stage(6, 3, 320, 1, 1),
)


class Block(nn.Module):
    """Inverted residual: expands, convolves depthwise, projects linearly.

    If the output has the shape of the input, the input is added. An expansion of 1 has no expanding
    convolution.

    Attributes:
        channels: output channels.
        stride: stride of the depthwise convolution.
        expansion: inner channels per input channel.
        kernel_size: kernel size of the depthwise convolution.
        padding: "same" or "symmetric", see `EfficientNetLite`.
        drop_path: fraction of the images for which a residual block is skipped in training.
        epsilon: epsilon of the norms.
        dtype: computation dtype of the layers.
    """

    channels: int
    stride: int
    expansion: int
    kernel_size: int
    padding: str
    drop_path: float
    epsilon: float = EPSILON
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 c2"]:
        """Applies the block."""
        pointwise = functools.partial(
            nn.Conv,
            kernel_size=(1, 1),
            use_bias=False,
            kernel_init=KERNEL_INIT,
            dtype=self.dtype,
        )
        norm = functools.partial(
            NORM, use_running_average=not train, epsilon=self.epsilon, dtype=self.dtype
        )
        inner = self.expansion * x.shape[-1]
        y = x
        if self.expansion != 1:
            y = nn.relu6(norm(name="expand_norm")(pointwise(inner, name="expand")(y)))
        depthwise = nn.Conv(
            inner,
            (self.kernel_size, self.kernel_size),
            (self.stride, self.stride),
            padding=padding_of(self.padding, self.kernel_size),
            feature_group_count=inner,
            use_bias=False,
            kernel_init=DEPTHWISE_INIT,
            dtype=self.dtype,
            name="depthwise",
        )
        y = nn.relu6(norm(name="depthwise_norm")(depthwise(y)))
        y = norm(name="project_norm")(pointwise(self.channels, name="project")(y))
        if self.stride != 1 or x.shape[-1] != self.channels:
            return y
        drop = nn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3), deterministic=not train)
        return x + drop(y)


def padding_of(padding: str, kernel_size: int) -> str | int:
    """Converts `EfficientNetLite.padding` to the padding of a Flax convolution."""
    return "SAME" if padding == "same" else kernel_size // 2


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite, by default Lite0 for images of 224 px; `SIZES` lists the larger ones.

    Attributes:
        num_classes: size of the output.
        width: multiplier of the blocks' channels.
        depth: multiplier of the number of blocks in a stage, rounded up; the first and the last
            stage keep theirs.
        dropout: fraction of the features dropped before the classifier in training.
        drop_path: stochastic depth: fraction of the images that skip a residual block in training;
            it grows linearly from zero in the first block and would reach this value after the
            last.
        padding: padding of convolutions with stride 2: "same" (TensorFlow's, asymmetric for even
            sizes), which the published weights expect, or "symmetric" (PyTorch's).
        epsilon: epsilon of the norms; weights trained with PyTorch's defaults need 1e-5.
        stem_stride: stride of the first convolution; 1 suits small images.
        stages: rows of Table 1, in order.
        dtype: "float32" or "bfloat16", see `computation.type_of`.
        remat: whether to recompute blocks in the backward pass, see `computation.block_of`.
    """

    num_classes: int
    width: float = 1.0
    depth: float = 1.0
    dropout: float = 0.2
    drop_path: float = 0.2
    padding: str = "same"
    epsilon: float = EPSILON
    stem_stride: int = 2
    stages: Sequence[Stage] = STAGES
    dtype: Any = "float32"
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool = True) -> Float[Array, "b k"]:
        """Computes the logits of a batch of normalized images."""
        if self.padding not in PADDINGS:
            raise ValueError(f"padding is {self.padding!r}; wanted one of {PADDINGS}")
        dtype = computation.type_of(self.dtype)
        block = computation.block_of(Block, remat=self.remat)
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=KERNEL_INIT, dtype=dtype)
        norm = functools.partial(
            NORM, use_running_average=not train, epsilon=self.epsilon, dtype=dtype
        )
        strides = (self.stem_stride, self.stem_stride)
        padding = padding_of(self.padding, 3)
        x = conv(STEM_CHANNELS, (3, 3), strides, padding=padding, name="stem_conv")(x)
        x = nn.relu6(norm(name="stem_norm")(x))
        rows = [Stage(*stage) for stage in self.stages]
        repeats = repeats_of([stage.blocks for stage in rows], depth=self.depth)
        blocks_before = 0  # in earlier stages
        for number, (stage, blocks) in enumerate(zip(rows, repeats, strict=True)):
            for index in range(blocks):
                x = block(
                    channels=scale_channels(stage.channels, multiplier=self.width),
                    stride=stage.stride if index == 0 else 1,
                    expansion=stage.expansion,
                    kernel_size=stage.kernel_size,
                    padding=self.padding,
                    epsilon=self.epsilon,
                    drop_path=self.drop_path * (blocks_before + index) / sum(repeats),
                    dtype=dtype,
                    name=f"stage{number}_block{index}",
                )(x, train)
            blocks_before += blocks
        x = nn.relu6(norm(name="last_norm")(conv(LAST_CHANNELS, (1, 1), name="last_conv")(x)))
        x = nn.Dropout(self.dropout, deterministic=not train)(jnp.mean(x, axis=(1, 2)))
        head = nn.Dense(self.num_classes, kernel_init=HEAD_INIT, dtype=dtype, name="head")
        return head(x).astype(jnp.float32)


def repeats_of(blocks: Sequence[int], *, depth: float) -> list[int]:
    """Scales the number of blocks of every stage but the first and the last."""
    last = len(blocks) - 1
    return [
        size if stage in (0, last) else math.ceil(depth * size) for stage, size in enumerate(blocks)
    ]


class Size(NamedTuple):
    """Scaling options of an EfficientNet-Lite, with the side of its images in pixels."""

    width: float
    depth: float
    resolution: int
    dropout: float


# `efficientnet_lite_params` of the authors' code.
SIZES = {
    "efficientnet_lite0": Size(1.0, 1.0, 224, 0.2),
    "efficientnet_lite1": Size(1.0, 1.1, 240, 0.2),
    "efficientnet_lite2": Size(1.1, 1.2, 260, 0.3),
    "efficientnet_lite3": Size(1.2, 1.4, 280, 0.3),
    "efficientnet_lite4": Size(1.4, 1.8, 300, 0.3),
}

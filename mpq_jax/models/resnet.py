"""ResNets for ImageNet-sized images, basic blocks with 1x1-convolution shortcuts.

References:
    He et al., Deep Residual Learning for Image Recognition, CVPR 2016,
    https://arxiv.org/abs/1512.03385, Table 1.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

NORM = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)
KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, a 1x1 convolution where the shape changes."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 c2"]:
        """Applies the block."""
        conv = functools.partial(nn.Conv, self.channels, use_bias=False, kernel_init=KERNEL_INIT)
        norm = functools.partial(NORM, use_running_average=not train)
        strides = (self.stride, self.stride)
        residual = x
        if self.stride != 1 or x.shape[-1] != self.channels:
            residual = conv((1, 1), strides, name="shortcut_conv")(x)
            residual = norm(name="shortcut_norm")(residual)
        y = nn.relu(norm(name="norm1")(conv((3, 3), strides, padding=1, name="conv1")(x)))
        y = norm(name="norm2")(conv((3, 3), padding=1, name="conv2")(y))
        return nn.relu(y + residual)


class ResNet(nn.Module):
    """ResNet of basic blocks for images of about 224 px (ResNet-18: stage_sizes (2, 2, 2, 2)).

    Attributes:
        num_classes: size of the output.
        stage_sizes: blocks of each stage.
        width: channels of the first stage; each further stage doubles them and halves the image.
    """

    num_classes: int
    stage_sizes: Sequence[int]
    width: int = 64

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool = True) -> Float[Array, "b k"]:
        """Returns the logits of a batch of normalised images."""
        stem = nn.Conv(
            self.width,
            (7, 7),
            (2, 2),
            padding=3,
            use_bias=False,
            kernel_init=KERNEL_INIT,
            name="stem_conv",
        )
        x = nn.relu(NORM(use_running_average=not train, name="stem_norm")(stem(x)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=[(1, 1), (1, 1)])  # pyright: ignore[reportArgumentType]
        for stage, size in enumerate(self.stage_sizes):
            for index in range(size):
                stride = 2 if stage > 0 and index == 0 else 1
                block = BasicBlock(self.width * 2**stage, stride, name=f"stage{stage}_block{index}")
                x = block(x, train)
        return nn.Dense(self.num_classes, name="head")(jnp.mean(x, axis=(1, 2)))

"""VGG networks with batch norm for small images (as of CIFAR): 3x3 convolutions, max-pooling.

References:
    Simonyan & Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition,
    ICLR 2015, https://arxiv.org/abs/1409.1556, Table 1. As is usual for CIFAR, every convolution
    has a norm, and one dense layer replaces the three.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mpq_jax.models import computation
from mpq_jax.models.resnet import KERNEL_INIT, NORM


class VGG(nn.Module):
    """VGG-19 (configuration E of Table 1) for images of 32 px or more.

    Every stage ends with 2x2 max-pooling, which drops the last row or column of an odd size. The
    remaining pixels, 1x1 for images of 32x32, are averaged.

    Attributes:
        num_classes: size of the output.
        stage_sizes: number of convolutions in each stage.
        stage_channels: output channels of the convolutions in each stage.
        dtype: "float32" or "bfloat16", see `computation.type_of`.
        remat: whether to store only the inputs of the stages for the backward pass, which
            recomputes the rest.
    """

    num_classes: int
    stage_sizes: Sequence[int] = (2, 2, 4, 4, 4)
    stage_channels: Sequence[int] = (64, 128, 256, 512, 512)
    dtype: Any = "float32"
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool = True) -> Float[Array, "b k"]:
        """Computes the logits of a batch of normalized images."""
        _check_size(x.shape[1], x.shape[2], halvings=len(self.stage_sizes))
        dtype = computation.type_of(self.dtype)
        conv = functools.partial(
            nn.Conv, use_bias=False, padding=1, kernel_init=KERNEL_INIT, dtype=dtype
        )
        norm = functools.partial(NORM, use_running_average=not train, dtype=dtype)

        def run_stage(module: nn.Module, x, stage: int):
            del module  # nn.remat needs it as an argument
            for index in range(self.stage_sizes[stage]):
                x = conv(self.stage_channels[stage], (3, 3), name=f"stage{stage}_conv{index}")(x)
                x = nn.relu(norm(name=f"stage{stage}_norm{index}")(x))
            return nn.max_pool(x, (2, 2), strides=(2, 2))

        run = nn.remat(run_stage, static_argnums=(2,)) if self.remat else run_stage
        for stage in range(len(self.stage_sizes)):
            x = run(self, x, stage)
        head = nn.Dense(self.num_classes, dtype=dtype, name="head")
        return head(jnp.mean(x, axis=(1, 2))).astype(jnp.float32)


def _check_size(height: int, width: int, *, halvings: int) -> None:
    smallest = 2**halvings
    if min(height, width) < smallest:
        raise ValueError(
            f"the images are {height}x{width} pixels; wanted at least {smallest}x{smallest}, since "
            f"each of the {halvings} stages halves them: enlarge the images or use fewer stages"
        )

"""Plain Flax models; they know nothing of quantisation. `MODELS` lists them."""

import functools
from collections.abc import Callable

import flax.linen as nn

from mpq_jax.models import mobilenet_v2, resnet, resnet_cifar, vgg

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": functools.partial(resnet_cifar.ResNetCifar, blocks_per_stage=1),
    "resnet20": functools.partial(resnet_cifar.ResNetCifar, blocks_per_stage=3),
    "resnet32": functools.partial(resnet_cifar.ResNetCifar, blocks_per_stage=5),
    "resnet56": functools.partial(resnet_cifar.ResNetCifar, blocks_per_stage=9),
    "resnet18": functools.partial(resnet.ResNet, stage_sizes=(2, 2, 2, 2)),
    "resnet34": functools.partial(resnet.ResNet, stage_sizes=(3, 4, 6, 3)),
    "resnet50": functools.partial(
        resnet.ResNet, stage_sizes=(3, 4, 6, 3), block=resnet.BottleneckBlock
    ),
    "mobilenet_v2": mobilenet_v2.MobileNetV2,
    "vgg19_bn": vgg.VGG,
}


def make_model(name: str, *, num_classes: int, **options) -> nn.Module:
    """Builds a model by its name; an unknown name is refused with the names that there are."""
    if name not in MODELS:
        raise ValueError(f"the model is {name!r}; known models are {sorted(MODELS)}")
    return MODELS[name](num_classes=num_classes, **options)

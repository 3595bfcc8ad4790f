"""Float models in Flax, independent of quantization. `MODELS` lists them."""

import functools
from collections.abc import Callable

import flax.linen as nn

from mpq_jax.models import efficientnet_lite, mobilenet_v2, resnet, resnet_cifar, vgg, vit

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
    # Dropout of ViT as in Table 3 of its paper, stochastic depth of DeiT as in Table 9 of its own.
    "vit_tiny": functools.partial(vit.ViT, dim=192, heads=3, dropout=0.1),
    "vit_small": functools.partial(vit.ViT, dim=384, heads=6, dropout=0.1),
    "deit_tiny": functools.partial(vit.ViT, dim=192, heads=3, drop_path=0.1),
    "deit_small": functools.partial(vit.ViT, dim=384, heads=6, drop_path=0.1),
    **{
        name: functools.partial(
            efficientnet_lite.EfficientNetLite,
            width=size.width,
            depth=size.depth,
            dropout=size.dropout,
        )
        for name, size in efficientnet_lite.SIZES.items()
    },
}


def make_model(name: str, *, num_classes: int, **options) -> nn.Module:
    """Builds a model by its name; raises ValueError, listing the known names, for any other."""
    if name not in MODELS:
        raise ValueError(f"the model is {name!r}; known models are {sorted(MODELS)}")
    return MODELS[name](num_classes=num_classes, **options)

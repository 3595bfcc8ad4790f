"""Float models in Flax, independent of quantization. `MODELS` lists them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from mpq_jax.checks import ranges
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


MODULE_FIELDS = ("parent", "name")  # of every module of Flax
RANGES = {  # of options that are not single integers, which are all counts
    "stage_sizes": ranges.COUNT,
    "stage_channels": ranges.COUNT,
    "width_multiplier": ranges.POSITIVE,
    "width": ranges.POSITIVE,
    "depth": ranges.POSITIVE,
    "epsilon": ranges.POSITIVE,
    "mlp_ratio": ranges.POSITIVE,
    "dropout": ranges.BELOW_ONE,
    "drop_path": ranges.BELOW_ONE,
}


def make_model(name: str, *, num_classes: int, **options) -> nn.Module:
    """Builds a model by its name.

    Raises:
        ValueError: the model or an option is unknown, or an option makes no sense.
    """
    if name not in MODELS:
        raise ValueError(f"the model is {name!r}; known models are {sorted(MODELS)}")
    types = option_types(name)
    unknown = sorted(set(options) - set(types))
    if unknown:
        raise ValueError(f"the model {name!r} takes no {unknown}; it takes {list(types)}")
    counts = {option: ranges.COUNT for option, kind in types.items() if kind is int}
    ranges.check(options, RANGES | counts, prefix=f"the model {name!r}: ")
    return MODELS[name](num_classes=num_classes, **options)


def option_types(name: str) -> dict[str, Any]:
    """Returns the types of a model's options, by their names."""
    kind: Any = getattr(MODELS[name], "func", MODELS[name])
    given = (*MODULE_FIELDS, "num_classes")
    return {one.name: one.type for one in dataclasses.fields(kind) if one.name not in given}

"""Double Rounding with ResNet-50 on ImageNet at {8, 6, 4, 2} bits, as published.

Published: 76.51 / 76.28 / 75.74 / 72.31 % top-1 at 8 / 6 / 4 / 2 bits (float 76.13 %), distilled
76.98 / 76.86 / 76.52 / 73.78 %, without ALRS 76.18 / 76.08 / 75.64 / 70.28 %. With
`--config.bits.candidates='(4, 3, 2)' --config.search.levels='(3,)'`
75.81 / 75.24 / 71.62 %, and mixed at a mean of 3 bits,
without retraining, 75.06 %. 90 epochs, batch 256. Not reproduced here yet. Needs TFDS's
imagenet2012 as array_record files.
"""

from mpq_jax.configs import default, resnet18_imagenet
from mpq_jax.configs.double_rounding import published_imagenet, use


def get_config(variant: str = ""):
    config = use(resnet18_imagenet.get_config(), candidates=(8, 6, 4, 2))
    published_imagenet(config)
    config.model.name = "resnet50"
    return default.finish(config, variant)

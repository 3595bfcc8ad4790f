"""Double Rounding with ResNet-18 on ImageNet at {8, 6, 4, 2} bits, as published.

Published: 70.74 / 70.71 / 70.43 / 66.35 % top-1 at 8 / 6 / 4 / 2 bits (float 69.76 %), distilled
70.87 / 70.79 / 70.53 / 66.84 %, without ALRS 70.05 / 69.80 / 69.32 / 65.83 %. With
`--config.bits.candidates='(4, 3, 2)' --config.search.levels='(3,)'`
69.73 / 69.20 / 66.30 %, and mixed at a mean of 3 bits,
without retraining, 68.85 %. 90 epochs, batch 256. Not reproduced here yet. Needs TFDS's
imagenet2012 as array_record files.
"""

from mpq_jax.configs import default, resnet18_imagenet
from mpq_jax.configs.double_rounding import published_imagenet, use


def get_config(variant: str = ""):
    config = use(resnet18_imagenet.get_config(), candidates=(8, 6, 4, 2))
    published_imagenet(config)
    return default.finish(config, variant)

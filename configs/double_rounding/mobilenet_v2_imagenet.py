"""Double Rounding with MobileNetV2 on ImageNet at {8, 6, 4} bits, as published.

Published: 72.42 / 72.06 / 69.92 % top-1 at 8 / 6 / 4 bits (float 71.14 %). With
`--config.bits.candidates='(8, 6, 4, 2)'` 70.98 / 70.70 / 68.77 / 50.43 %, distilled 71.35 / 71.20 /
69.85 / 53.06 %: one scale for a whole depthwise kernel is too coarse for 2 bits. 90 epochs, batch
256. Not reproduced here yet. Needs TFDS's imagenet2012 as array_record files.
"""

from mpq_jax.configs import default, resnet18_imagenet
from mpq_jax.configs.double_rounding import published_imagenet, use


def get_config(variant: str = ""):
    config = use(resnet18_imagenet.get_config(), candidates=(8, 6, 4))
    published_imagenet(config)
    config.model.name = "mobilenet_v2"
    config.plain.weight_decay = 4e-5
    return default.finish(config, variant)

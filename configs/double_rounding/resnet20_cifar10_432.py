"""Double Rounding with ResNet-20 on CIFAR-10 at {4, 3, 2} bits, as published.

Published: 91.79 / 91.83 / 88.88 % top-1 at 4 / 3 / 2 bits (float 92.30 %), without ALRS 91.19 /
90.98 / 88.62 %; 200 epochs, batch 128. Not reproduced here yet. One GPU. Needs TFDS's cifar10 as
array_record files (README, "Data").
"""

from mpq_jax.configs import default, resnet20_cifar10
from mpq_jax.configs.double_rounding import use


def get_config(variant: str = ""):
    config = use(resnet20_cifar10.get_config(), candidates=(4, 3, 2))
    config.epochs = 200
    return default.finish(config, variant)
